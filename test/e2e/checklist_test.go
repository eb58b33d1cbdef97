package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"ztun/test/lab"
	"ztun/test/load"
)

// wantExit waits for a daemon's end.
func wantExit(t *testing.T, d *lab.Daemon, limit time.Duration, want int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if code, err := d.Wait(ctx); err != nil || code != want {
		t.Fatalf("exit code %d, %v; want %d within %v\n%s", code, err, want, limit, d.Log())
	}
}

// TestChecklist: assertions of the two checklists (test/checklist) about listeners, start and end that no other test
// proves: dataplane 1, 2, 4, 106 and 151, controlplane 95, 96 and 99.
func TestChecklist(t *testing.T) {
	m := newMesh(t, meshOptions{env: map[string]string{"CONNECTION_TERMINATION_DEADLINE": "120s"}})
	dial := func(ns *lab.NS, to string) load.DialResult {
		ctx, cancel := context.WithTimeout(m.ctx, 10*time.Second)
		defer cancel()
		return load.DialOnce(ctx, load.Target{Addr: to, Dial: ns.Dial})
	}
	refused := func(what string, ns *lab.NS, to string) {
		t.Helper()
		if r := dial(ns, to); r.OK || r.Errno != econnrefused {
			t.Errorf("%s: %+v", what, r)
		}
	}
	// 1: 15008 is answered on the pod's address; 15001 and 15006 are names of what is captured; no SOCKS5.
	if r := dial(m.h1.NS, lab.HostPort(m.a.V4(), 15008)); !r.OK {
		t.Errorf("1: %+v", r)
	}
	for _, port := range []string{"15001", "15006", "15080"} {
		refused("1: port "+port, m.a.NS, "127.0.0.1:"+port)
	}

	// 106: while n2 has open connections to finish, they go on. Its pods are nobody else's, so that new ones are served.
	open, err := load.Idle(m.ctx, target(m.a.NS, m.c.V4()), 2)
	must(t, err)
	defer open.Close()
	must(t, m.N2.Daemon.Signal(syscall.SIGTERM))
	time.Sleep(2 * time.Second)
	_, err = load.WhoAmI(m.ctx, target(m.a.NS, m.c.V4()))
	must(t, err)
	must(t, open.Check())
	if !m.N2.Daemon.Running() {
		t.Fatal("106: ended with connections in flight")
	}
	open.Close()
	wantExit(t, m.N2.Daemon, 30*time.Second, 0)

	// 95: the second SIGINT does not wait for what is open.
	plain, err := load.Idle(m.ctx, target(m.a.NS, m.h1.V4()), 2)
	must(t, err)
	defer plain.Close()
	must(t, m.N1.Daemon.Signal(syscall.SIGINT))
	time.Sleep(500 * time.Millisecond)
	if !m.N1.Daemon.Running() {
		t.Fatal("95: one SIGINT ended it at once, with connections in flight")
	}
	must(t, plain.Check())
	must(t, m.N1.Daemon.Signal(syscall.SIGINT))
	wantExit(t, m.N1.Daemon, 10*time.Second, 0)
	plain.Close()

	// 2: SOCKS5 where it is wanted, on the pod's loopback alone.
	m.start(m.N1, map[string]string{"UNSTABLE_ENABLE_SOCKS5": "true", "CONNECTION_TERMINATION_DEADLINE": "120s"})
	if r := dial(m.a.NS, "127.0.0.1:15080"); !r.OK {
		t.Errorf("2: %+v", r)
	}
	refused("2: from another pod", m.b.NS, lab.HostPort(m.a.V4(), 15080))
	refused("2: from outside", m.h1.NS, lab.HostPort(m.a.V4(), 15080))

	// 151: without connections the end is prompt.
	must(t, m.N1.Daemon.Signal(syscall.SIGTERM))
	wantExit(t, m.N1.Daemon, 20*time.Second, 0)

	// 4 and controlplane 96: a port that is taken ends the start, with its number.
	for _, at := range []string{"127.0.0.1:15000", "[::]:15020", "[::]:15021", "[::]:15008"} {
		port := netip.MustParseAddrPort(at).Port()
		ln, err := m.N1.NS.Listen("tcp", at)
		must(t, err)
		d, err := m.StartDaemon(m.ctx, m.N1, lab.DaemonOptions{NoWait: true})
		must(t, err)
		wantExit(t, d, 20*time.Second, 1)
		if log := d.Log(); !strings.Contains(log, fmt.Sprint(port)) || !strings.Contains(log, "address already in use") {
			t.Errorf("%s is taken: %s", at, log)
		}
		ln.Close()
	}

	// controlplane 99: so does a workload file that cannot be used, with the line.
	must(t, m.WriteWorldBytes([]byte("services:\n- {name: s, namespace: n, hostname: h, vips: []}\n")))
	d, err := m.StartDaemon(m.ctx, m.N1, lab.DaemonOptions{NoWait: true})
	must(t, err)
	wantExit(t, d, 20*time.Second, 2)
	if log := d.Log(); !strings.Contains(log, `line 2: services[0]: "ports" is missing`) {
		t.Errorf("99: %s", log)
	}
	must(t, m.WriteWorld(m.DefaultWorld()))
	m.start(m.N1, nil)
}
