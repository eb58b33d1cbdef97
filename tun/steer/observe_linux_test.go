package steer_test

import (
	"slices"
	"strings"
	"testing"

	"ztun/tun/steer"
	"ztun/tun/tuntest/nslab"
)

// TestMissing: of a plan in force nothing is missing; of a plan of which one step has been taken back, that one is.
func TestMissing(t *testing.T) {
	n := newNode(t)
	n.open(t)
	p := attach(t, n, "10.1.0.2", "fd01::2")
	both := steer.Plan{Steps: append(slices.Clone(n.plan.Steps), p.plan.Steps...)}
	ask := func() []string {
		missing, err := steer.Missing(both, p.namespaces())
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, s := range missing {
			out = append(out, s.Do.String())
		}
		return out
	}
	if got := ask(); len(got) != 0 {
		t.Fatalf("missing of a plan in force: %q", got)
	}
	for _, s := range both.Steps {
		switch s.Do.(type) {
		case steer.Route, steer.Rule:
		default: // Undo leaves those; an address takes routes with it
			continue
		}
		one := steer.Plan{Steps: []steer.Step{s}}
		if err := steer.Undo(one, p.namespaces()); err != nil {
			t.Fatal(err)
		}
		if got := ask(); !slices.Equal(got, []string{s.Do.String()}) {
			t.Errorf("after %q was taken back there are missing %q", s.Do, got)
		}
		if err := steer.Apply(t.Context(), both, p.namespaces()); err != nil {
			t.Fatal(err)
		}
	}
	n.IP(t, "link", "set", "ztun-node", "down")
	if got := ask(); !slices.Contains(got, "ip link set ztun-node mtu 1500 up") {
		t.Errorf("with the device down: %q", got)
	}
	n.tun.Close()
	if got := ask(); !slices.ContainsFunc(got, func(s string) bool {
		return strings.Contains(s, "10.1.0.2/32 dev ztun-node")
	}) {
		t.Errorf("without the node's device: %q", got)
	}
	missing, err := steer.Missing(p.plan, steer.Namespaces{Node: n.NS.NS}) // the pod's namespace is gone
	if err != nil || len(missing) < 5 {
		t.Errorf("%v %v", missing, err)
	}
}

// TestObserve: what is ours is told from what is not.
func TestObserve(t *testing.T) {
	n := newNode(t)
	n.open(t)
	n.IP(t, "rule", "add", "pref", "5", "to", "10.99.0.0/16", "lookup", "77")
	nslab.Join(t, n.NS, nslab.New(t), "eth9")
	n.IP(t, "route", "add", "default", "dev", "eth9")
	attach(t, n, "10.1.0.2", "fd01::2")
	s, err := steer.Observe(n.NS.NS)
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Pods) != 2 || s.Pods[0].String() != "10.1.0.2" || s.Pods[1].String() != "fd01::2" {
		t.Errorf("pods %v", s.Pods)
	}
	if len(s.Routes) != 6 { // for each family unreachable, to the device, local
		t.Errorf("routes %q", s.Routes)
	}
	ours, foreign := 0, 0
	for _, r := range s.Rules {
		switch {
		case r.Ours:
			ours++
		case r.Pref == 5 && !r.V6 && r.Table == 77 && strings.Contains(r.Text, "10.99.0.0/16"):
			foreign++
		}
	}
	if ours != 7 || foreign != 1 {
		t.Errorf("%d rules of ours, %d foreign: %+v", ours, foreign, s.Rules)
	}
	tun, byDefault := 0, 0
	for _, l := range s.Links {
		if l.TUN && l.Name == "ztun-node" && l.Up && l.MTU == 1500 && !l.Default {
			tun++
		}
		if l.Default && l.Name == "eth9" && !l.TUN {
			byDefault++
		}
	}
	if tun != 1 || byDefault != 1 {
		t.Errorf("links %+v", s.Links)
	}
}
