package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"ztun/tun/sandwich"
)

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// One TCP exchange from host to host over both nodes, each family; the capture between the nodes must show exactly it.
func TestHostsReachEachOtherAndTheCaptureTells(t *testing.T) {
	w := ForTest(t, Options{Prefix: "ztlab"})
	ctx := testContext(t)
	h1, err := w.AddHost(w.N1, "h1")
	if err != nil {
		t.Fatal(err)
	}
	h2, err := w.AddHost(w.N2, "h2")
	if err != nil {
		t.Fatal(err)
	}
	for _, dst := range h2.IPs {
		t.Run(fmt.Sprintf("v4=%v", dst.Is4()), func(t *testing.T) {
			l, err := h2.NS.Listen("tcp", HostPort(dst, 9000))
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			peer := make(chan net.Addr, 1)
			go func() {
				c, err := l.Accept()
				if err != nil {
					return
				}
				defer c.Close()
				peer <- c.RemoteAddr()
				io.Copy(c, c)
			}()
			capt, err := w.Capture(w.N1.NS, "eth0", CaptureOptions{Immediate: true})
			if err != nil {
				t.Fatal(err)
			}
			c, err := h1.NS.Dial(ctx, "tcp", HostPort(dst, 9000))
			if err != nil {
				t.Fatal(err)
			}
			marker := []byte("this is plaintext")
			c.Write(marker)
			c.(*net.TCPConn).CloseWrite()
			got, err := io.ReadAll(c)
			c.Close()
			if err != nil || !bytes.Equal(got, marker) {
				t.Fatalf("echo: %q, %v", got, err)
			}
			src := h1.V4()
			if !dst.Is4() {
				src = h1.V6()
			}
			if p := (<-peer).(*net.TCPAddr).AddrPort().Addr().Unmap(); p != src {
				t.Errorf("the server saw %v, want %v", p, src)
			}
			ps, err := capt.Stop()
			if err != nil {
				t.Fatal(err)
			}
			flow := ps.Between(src, dst).TCP()
			if len(flow.SYNs()) != 1 || len(flow.SYNACKs()) != 1 || len(flow.RSTs()) != 0 || !flow.Contains(marker) {
				t.Errorf("capture:\n%v", ps)
			}
			if got := flow.ServerPorts(); len(got) != 1 || got[0] != 9000 {
				t.Errorf("server ports %v", got)
			}
			// A closed port is refused, and seen as such.
			if _, err := h1.NS.Dial(ctx, "tcp", HostPort(dst, 9001)); err == nil || !strings.Contains(err.Error(), "refused") {
				t.Errorf("closed port: %v", err)
			}
		})
	}
	for _, ns := range []*NS{w.N1.NS, w.N2.NS, h1.NS} {
		found, err := ns.Netfilter()
		if err != nil || len(found) != 0 {
			t.Errorf("%s: netfilter %v, %v", ns.Name, found, err)
		}
	}
}

// The check for netfilter must be able to find some; iptables or nft may be missing, then the test has nothing to
// look at but says so.
func TestNetfilterIsFound(t *testing.T) {
	w := ForTest(t, Options{Prefix: "ztlab"})
	ctx := testContext(t)
	ns, err := w.AddNS("nf")
	if err != nil {
		t.Fatal(err)
	}
	var tried bool
	for _, cmd := range [][]string{{"nft", "add", "table", "inet", "ztlab"}, {"iptables", "-A", "INPUT", "-j", "ACCEPT"}} {
		if _, err := exec.LookPath(cmd[0]); err != nil {
			continue
		}
		tried = true
		if out, err := w.Run(ctx, ns, cmd...); err != nil {
			t.Logf("%v: %v %s", cmd, err, out)
			continue
		}
		found, err := ns.Netfilter()
		if err != nil || len(found) == 0 {
			t.Errorf("after %v: %v, %v", cmd, found, err)
		}
		return
	}
	if !tried {
		if err := nftAddTable(ns); err != nil {
			t.Logf("this kernel has no nf_tables (%v), so there is nothing that could be found", err)
			return
		}
		found, err := ns.Netfilter()
		if err != nil || len(found) == 0 {
			t.Errorf("after a table was added by netlink: %v, %v", found, err)
		}
	}
}

// A child that a process has left behind with its output (as `git daemon` does) holds up neither who waits for the
// process nor the end of the world, and does not outlive it.
func TestLeftChildrenHoldNothingUp(t *testing.T) {
	Require(t)
	w, err := New(Options{Prefix: "ztleft"})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	var ended, killed syncBuffer
	start := func(script string, out *syncBuffer) *Process {
		p, err := w.Start(w.N1.NS, Cmd{Args: []string{"sh", "-c", script}, Stdout: out})
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	done := func(what string, c <-chan struct{}) {
		select {
		case <-c:
		case <-time.After(time.Minute):
			t.Fatal(what + " is held up by a child")
		}
	}
	p := start("sleep 300 & echo $!", &ended)
	done("the end of a process", p.Done())
	if err := p.Err(); !errors.Is(err, exec.ErrWaitDelay) {
		t.Errorf("it ended with %v, want to be told that its output has not", err)
	}
	start("sleep 300 & echo $!; wait", &killed)
	for end := time.Now().Add(time.Minute); killed.String() == ""; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("no child")
		}
	}
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}()
	done("the end of the world", closed)
	var pid int
	fmt.Sscan(killed.String(), &pid)
	for end := time.Now().Add(time.Minute); syscall.Kill(pid, 0) == nil; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("child %d outlives the world", pid)
		}
	}
	fmt.Sscan(ended.String(), &pid)
	syscall.Kill(pid, syscall.SIGKILL) // its process was gone before the world was
}

// A test process that is killed leaves nothing: the reaper removes its world.
func TestReaperAfterKill(t *testing.T) {
	Require(t)
	if os.Getenv("LAB_TEST_VICTIM") == "1" {
		w, err := New(Options{Prefix: "ztvictim"})
		if err != nil {
			t.Fatal(err)
		}
		p, err := w.Start(w.N1.NS, Cmd{Args: []string{"sleep", "300"}})
		if err != nil {
			t.Fatal(err)
		}
		fmt.Printf("VICTIM %s %d\n", w.ID, p.Pid())
		time.Sleep(5 * time.Minute)
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestReaperAfterKill$", "-test.v")
	cmd.Env = append(os.Environ(), "LAB_TEST_VICTIM=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var id string
	var pid int
	buf := make([]byte, 4096)
	var text string
	for id == "" {
		n, err := out.Read(buf)
		text += string(buf[:n])
		if i := strings.Index(text, "VICTIM "); i >= 0 && strings.Contains(text[i:], "\n") {
			fmt.Sscanf(text[i:], "VICTIM %s %d", &id, &pid)
		}
		if err != nil {
			t.Fatalf("victim: %v: %s", err, text)
		}
	}
	cmd.Process.Kill()
	cmd.Wait()
	deadline := time.Now().Add(20 * time.Second)
	for {
		left, _ := filepath.Glob("/var/run/netns/" + id + "*")
		_, derr := os.Stat(filepath.Join(baseDir, id))
		perr := syscall.Kill(pid, 0)
		if len(left) == 0 && os.IsNotExist(derr) && perr == syscall.ESRCH {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("left after 20 s: namespaces %v, directory %v, sleep %v", left, derr, perr)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// A world whose owner and reaper are both gone is removed by the next one; a living one is left alone.
func TestScavenger(t *testing.T) {
	w := ForTest(t, Options{Prefix: "ztlab"})
	dead := filepath.Join(baseDir, fmt.Sprintf("ztdead-%d-1", os.Getpid()))
	ns := filepath.Base(dead) + "-n1"
	if err := os.Mkdir(dead, 0o755); err != nil {
		t.Fatal(err)
	}
	os.WriteFile(filepath.Join(dead, "lock"), nil, 0o600)
	os.WriteFile(filepath.Join(dead, "netns"), []byte(ns+"\nnever-made\n"), 0o600)
	if out, err := exec.Command("ip", "netns", "add", ns).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	// What a daemon keeps for a steered pod goes with the pod's namespace.
	var st syscall.Stat_t
	if err := syscall.Stat("/var/run/netns/"+ns, &st); err != nil {
		t.Fatal(err)
	}
	kept := sandwich.Record{Dev: st.Dev, Ino: st.Ino}.Name()
	if out, err := exec.Command("ip", "netns", "add", kept).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	if err := Scavenge(t.Logf); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{ns, kept} {
		if _, err := os.Stat("/var/run/netns/" + name); err == nil {
			t.Errorf("the dead world's namespace %s is still there", name)
		}
	}
	if _, err := os.Stat(dead); err == nil {
		t.Error("the dead world's directory is still there")
	}
	if _, err := os.Stat("/var/run/netns/" + w.N1.NS.Name); err != nil {
		t.Error("the living world was scavenged")
	}
}

func TestParseMetrics(t *testing.T) {
	m, err :=
		ParseMetrics("# HELP a Help.\n# TYPE a counter\na_total{x=\"1\",y=\"q\\\"u,}=\"} 3\na_total{x=\"2\",y=\"\"} 4\nb " +
			"1.5e3\n# EOF\n")
	if err != nil {
		t.Fatal(err)
	}
	if got := m.Sum("a_total"); got != 7 {
		t.Errorf("sum %v", got)
	}
	if got := m.Sum("a_total", "x=1", `y=q"u,}=`); got != 3 {
		t.Errorf("sum of x=1: %v", got)
	}
	if m.Types["a"] != "counter" || m.Sum("b") != 1500 || m.Series[0].Labels[1].Name != "y" {
		t.Errorf("%+v", m)
	}
	for _, bad := range []string{"x", "x{a=1} 2", "x{a=\"1} 2", "x{} y"} {
		if _, err := ParseMetrics(bad); err == nil {
			t.Errorf("%q was parsed", bad)
		}
	}
}
