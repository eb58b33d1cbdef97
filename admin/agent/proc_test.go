package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const (
	uidA = "0f0bc1d4-5ac2-4d7b-9a0b-7f3a2b1c0d9e"
	uidB = "1f0bc1d4-5ac2-4d7b-9a0b-7f3a2b1c0d9e"
	hash = "d41d8cd98f00b204e9800998ecf8427e"
)

func TestPodOf(t *testing.T) {
	systemd := strings.ReplaceAll(uidA, "-", "_")
	for _, c := range []struct{ cgroups, want string }{
		{"0::/kubepods/burstable/pod" + uidA + "/abc\n", uidA},
		{"0::/kubepods/pod" + uidA + "\n", uidA},
		{"12:pids:/x\n1:name=systemd:/kubepods/besteffort/pod" + uidA + "/abc\n0::/\n", uidA},
		{"0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + systemd +
			".slice/cri-containerd-0123.scope\n", uidA},
		{"0::/kubepods.slice/kubepods-pod" + systemd + ".slice/crio-0123.scope", uidA},
		{"0::/../../kubepods/pod" + uidA + "/abc\n", uidA},
		{"0::/kubepods/burstable/pod" + hash + "/abc\n", hash}, // a static pod
		{"0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod" + systemd + ".slice/x", ""},
		{"0::/system.slice/containerd.service\n", ""},
		{"0::/kubepods/burstable/podman/abc\n", ""},
		{"0::/kubepods/pod" + uidA + "x/abc\n", ""},
		{"0::/kubepods/pod" + strings.ToUpper(uidA) + "/abc\n", ""},
		{"0::/kubepods/pod" + uidA[:35] + "\n", ""},
		{"0::/kubepods/pod" + strings.Repeat("-", 36) + "\n", ""},
		{"", ""},
		{"pod", ""},
	} {
		if got := podOf(c.cgroups); got != c.want {
			t.Errorf("%q: %q, want %q", c.cgroups, got, c.want)
		}
	}
}

func TestStartOf(t *testing.T) {
	good := "7 (a) b (c)) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 1000 1"
	if n, ok := startOf([]byte(good)); n != 4711 || !ok {
		t.Error(n, ok)
	}
	for _, bad := range []string{"", "7 (a) S 1", strings.Replace(good, "4711", "x", 1)} {
		if n, ok := startOf([]byte(bad)); ok {
			t.Errorf("%q: %d", bad, n)
		}
	}
}

// procs is a proc file system, whose namespaces are files.
type procs struct {
	*Procs
	t *testing.T
}

func newProcs(t *testing.T) procs {
	p := procs{NewProcs(t.TempDir()), t}
	p.add("1", "", 0, "host")
	return p
}

func (p procs) add(pid, uid string, start int, netns string) {
	p.t.Helper()
	dir, ns := filepath.Join(p.dir, pid), filepath.Join(p.dir, "namespace-"+netns)
	cgroup := "0::/init.scope\n"
	if uid != "" {
		cgroup = "0::/kubepods/pod" + uid + "/c\n"
	}
	if err := errors.Join(
		os.MkdirAll(filepath.Join(dir, "ns"), 0o755),
		os.WriteFile(filepath.Join(dir, "cgroup"), []byte(cgroup), 0o644),
		os.WriteFile(filepath.Join(dir, "stat"), fmt.Appendf(nil, "%s (x) S 1 7 7 0 -1 0 1 2 3 4 5 6 7 8 20 0 1 0 %d 0",
			pid, start), 0o644),
		os.WriteFile(ns, []byte(netns), 0o644),
		os.RemoveAll(filepath.Join(dir, "ns", "net")),
		os.Symlink(ns, filepath.Join(dir, "ns", "net")),
	); err != nil {
		p.t.Fatal(err)
	}
}

func (p procs) is(uid, want string) {
	p.t.Helper()
	f, err := p.Open(uid)
	if err != nil {
		if want != "" || !errors.Is(err, ErrNoProcess) {
			p.t.Errorf("%s: %v, want %q", uid, err, want)
		}
		return
	}
	defer f.Close()
	b := make([]byte, 100)
	n, _ := f.Read(b)
	if string(b[:n]) != want {
		p.t.Errorf("%s: %q, want %q", uid, b[:n], want)
	}
}

// The oldest process' namespace is the pod's; the host's never is; a process that has ended or is another's by now is
// not taken for what a scan has seen.
func TestProcs(t *testing.T) {
	p := newProcs(t)
	p.is(uidA, "")
	p.add("20", uidA, 300, "own")
	p.add("30", uidA, 200, "pod")
	p.add("40", uidA, 100, "host") // no namespace of a pod's, however old
	p.add("50", "", 50, "other")
	p.add("60", uidB, 100, "b")
	if err := os.WriteFile(filepath.Join(p.dir, "meminfo"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	p.is(uidA, "pod")
	p.is(uidB, "b")
	p.add("30", uidB, 400, "pod") // the number is used again
	p.is(uidA, "own")
	if err := os.RemoveAll(filepath.Join(p.dir, "60")); err != nil {
		t.Fatal(err)
	}
	p.is(uidB, "pod")
	p.add("30", uidB, 400, "again") // it has another namespace
	p.is(uidB, "again")
	if err := os.RemoveAll(filepath.Join(p.dir, "1")); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Open(hash); err == nil || errors.Is(err, ErrNoProcess) {
		t.Error("the host's own namespace is not known:", err)
	}
}

func TestOpenNetns(t *testing.T) {
	f, err := OpenNetns("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	for _, path := range []string{"/proc/self/ns/mnt", "/dev/null", "/proc/self/stat", t.TempDir(), "/nowhere"} {
		if f, err := OpenNetns(path); err == nil || !strings.Contains(err.Error(), path) {
			t.Error(path, f, err)
		}
	}
}
