package interop

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"ztun/admin/ca"
	"ztun/test/interop/rig"
	"ztun/test/lab"
)

// TestDaemon has the same programs talk to real daemons across two nodes: curl on a plain host of node 1 calls pod b
// of node 2, and pod a of node 1 calls a plain host of node 2, where Node serves HBONE.
func TestDaemon(t *testing.T) {
	lab.Require(t)
	ctx, cancel := context.WithTimeout(t.Context(), 4*rig.Wait)
	defer cancel()
	curl(t)
	bin, err := lab.Build(ctx, t.TempDir(), "./cmd/ztun")
	must(t, err)
	w := lab.ForTest(t, lab.Options{Bin: bin})
	a, err := w.AddPod(w.N1, lab.Pod{Name: "a"})
	must(t, err)
	b, err := w.AddPod(w.N2, lab.Pod{Name: "b"})
	must(t, err)
	h1, err := w.AddHost(w.N1, "h1")
	must(t, err)
	h2, err := w.AddHost(w.N2, "h2")
	must(t, err)
	f := w.DefaultWorld()
	for i := range f.Workloads {
		if f.Workloads[i].Name == "h2" { // whose HBONE is Node's
			f.Workloads[i].Protocol, f.Workloads[i].TrustDomain, f.Workloads[i].ServiceAccount = "HBONE", "cluster.local", "node"
		}
	}
	f.Policies = []lab.Policy{{
		Name: "denied-port", Namespace: "default", Scope: "Namespace", Action: "Deny",
		Rules: [][][]map[string]any{{{{"destinationPorts": []int{rig.DeniedPort}}}}},
	}}
	must(t, w.WriteWorld(f))
	for _, n := range w.Nodes() {
		_, err := w.StartDaemon(ctx, n, lab.DaemonOptions{})
		must(t, err)
	}
	for _, p := range w.Pods() {
		must(t, w.Attach(ctx, p))
	}
	dir, err := w.CADir(ctx)
	must(t, err)
	authority, err := ca.LoadDir(dir)
	must(t, err)

	t.Run("curl", func(t *testing.T) {
		pem := rig.WritePEM(t, rig.Issue(t, authority, rig.ID("client")))
		call := func(t *testing.T, ip netip.Addr, pem rig.PEM, stdin io.Reader, args ...string) outcome {
			t.Helper()
			all := append([]string{"ip", "netns", "exec", h1.NS.Name, curl(t)},
				proxyArgs(lab.HostPort(ip, lab.HBONEPort), pem)...)
			cmd := command(ctx, append(all, args...)...)
			cmd.Stdin = stdin
			return run(t, cmd)
		}
		for _, ip := range b.IPs {
			family := map[bool]string{true: "IPv4", false: "IPv6"}[ip.Is4()]
			ln, err := b.NS.Listen("tcp", lab.HostPort(ip, 9000))
			must(t, err)
			app := web(t, ln, nil)
			t.Run("download "+family, func(t *testing.T) {
				o := call(t, ip, pem, nil, bulkURL(app, bulk, 1))
				o.succeeded(t)
				if o.length != bulk || o.hash != rig.BulkHash(bulk, 1) {
					t.Errorf("%d bytes arrived, SHA-256 %s", o.length, o.hash)
				}
			})
			t.Run("upload "+family, func(t *testing.T) {
				o := call(t, ip, pem, rig.Bulk(bulk, 2), "--upload-file", "-", fmt.Sprintf("http://%v/sink", app))
				o.succeeded(t)
				if want := fmt.Sprintf("%d %s <nil>", bulk, rig.BulkHash(bulk, 2)); string(o.stdout) != want {
					t.Errorf("application got %q, want %q", o.stdout, want)
				}
			})
			for dst, status := range map[netip.AddrPort]int{at(ip, rig.DeniedPort): 401, at(ip, 9): 503,
				at(a.IPs[0], 9000): 400} {
				t.Run(fmt.Sprintf("refused with %d %s", status, family), func(t *testing.T) {
					o := call(t, ip, pem, nil, "--trace-config", "h2-proxy", fmt.Sprintf("http://%v/", dst))
					if want := fmt.Sprintf("got http status: %d\n", status); o.exit != 56 || !strings.Contains(o.verbose, want) {
						t.Errorf("exit code %d, want 56; trace lacks %q\n%s", o.exit, want, tail(o.verbose))
					}
				})
			}
			t.Run("without certificate "+family, func(t *testing.T) {
				if o := call(t, ip, rig.PEM{}, nil, bulkURL(app, 10, 1)); o.exit == 0 || o.length != 0 {
					t.Errorf("served: exit code %d, %d bytes", o.exit, o.length)
				}
			})
		}
		if log := w.N2.Daemon.Log(); !strings.Contains(log, `src.identity="spiffe://cluster.local/ns/default/sa/client"`) {
			t.Errorf("the access log does not name curl's identity")
		}
	})

	t.Run("node", func(t *testing.T) {
		pem := rig.WritePEM(t, rig.Issue(t, authority, rig.ID("node")))
		for _, ip := range h2.IPs {
			t.Run(map[bool]string{true: "IPv4", false: "IPv6"}[ip.Is4()], func(t *testing.T) {
				s := startNode(t, []string{"ip", "netns", "exec", h2.NS.Name}, object{"host": ip.String(), "port": rig.Port,
					"pem": pem})
				ln, err := h2.NS.Listen("tcp", lab.HostPort(ip, 9000))
				must(t, err)
				defer ln.Close()
				served := make(chan struct{})
				go func() {
					defer close(served)
					if c, err := ln.Accept(); err == nil {
						rig.Echo(c.(*net.TCPConn))
						c.Close()
					}
				}()
				c, err := a.NS.Dial(ctx, "tcp", lab.HostPort(ip, 9000))
				must(t, err)
				defer c.Close()
				c.SetDeadline(time.Now().Add(limit))
				must(t, rig.Exchange(c.(*net.TCPConn), large, 3))
				<-served
				if got := s.requests(); len(got) != 1 || got[0] != lab.HostPort(ip, 9000) {
					t.Errorf("node was asked for %q", got)
				}
				if got := s.complaints(); len(got) > 0 {
					t.Errorf("node complains: %q", got)
				}
			})
		}
	})
	// Both daemons must have survived.
	for _, n := range w.Nodes() {
		if log := n.Daemon.Log(); strings.Contains(log, "panic") || bytes.Contains([]byte(log), []byte("DATA RACE")) {
			t.Errorf("daemon of %s: %s", n.Name, tail(log))
		}
	}
}
