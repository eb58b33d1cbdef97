package steer

import (
	"errors"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func addrs(s ...string) (out []netip.Addr) {
	for _, a := range s {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

// TestGolden prints each plan and compares it with the file of its name in testdata; -update writes them anew.
func TestGolden(t *testing.T) {
	for name, p := range map[string]Plan{
		"node-v4":   NodePlan(NodeConfig{TUN: "ztun-node", MTU: 1500}),
		"node-dual": NodePlan(NodeConfig{TUN: "ztun-node", IPv6: true}),
		"pod-v4":    PodPlan(PodConfig{Addrs: addrs("10.1.0.2"), TUN: "ztun0", NodeTUN: "ztun-node", MTU: 1500}),
		"pod-v6":    PodPlan(PodConfig{Addrs: addrs("fd00::2"), TUN: "ztun0", NodeTUN: "ztun-node", MTU: 1400}),
		"inside":    InsidePlan(PodConfig{Addrs: addrs("10.1.0.2", "fd00::2"), TUN: "ztun0", MTU: 1500}),
		"pod-dual":  PodPlan(PodConfig{Addrs: addrs("10.1.0.2", "fd00::2"), TUN: "ztun0", NodeTUN: "ztun-node"}),
	} {
		path := filepath.Join("testdata", name+".golden")
		got := p.String()
		if flag.Lookup("update").Value.String() == "true" {
			if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if got != string(want) {
			t.Errorf("%s: got\n%swant\n%s", name, got, want)
		}
	}
}

func TestMain(m *testing.M) {
	flag.Bool("update", false, "write the golden files")
	flag.Parse()
	os.Exit(m.Run())
}

// TestPlanOrder: an `unreachable` route stands before any other route to the pod and the pod's default routes come
// last, so that backwards it is as good.
func TestPlanOrder(t *testing.T) {
	steps := PodPlan(PodConfig{Addrs: addrs("10.1.0.2", "fd00::2"), TUN: "ztun0", NodeTUN: "ztun-node"}).Steps
	unreachable := 0
	for i, s := range steps {
		r, ok := s.Do.(Route)
		if !ok {
			continue
		}
		switch {
		case r.Type == Unreachable:
			unreachable++
		case s.Where == Node && unreachable < 2:
			t.Errorf("step %d, %q, before the unreachable routes", i, s.Do)
		case s.Where == Pod && i < len(steps)-2:
			t.Errorf("step %d, %q, is not at the end", i, s.Do)
		}
	}
}

func TestCheckPod(t *testing.T) {
	attached := []PodConfig{{Name: "default/a", Addrs: addrs("10.1.0.2", "fd00::2")}}
	for _, c := range []struct {
		addrs []netip.Addr
		want  string // "" is no error
	}{
		{addrs("10.1.0.3"), ""},
		{addrs("fd00::3"), ""},
		{addrs("10.1.0.3", "fd00::3"), ""},
		{nil, "has no address"},
		{addrs("10.1.0.3", "10.1.0.4"), "more than one address of a family (10.1.0.4)"},
		{addrs("10.1.0.2"), "address 10.1.0.2 is in use by pod default/a"},
		{addrs("10.1.0.3", "fd00::2"), "address fd00::2 is in use by pod default/a"},
		{addrs("0.0.0.0"), "cannot be a pod's address"},
		{addrs("::"), "cannot be a pod's address"},
		{addrs("127.0.0.1"), "cannot be a pod's address"},
		{addrs("::1"), "cannot be a pod's address"},
		{addrs("224.0.0.1"), "cannot be a pod's address"},
		{addrs("255.255.255.255"), "cannot be a pod's address"},
		{addrs("169.254.0.1"), "cannot be a pod's address"},
		{addrs("fe80::1%eth0"), "cannot be a pod's address"},
		{addrs("::ffff:10.1.0.3"), "cannot be a pod's address"},
		{[]netip.Addr{{}}, "cannot be a pod's address"},
	} {
		err := CheckPod(attached, PodConfig{Name: "default/b", Addrs: c.addrs})
		if c.want == "" {
			if err != nil {
				t.Errorf("%v: %v", c.addrs, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "default/b") {
			t.Errorf("%v: %v, want %q", c.addrs, err, c.want)
		}
		if strings.Contains(c.want, "in use") != errors.Is(err, unix.EADDRINUSE) {
			t.Errorf("%v: %v matches EADDRINUSE: %v", c.addrs, err, errors.Is(err, unix.EADDRINUSE))
		}
	}
}
