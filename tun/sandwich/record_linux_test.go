package sandwich

import (
	"errors"
	"os"
	"strings"
	"testing"

	"ztun/tun/netns"
	"ztun/tun/tuntest/nslab"
)

// Whoever was killed in the middle has left a record: by it alone, without a path, the pod is given back, S is gone,
// and a second time nothing happens. A pod whose namespace is gone loses S.
func TestRestore(t *testing.T) {
	for name, rules := range map[string]bool{"steered": false, "rules": true} {
		t.Run(name, func(t *testing.T) { restore(t, rules) })
	}
}

func restore(t *testing.T, rules bool) {
	node, pod, dir := nslab.New(t), nslab.New(t), t.TempDir()
	routedPod(t, node, pod)
	before := dump(t, pod)
	f, err := Read(pod.NS, "eth0")
	if err != nil {
		t.Fatal(err)
	}
	r := Record{Facts: f, Rules: rules}
	r.Dev, r.Ino = pod.ID()
	// short of the plan's last steps
	half := func(r Record, pod *netns.NS, short int) {
		t.Helper()
		s, err := netns.Create(r.Name())
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		t.Cleanup(func() { netns.Remove(r.Name()) })
		openTUNs(t, s)
		p, err := r.Plan()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Apply(t.Context(), Plan{p.Steps[:len(p.Steps)-short]}, Namespaces{s, pod}); err != nil {
			t.Fatal(err)
		}
		if err := r.Save(dir); err != nil {
			t.Fatal(err)
		}
	}
	half(r, pod.NS, 6)
	found, err := Find(dir, r.Dev, r.Ino)
	if err != nil || found == nil {
		t.Fatalf("the record: %v, %v", found, err)
	}
	for range 2 {
		if err := found.Restore(t.Context(), dir); err != nil {
			t.Fatal(err)
		}
		if after := dump(t, pod); after != before {
			t.Fatalf("before\n%s\nafter\n%s", before, after)
		}
	}
	if all, err := Records(dir); len(all) != 0 || err != nil {
		t.Errorf("left: %v, %v", all, err)
	}
	if _, err := os.Stat(netns.Dir + "/" + r.Name()); err == nil {
		t.Error("S is left")
	}
	half(r, pod.NS, 6)
	r.Ino++ // as if another lived there
	if err := os.Rename(found.file(dir), r.file(dir)); err != nil {
		t.Fatal(err)
	}
	if err := r.Restore(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(netns.Dir + "/" + r.Name()); err == nil {
		t.Error("S of a pod that is gone is left")
	}
	// The CNI's DEL: eth0 of the pod, which is ours, and with it what the pod's watch then ends in S; or its own.
	node2, pod2 := nslab.New(t), nslab.New(t)
	routedPod(t, node2, pod2)
	r.Dev, r.Ino = pod2.ID()
	half(r, pod2.NS, 0)
	pod2.IP(t, "link", "del", "eth0")
	s, err := netns.OpenName(r.Name())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(End(s, "eth0"), s.Close(), r.Restore(t.Context(), dir)); err != nil {
		t.Errorf("after a CNI's DEL: %v", err)
	}
	if _, err := os.Stat(netns.Dir + "/" + r.Name()); err == nil {
		t.Error("S is left after a CNI's DEL")
	}
	if all, err := Records(dir); len(all) != 0 || err != nil {
		t.Errorf("left: %v, %v", all, err)
	}
	if err := os.WriteFile(dir+"/ztun-1-2.json", []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Records(dir); err == nil || !strings.Contains(err.Error(), "ztun-1-2.json") {
		t.Errorf("a torn record: %v", err)
	}
}
