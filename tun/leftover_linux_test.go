package tun

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztun/tun/tuntest/nslab"
)

// TestNothingLeft: neither a failed Open nor many opens and closes leave descriptors behind.
func TestNothingLeft(t *testing.T) {
	ns := nslab.New(t)
	ns.IP(t, "link", "add", "veth0", "type", "veth", "peer", "name", "veth1")
	count := func() int {
		e, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(e)
	}
	run := func() {
		for _, plain := range []bool{false, true} {
			dev, err := Open(Options{Name: "zt0", NetNS: ns.NS, Plain: plain})
			if err != nil {
				t.Fatal(err)
			}
			dev.Close()
		}
		if _, err := Open(Options{Name: "veth0", NetNS: ns.NS}); err == nil {
			t.Fatal("opened a veth")
		}
	}
	run() // the runtime's own descriptors (its poller) come with the first use
	before := count()
	for range 20 {
		run()
	}
	if after := count(); after > before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

// TestHolderKilled: a process that holds a persistent device is killed; the device stays without carrier and can be
// taken over at once.
func TestHolderKilled(t *testing.T) {
	ns := nslab.New(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("ip", "netns", "exec", ns.Name, exe, "-test.run=^TestHolder$")
	cmd.Env = append(os.Environ(), "ZTUN_TEST_HOLD=zt0")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatalf("the holder did not begin: %v", err)
	}
	if _, err := Open(Options{Name: "zt0", NetNS: ns.NS, Persistent: true}); !errors.Is(err, unix.EBUSY) {
		t.Errorf("a held device: %v", err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	dev, err := Open(Options{Name: "zt0", NetNS: ns.NS, Persistent: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(dev.Close(), Remove(ns.NS, "zt0")); err != nil {
		t.Error(err)
	}
}

// TestHolder is TestHolderKilled's other process.
func TestHolder(t *testing.T) {
	name := os.Getenv("ZTUN_TEST_HOLD")
	if name == "" {
		return
	}
	if _, err := Open(Options{Name: name, Persistent: true}); err != nil {
		t.Fatal(err)
	}
	fmt.Print("+")
	time.Sleep(time.Minute)
}
