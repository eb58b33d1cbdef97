package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"ztun/test/lab"
	"ztun/test/load"
)

// start has a command run as a workload of his until the test ends, and waits until it has said until.
func (r *rootless) start(ns *lab.NS, until string, args ...string) *waiter {
	r.t.Helper()
	return r.startWith(ns, nil, until, args...)
}

// startWith is start with a file as standard input.
func (r *rootless) startWith(ns *lab.NS, stdin *os.File, until string, args ...string) *waiter {
	r.t.Helper()
	out := waitFor(until)
	cmd := r.cmd(r.knowledge(), "", args...)
	cmd.Stdout, cmd.Stderr = out, out
	if stdin != nil {
		cmd.Stdin = stdin
	}
	p, err := r.Start(ns, cmd)
	must(r.t, err)
	r.t.Cleanup(func() {
		p.Signal(syscall.SIGTERM)
		select {
		case <-p.Done():
		case <-time.After(30 * time.Second):
			r.t.Errorf("%v does not end by SIGTERM", args)
			p.Kill()
		}
	})
	select {
	case <-out.seen:
	case <-p.Done():
		r.t.Fatalf("%v ended: %v: %s", args, p.Err(), out)
	case <-time.After(30 * time.Second):
		r.t.Fatalf("%v did not say %q: %s", args, until, out)
	}
	return out
}

// TestRunReached: without root, a command is reached over HBONE at a port of the user's host that its record announces,
// in plaintext at ports that he publishes, each as policy lets it; the application sees who calls.
func TestRunReached(t *testing.T) {
	record := func(name string, ips ...string) lab.Workload {
		return lab.Workload{UID: "lab//v1/Pod/own/" + name, Name: name, Namespace: "own", ServiceAccount: name,
			TrustDomain: "cluster.local", WorkloadIPs: ips, Protocol: "HBONE", Services: map[string]map[uint16]uint16{}}
	}
	served, looped := record("served", "10.91.66.4", "fd91:0:0:66::4"), record("looped", "10.91.66.5", "fd91:0:0:66::5")
	looped.MeshAddresses = []string{"127.0.0.1:15028"}
	allow := func(what map[string]any) [][]map[string]any { return [][]map[string]any{{what}} }
	policies := []lab.Policy{{Name: "who", Namespace: "own", Scope: "Namespace", Action: "Allow", Rules: [][][]map[string]any{
		allow(map[string]any{"principals": []map[string]string{{"Exact": "cluster.local/ns/default/sa/a"}}}),
		allow(map[string]any{"namespaces": []map[string]string{{"Exact": "own"}}}),
		allow(map[string]any{"destinationPorts": []uint16{9002}})}}}
	m := newMesh(t, meshOptions{})
	for _, ip := range m.h1.IPs {
		served.MeshAddresses = append(served.MeshAddresses, netip.AddrPortFrom(ip, 15018).String())
	}
	f := m.DefaultWorld()
	f.Workloads = append(f.Workloads, served, looped)
	f.Policies = policies
	m.teach(f)
	r := newRootless(t, m)
	b, err := os.ReadFile(bins.ztload)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(r.dir, "ztload"), b, 0o755))
	as := func(name, ips string, args ...string) []string {
		return append([]string{"--namespace", "own", "--name", name, "--service-account", name, "--ip", ips}, args...)
	}
	const server = "10.91.66.4,fd91:0:0:66::4"
	r.start(m.h1.NS, `"listening"`, as("served", server, "-p", "18000:9000", "--publish", "18002:9002", "--",
		r.dir+"/ztload", "serve", "-listen", ":9000,:9002")...)
	r.start(m.h1.NS, `"listening"`, as("looped", "10.91.66.5,fd91:0:0:66::5", "--", r.dir+"/ztload", "serve")...)

	who := func(ns *lab.NS, to string) (string, error) {
		w, err := load.WhoAmI(m.ctx, load.Target{Addr: to, Dial: ns.Dial})
		return w.Peer, err
	}
	families(t, func(t *testing.T, v4 bool) {
		own := pick([]netip.Addr{netip.MustParseAddr("10.91.66.4"), netip.MustParseAddr("fd91:0:0:66::4")}, v4)
		moves := func(ns *lab.NS, to string) {
			t.Helper()
			if x := load.Transfer(m.ctx, load.Target{Addr: to, Dial: ns.Dial}, 16<<20, 16<<20, 1); !x.OK {
				t.Errorf("to %s: %+v", to, x)
			}
		}
		sees := func(ns *lab.NS, to string, client netip.Addr) {
			t.Helper()
			got, err := who(ns, to)
			if at, perr := netip.ParseAddrPort(got); err != nil || perr != nil || at.Addr() != client {
				t.Errorf("at %s the application sees %q, want %s (%v)", to, got, client, err)
			}
		}
		sees(m.a.NS, lab.HostPort(own, 9000), pick(m.a.IPs, v4))
		if got, err := who(m.b.NS, lab.HostPort(own, 9000)); err == nil {
			t.Errorf("whom policy forbids it is told %q", got)
		}
		moves(m.a.NS, lab.HostPort(own, 9000))
		host := pick(m.h1.IPs, v4)
		sees(m.h2.NS, lab.HostPort(host, 18002), pick(m.h2.IPs, v4))
		moves(m.h2.NS, lab.HostPort(host, 18002))
		if got, err := who(m.h2.NS, lab.HostPort(host, 18000)); err == nil {
			t.Errorf("in plaintext, which policy forbids, it is told %q", got)
		}
		// Two of one host, one of which is announced on its loopback; it has no client there that could be answered.
		to := pick([]netip.Addr{netip.MustParseAddr("10.91.66.5"), netip.MustParseAddr("fd91:0:0:66::5")}, v4)
		standsFor := map[bool]string{true: "192.0.0.8", false: "64:ff9b::c000:8"}[v4]
		got, err := r.run(m.h1.NS, "", as("served", server, "--", r.dir+"/ztload", "whoami", "-to", lab.HostPort(to, 9000))...)
		if err != nil || !strings.Contains(got, standsFor) {
			t.Errorf("over the host's loopback the application sees %q, want %s (%v)", got, standsFor, err)
		}
	})
	// What stands in the way is said.
	for want, args := range map[string][]string{
		"--mesh-port 15018: listen tcp": {"--mesh-port", "15018"},
		"choose another port":           {"-p", "18000"},
		"this host has no such address": {"-p", "192.0.2.1:18003"},
		"want an IP address":            {"-p", "nowhere:1"},
	} {
		if _, err := r.run(m.h1.NS, "", as("served", server, append(args, "--", "true")...)...); err == nil ||
			!strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", args, err, want)
		}
	}
	r.start(m.h1.NS, `peers do not find the mesh port 15019 that is listened at: the workload's record sends them to [`,
		as("served", server, "--mesh-port", fmt.Sprint(15019), "--", "sleep", "60")...)
}
