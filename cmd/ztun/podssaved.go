package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"ztun/admin"
	"ztun/cmd/attach"
	"ztun/tun/replace"
)

// savedPod is a pod in the state file. The path of its namespace alone does not do: a path, and all the
// more a pid, may name another pod's namespace by the time of a restart.
type savedPod struct {
	admin.PodSpec
	Dev uint64 `json:"netnsDev,omitempty"`
	Ino uint64 `json:"netnsIno,omitempty"`
}

// place is where the pod lived when it was saved.
func (s *savedPod) place() attach.Place { return attach.Place{Path: s.NetNS, Dev: s.Dev, Ino: s.Ino} }

// podsFile is the list of pods in the state directory.
const podsFile = "pods.json"

func (m *podManager) stateFile() string { return filepath.Join(m.c.State.Dir, podsFile) }

// save writes the list of pods for the next life of the daemon.
func (m *podManager) save() error {
	m.mu.Lock()
	specs := make([]savedPod, 0, len(m.pods)+len(m.pending))
	for _, p := range m.pods {
		// A namespace that came as a descriptor cannot be found again: whoever gave it gives it to the next daemon, too.
		if s := p.saved(); s.NetNS != "" {
			specs = append(specs, s)
		}
	}
	for _, p := range m.pending {
		if p.file == nil {
			specs = append(specs, p.savedPod)
		}
	}
	m.mu.Unlock()
	slices.SortFunc(specs, func(a, b savedPod) int {
		return strings.Compare(refOf(a.PodSpec).String(), refOf(b.PodSpec).String())
	})
	if err := replace.JSON(m.stateFile(), specs); err != nil {
		return fmt.Errorf("the list of pods could not be saved, a restart would forget the change: %w", err)
	}
	return nil
}

// readSaved reads what save wrote. What is wrong with one pod is no reason to forget the others: the error is about
// those that are left out.
func readSaved(b []byte) (specs []savedPod, bad error) {
	var raw []json.RawMessage
	if err := json.Unmarshal(b, &raw); err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	var errs []error
	for i, r := range raw {
		var s savedPod
		err := json.Unmarshal(r, &s)
		if err == nil {
			err = s.Validate()
		}
		if uid := uidOf(s.PodSpec); err == nil && seen[uid] {
			err = fmt.Errorf("%s is there twice", uid)
		}
		if err != nil {
			if len(errs) < 10 {
				errs = append(errs, fmt.Errorf("pod %d of %d: %w", i+1, len(raw), err))
			}
			continue
		}
		seen[uidOf(s.PodSpec)] = true
		specs = append(specs, s)
	}
	return specs, errors.Join(errs...)
}
