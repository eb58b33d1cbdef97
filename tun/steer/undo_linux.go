package steer

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"ztun/tun/netns"
	"ztun/tun/rtnl"
)

// Setting is a sysctl of a whole namespace as it was, and as a plan has set it.
type Setting struct {
	Path string `json:"path"` // below /proc/sys
	Was  string `json:"was"`
	Set  string `json:"set"`
}

func (s Setting) String() string { return Sysctl{Path: s.Path, Value: s.Was}.String() }

// Former returns what the plan is about to change of the node's namespace as a whole. Settings of single devices are
// left out: they go with their device.
func Former(p Plan, node *netns.NS) ([]Setting, error) {
	var out []Setting
	for _, step := range p.Steps {
		s, ok := step.Do.(Sysctl)
		if !ok || step.Where != Node || s.ofDevice() {
			continue
		}
		was, err := setting(node, s.Path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if was != s.Value {
			out = append(out, Setting{s.Path, was, s.Value})
		}
	}
	return out, nil
}

// InForce returns those of settings that still have the value that was set.
func InForce(settings []Setting, node *netns.NS) ([]Setting, error) {
	var out []Setting
	for _, s := range settings {
		now, err := setting(node, s.Path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if now == s.Set {
			out = append(out, s)
		}
	}
	return out, nil
}

// Restore gives settings their former values. One that has another value by now than the plan's is somebody else's
// and stays.
func Restore(settings []Setting, node *netns.NS) (restored []Setting, err error) {
	have, err := InForce(settings, node)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, s := range have {
		if err := node.Do(func() error {
			return os.WriteFile(filepath.Join("/proc/sys", s.Path), []byte(s.Was), 0)
		}); err != nil {
			errs = append(errs, fmt.Errorf("cannot set %s back to %s: %w", s.Path, s.Was, err))
			continue
		}
		restored = append(restored, s)
	}
	return restored, errors.Join(errs...)
}

func setting(ns *netns.NS, path string) (string, error) {
	var b []byte
	err := ns.Do(func() (err error) {
		b, err = os.ReadFile(filepath.Join("/proc/sys", path))
		return err
	})
	return string(bytes.TrimSpace(b)), err
}

// SweepAll removes from the node's namespace all that Sweep and NodePlan know as ours: every pod's routes, and the
// rules. It returns what it has removed, also along with an error.
func SweepAll(node *netns.NS) (pods []netip.Addr, rules int, err error) {
	pods, err = Sweep(node, nil)
	p, err2 := openPlace(Node, node)
	if err2 != nil {
		return pods, 0, errors.Join(err, err2)
	}
	defer p.h.Close()
	stale, err2 := p.staleRules(nil)
	errs := []error{err, err2}
	for _, r := range stale {
		if err := p.h.RuleDel(&r); err != nil && !rtnl.Gone(err) {
			errs = append(errs, fmt.Errorf("cannot remove a rule of ztun's (pref %d): %w", r.Priority, err))
			continue
		}
		rules++
	}
	return pods, rules, errors.Join(errs...)
}
