package sandwich

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"ztun/tun/netns"
	"ztun/tun/replace"
	"ztun/tun/rtnl"
)

// Record is what is written down of a pod before the first step: enough to give it back without the daemon.
type Record struct {
	Boot  string `json:"boot"`
	Dev   uint64 `json:"dev"` // of the pod's namespace's file
	Ino   uint64 `json:"ino"`
	Path  string `json:"path,omitempty"` // "" where it came as a descriptor
	Facts Facts  `json:"facts"`
	Keep  []Conn `json:"keep,omitempty"`
	// How it is captured, see Config.
	DNS    bool `json:"dns,omitempty"`
	Native bool `json:"native,omitempty"`
	Rules  bool `json:"rules,omitempty"` // its eth0 stays where it is
}

// Plan is what shall be true of the pod while it is captured.
func (r Record) Plan() (Plan, error) {
	plan := New
	if r.Rules {
		plan = Rules
	}
	return plan(r.Facts, Config{DNS: r.DNS, Native: r.Native, Keep: r.Keep})
}

// Name is S's, as `ip netns` knows it.
func (r Record) Name() string { return fmt.Sprintf("ztun-%x-%x", r.Dev, r.Ino) }

func (r Record) file(dir string) string { return filepath.Join(dir, r.Name()+".json") }

// Save writes r into dir, which it makes: whole or not at all.
func (r Record) Save(dir string) error {
	r.Boot = netns.BootID()
	err := os.MkdirAll(dir, 0o700)
	if err == nil {
		err = replace.JSON(r.file(dir), r)
	}
	if err != nil {
		return fmt.Errorf("what there was in a pod cannot be written down: %w", err)
	}
	return nil
}

// Forget removes r from dir.
func (r Record) Forget(dir string) error {
	if err := os.Remove(r.file(dir)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// Records reads those of dir that this boot wrote. What cannot be read is in err, beside the others.
func Records(dir string) (out []Record, err error) {
	files, err := filepath.Glob(filepath.Join(dir, "ztun-*.json"))
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, file := range files {
		var r Record
		b, err := os.ReadFile(file)
		if err == nil {
			err = json.Unmarshal(b, &r)
		}
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("%s is no record of a pod: %w", file, err))
		case r.Boot != netns.BootID():
			errs = append(errs, os.Remove(file)) // none of its namespaces are there any more
		default:
			out = append(out, r)
		}
	}
	return out, errors.Join(errs...)
}

// Find is the record of the namespace of that file; nil: there is none.
func Find(dir string, dev, ino uint64) (*Record, error) {
	all, err := Records(dir)
	for _, r := range all {
		if r.Dev == dev && r.Ino == ino {
			return &r, nil
		}
	}
	return nil, err
}

// Restore gives the pod its device back from whatever state it is in, ends S, and forgets the record. A pod that is
// gone loses S alone, and the CNI's device in it; one whose device the CNI has taken away has nothing to be given back.
func (r Record) Restore(ctx context.Context, dir string) error {
	pod, err := r.find()
	if err != nil {
		return err
	}
	s, err := netns.OpenName(r.Name())
	switch {
	case errors.Is(err, netns.ErrNotExist), errors.Is(err, netns.ErrNotNamespace):
		s = nil // it was never made, or all is done
	case err != nil:
		return errors.Join(err, closing(pod))
	}
	err = nil
	switch {
	case pod == nil:
	case r.Rules: // whether S is there or not
		_, err = Apply(ctx, UndoRules(r.Facts), Namespaces{S: pod, Pod: pod})
	case s != nil:
		var there bool
		if there, err = r.there(Namespaces{S: s, Pod: pod}); there && err == nil {
			_, err = Apply(ctx, Undo(r.Facts), Namespaces{S: s, Pod: pod})
		}
	}
	err = errors.Join(err, closing(s), closing(pod))
	if err != nil {
		return fmt.Errorf("the pod of %s cannot be given back: %w", r.Name(), err)
	}
	return errors.Join(netns.Remove(r.Name()), r.Forget(dir))
}

// there says whether the CNI's device is in S or in the pod.
func (r Record) there(ns Namespaces) (bool, error) {
	for where, n := range map[Where]*netns.NS{S: ns.S, Pod: ns.Pod} {
		p, err := openPlace(where, n)
		if err != nil {
			return false, err
		}
		l, err := rtnl.Link(p.h, r.Facts.Dev)
		p.h.Close()
		if l != nil || err != nil {
			return l != nil, err
		}
	}
	return false, nil
}

func closing(ns *netns.NS) error {
	if ns == nil {
		return nil
	}
	return ns.Close()
}

// find opens the pod's namespace, wherever it is named or lived in; nil: it is gone.
func (r Record) find() (*netns.NS, error) {
	if ns := r.is(r.Path); ns != nil {
		return ns, nil
	}
	named, _ := os.ReadDir(netns.Dir)
	for _, e := range named {
		if ns := r.is(filepath.Join(netns.Dir, e.Name())); ns != nil {
			return ns, nil
		}
	}
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	for _, e := range procs {
		if strings.Trim(e.Name(), "0123456789") != "" {
			continue
		}
		if ns := r.is("/proc/" + e.Name() + "/ns/net"); ns != nil {
			return ns, nil
		}
	}
	return nil, nil
}

func (r Record) is(path string) *netns.NS {
	if path == "" {
		return nil
	}
	if dev, ino, err := netns.Identify(path); err != nil || dev != r.Dev || ino != r.Ino {
		return nil
	}
	ns, err := netns.Open(path)
	if err != nil {
		return nil
	}
	if dev, ino := ns.ID(); dev != r.Dev || ino != r.Ino {
		ns.Close()
		return nil
	}
	return ns
}
