package browser

import (
	"context"
	"io"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/chromedp"

	"ztun/test/lab"
)

// forward takes connections on this machine's loopback to a port of a namespace's, as `kubectl port-forward` does.
func forward(t testing.TB, ns *lab.NS, to string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	var work sync.WaitGroup
	work.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			work.Go(func() {
				defer c.Close()
				up, err := ns.Dial(context.Background(), "tcp", to)
				if err != nil {
					return
				}
				defer up.Close()
				work.Go(func() { io.Copy(up, c); up.Close() })
				io.Copy(c, up)
			})
		}
	})
	t.Cleanup(func() { l.Close(); work.Wait() })
	return "http://" + l.Addr().String() + "/"
}

// world is two nodes with a pod each; a talks to c, and was refused once.
func world(t *testing.T) (*lab.World, context.Context) {
	t.Helper()
	lab.Require(t)
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	t.Cleanup(cancel)
	bin, err := lab.Build(ctx, t.TempDir(), "./cmd/ztun")
	must(t, err)
	w := lab.ForTest(t, lab.Options{Bin: bin})
	a, err := w.AddPod(w.N1, lab.Pod{Name: "a"})
	must(t, err)
	c, err := w.AddPod(w.N2, lab.Pod{Name: "c"})
	must(t, err)
	for _, n := range w.Nodes() {
		_, err := w.StartDaemon(ctx, n, lab.DaemonOptions{})
		must(t, err)
	}
	for _, p := range w.Pods() {
		must(t, w.Attach(ctx, p))
	}
	l, err := c.NS.Listen("tcp", ":9000")
	must(t, err)
	t.Cleanup(func() { l.Close() })
	conn, err := a.NS.Dial(ctx, "tcp", lab.HostPort(c.V4(), 9000))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	if refused, err := a.NS.Dial(ctx, "tcp", lab.HostPort(c.V4(), 9999)); err == nil {
		refused.Close()
		t.Fatal("nobody listens there")
	}
	return w, ctx
}

// TestRealNode: the page of a running daemon shows its pod, the connection, its tunnel, its certificate, and what was
// refused and why.
func TestRealNode(t *testing.T) {
	w, _ := world(t)
	url := forward(t, w.N1.NS, "127.0.0.1:15000")
	b := open(t) // ends before what it is connected to
	b.looks(url, "real", "light")
	text := get(b, chromedp.TextContent(chromedp.CSS("main")))
	for _, want := range []string{"default/a", "from a file", "called as 10.91.2.2:9000", "default/c", "HBONE",
		"spiffe://cluster.local/ns/default/sa/a", "valid", "10.91.2.2:15008", "failed", "refused"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not on the page: %s", want, text)
		}
	}
	b.eventually("rates are measured", `document.querySelectorAll("svg.spark").length === 2`)
	b.quiet("live")
}

// TestControlPage: the page of a running `ztun control` shows what is published, and that a node that has joined is
// not there.
func TestControlPage(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	t.Cleanup(cancel)
	dir := t.TempDir()
	bin, err := lab.Build(ctx, dir, "./cmd/ztun")
	must(t, err)
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.CommandContext(ctx, bin, args...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v %s", args, err, out)
		}
	}
	control := filepath.Join(dir, "control")
	run("control", "init", control)
	run("control", "join", "--dir", control, "--node", "worker-1", "--out", filepath.Join(dir, "cred"))
	port, err := net.Listen("tcp", "127.0.0.1:0") // one that is free
	must(t, err)
	address := port.Addr().String()
	port.Close()
	cmd := exec.CommandContext(ctx, bin, "control", "--dir", control, "--listen", "127.0.0.1:0", "--admin", address)
	must(t, cmd.Start())
	t.Cleanup(func() { cancel(); cmd.Wait() })
	url := "http://" + address + "/"
	for range 300 {
		if resp, err := http.Get(url + "healthz/ready"); err == nil {
			resp.Body.Close()
			if resp.StatusCode == 200 {
				break
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	b := open(t)
	b.looks(url, "control", "light", "dark")
	text := get(b, chromedp.TextContent(chromedp.CSS("main")))
	for _, want := range []string{"worker-1", "not connected", "0 of 1 connected", "v1", "Certificates issued"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not on the page: %s", want, text)
		}
	}
}
