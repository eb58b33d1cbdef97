package isolated

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"ztun/cmd/attach"
	"ztun/tun"
	"ztun/tun/netns"
	"ztun/tun/replace"
	"ztun/tun/steer"
)

// Undo of a node without a daemon: what a daemon, ended or killed, has left on the host is found by our mark on
// routes and rules, in the places where pods lived, and in the record of settings that Open wrote.

// record is what the host's settings were before ztun, and the device that ztun made. It holds for one life of one
// namespace: after a boot nothing of it is in force.
type record struct {
	Boot     string          `json:"boot"`
	Dev      uint64          `json:"dev"` // of the namespace's file
	Ino      uint64          `json:"ino"`
	TUN      string          `json:"tun"` // the node's device, which outlives the daemon
	Settings []steer.Setting `json:"settings"`
}

// remember writes down what plan will change for the whole host, and the node's device. What an earlier life has
// written stays: it knew the values from before us.
func (n *Node) remember(plan steer.Plan) error {
	path := n.o.Record
	if path == "" {
		return nil
	}
	now, err := steer.Former(plan, n.ns)
	if err != nil {
		return err
	}
	was, err := recorded(path, n.ns)
	if err != nil {
		n.o.Logger("ztun").Warn("the record of the host's former settings cannot be read, and is begun anew", "file", path,
			"error", err)
	}
	if was.TUN != "" && was.TUN != n.o.NodeTUN { // another name was configured
		if err := tun.Remove(n.ns, was.TUN); err != nil {
			return fmt.Errorf("the node's device of an earlier life: %w", err)
		}
	}
	for _, s := range was.Settings {
		keep := true
		for i := range now {
			if now[i].Path == s.Path { // set back by somebody since: that is the newer former value
				keep = false
			}
		}
		if keep {
			now = append(now, s)
		}
	}
	dev, ino := n.ns.ID()
	if err := replace.JSON(path, record{netns.BootID(), dev, ino, n.o.NodeTUN, now}); err != nil {
		return fmt.Errorf("the host's former settings cannot be recorded: %w", err)
	}
	return nil
}

// recorded reads the record at path; one of another namespace or boot says nothing.
func recorded(path string, ns *netns.NS) (r record, err error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return record{}, nil
	}
	if err != nil {
		return record{}, err
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return record{}, fmt.Errorf("%s is no record of settings: %w", path, err)
	}
	if dev, ino := ns.ID(); r.Boot != netns.BootID() || r.Dev != dev || r.Ino != ino {
		return record{}, nil
	}
	return r, nil
}

// DefaultTUN is the name of the node's device where no other is configured.
const DefaultTUN = "ztun-node"

// device is the node's device of a record, or of a daemon whose record is lost.
func (r record) device() string { return cmp.Or(r.TUN, DefaultTUN) }

// Left is what there is of ours on a host.
type Left struct {
	Devices []string     `json:"devices"` // of pods: their namespace and the name; the node's: the name
	Pods    []netip.Addr `json:"pods"`    // the addresses that routes capture
	Routes  []string     `json:"routes"`
	Rules   []string     `json:"rules"`
	Sysctls []string     `json:"sysctls"` // that are as ztun has set them; as commands that set them back
}

// Empty reports whether there is nothing.
func (l Left) Empty() bool { return len(l.Devices)+len(l.Routes)+len(l.Rules)+len(l.Sysctls) == 0 }

// Look tells what there is of ours on the host of the calling thread and in places, where pods live or lived. It
// changes nothing.
func Look(places []attach.Place, record string) (Left, error) {
	var l Left
	node, err := netns.Current()
	if err != nil {
		return l, err
	}
	defer node.Close()
	seen, err := steer.Observe(node)
	if err != nil {
		return l, err
	}
	l.Pods, l.Routes = seen.Pods, seen.Routes
	for _, r := range seen.Rules {
		if r.Ours {
			l.Rules = append(l.Rules, r.Text)
		}
	}
	var errs []error
	for _, p := range places {
		has, err := hasDevice(p)
		if has {
			l.Devices = append(l.Devices, p.Path+" "+podTUN)
		}
		errs = append(errs, err)
	}
	was, err := recorded(record, node)
	errs = append(errs, err)
	if slices.ContainsFunc(seen.Links, func(l steer.SeenLink) bool { return l.TUN && l.Name == was.device() }) {
		l.Devices = append(l.Devices, was.device())
	}
	settings, err := steer.InForce(was.Settings, node)
	for _, s := range settings {
		l.Sysctls = append(l.Sysctls, s.String())
	}
	return l, errors.Join(append(errs, err)...)
}

// hasDevice reports whether our device is in the namespace where a pod lived.
func hasDevice(p attach.Place) (bool, error) {
	if p.Gone() != nil {
		return false, nil
	}
	ns, err := netns.Open(p.Path)
	if err != nil {
		return false, err
	}
	defer ns.Close()
	s, err := steer.Observe(ns)
	if err != nil {
		return false, err
	}
	for _, l := range s.Links {
		if l.Name == podTUN && l.TUN {
			return true, nil
		}
	}
	return false, nil
}

// Undo takes all that Look tells away: devices, with the addresses and routes of the pods, the node's routes and
// rules, and settings that are still as ztun has set them. It must not be called while a daemon runs. It goes on
// after an error and returns all of them.
func Undo(places []attach.Place, record string) error {
	node, err := netns.Current()
	if err != nil {
		return err
	}
	defer node.Close()
	var errs []error
	for _, p := range places {
		if p.Gone() != nil {
			continue
		}
		ns, err := netns.Open(p.Path)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if err := tun.Remove(ns, podTUN); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", p.Path, err))
		}
		errs = append(errs, ns.Close())
	}
	_, _, err = steer.SweepAll(node)
	errs = append(errs, err)
	was, err := recorded(record, node)
	errs = append(errs, err)
	errs = append(errs, tun.Remove(node, was.device()))
	_, err = steer.Restore(was.Settings, node)
	return errors.Join(append(errs, err)...)
}
