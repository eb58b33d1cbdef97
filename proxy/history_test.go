package proxy

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

// remembering makes proxies that remember n ended connections.
func remembering(n int) func(*world, int, *Options) {
	return func(_ *world, _ int, o *Options) { o.Config.Remember = n }
}

// TestLiveAndEnded follows one connection through both pods' books: who with whom, over which tunnel, how many bytes,
// and what became of it.
func TestLiveAndEnded(t *testing.T) {
	w := newWorldWith(t, remembering(4))
	w.listen(appB, echo)
	app, _, done, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.96.0.10:80")
	if err != nil {
		t.Fatal(err)
	}
	app.Write([]byte("ping"))
	app.Read(make([]byte, 4))
	const a, b = "spiffe://cluster.local/ns/default/sa/a", "spiffe://cluster.local/ns/default/sa/b"
	var live [2]ConnectionInfo
	eventually(t, "four bytes both ways in both books", func() bool {
		for i, p := range w.proxies {
			all := slices.Collect(p.Live())
			if len(all) != 1 {
				return false
			}
			live[i] = all[0]
		}
		return live[0].Sent == 4 && live[0].Received == 4 && live[1].Sent == 4 && live[1].Received == 4
	})
	for i, dir := range []string{"outbound", "inbound"} {
		l := live[i]
		if l.Direction != dir || l.State != "open" || l.Protocol != "HBONE" || l.Source.Identity != a ||
			l.Destination.Identity != b ||
			l.Source.Workload != "a" || l.Destination.Workload != "b" || i == 0 && l.Service != "b.default.svc.cluster.local" ||
			time.Since(l.Start) > time.Minute {
			t.Errorf("%s: %+v", dir, l)
		}
		if !l.TunnelLocal.IsValid() || !l.TunnelRemote.IsValid() {
			t.Errorf("%s: no tunnel: %+v", dir, l)
		}
	}
	if live[0].Called != netip.MustParseAddrPort("10.96.0.10:80") || live[1].Destination.Addr != appB {
		t.Errorf("called %v, application %v", live[0].Called, live[1].Destination.Addr)
	}
	app.CloseWrite()
	<-done
	app.Close()
	w.settle()
	for i, p := range w.proxies {
		all := slices.Collect(p.Ended())
		if len(all) != 1 || len(slices.Collect(p.Live())) != 0 {
			t.Fatalf("pod %d remembers %d", i, len(all))
		}
		if e := all[0]; e.State != "ended" || e.Outcome != OutcomeSuccess || e.Reason != "" || e.Flag != "-" ||
			e.End.Before(e.Start) ||
			e.Source.Identity != a || e.Destination.Identity != b || e.Sent != 4 || e.Received != 4 {
			t.Errorf("pod %d: %+v", i, e)
		}
	}
}

// TestEndedOutcomes: what did not end well says so in a word, and why.
func TestEndedOutcomes(t *testing.T) {
	w := newWorldWith(t, remembering(8))
	w.listen(appB, echo)
	deny := loadView(t, func(s string) string {
		s = strings.Replace(s, "  workloadIps: [\"10.91.2.2\"]\n",
			"  workloadIps: [\"10.91.2.2\"]\n  authorizationPolicies: [default/no]\n", 1)
		return s + "- {name: no, namespace: default, scope: WorkloadSelector, action: Deny, dryRun: false, rules: " +
			"[[[{destinationPorts: [9000]}]]]}\n"
	})
	app, _, done, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.91.2.2:9000")
	if err != nil {
		t.Fatal(err)
	}
	defer app.Close()
	app.Write([]byte("x"))
	app.Read(make([]byte, 1))
	w.know.publish(deny)
	w.proxies[1].Recheck() // cuts it
	<-done
	w.connect(w.proxies[0].ServeOutbound, srcA, "10.91.2.2:9000")                // 401
	w.connect(w.proxies[0].ServeOutbound, srcA, "10.91.2.2:9001")                // nobody listens
	w.connect(w.proxies[0].ServeOutbound, srcA, "10.96.0.12:80")                 // early denial
	w.connect(w.proxies[1].ServePassthrough, "192.0.2.9:4000", "10.91.2.2:9000") // plaintext, denied
	w.settle()
	has := func(pod int, direction, outcome, reason string) {
		t.Helper()
		eventually(t, fmt.Sprintf("pod %d: %s, %s, %q", pod, direction, outcome, reason), func() bool {
			for e := range w.proxies[pod].Ended() {
				if e.Direction == direction && e.Outcome == outcome && strings.Contains(e.Reason, reason) {
					return true
				}
			}
			return false
		})
	}
	has(0, "outbound", OutcomeCut, "stream reset by peer")
	has(1, "inbound", OutcomeCut, "connection closed due to policy change")
	has(0, "outbound", OutcomeDenied, "http status: 401 Unauthorized")
	has(1, "inbound", OutcomeDenied, "default/no")
	has(0, "outbound", OutcomeFailed, "http status: 503 Service Unavailable")
	has(1, "inbound", OutcomeFailed, "Connection refused")
	has(0, "outbound", OutcomeFailed, "no healthy upstream")
	has(1, "passthrough", OutcomeDenied, "default/no")
}

// TestHistoryIsBounded: as many are remembered as were asked for, the newest ones, and those that were turned down
// take no place of those that stood.
func TestHistoryIsBounded(t *testing.T) {
	h := history{newRing(3), newRing(3)}
	p := &Proxy{}
	add := func(port int, carried bool, err error) {
		c := &books{p: p, carried: carried, src: netip.AddrPortFrom(addrA, uint16(port)), labels: &p.unlabelled,
			start: time.Now()}
		reason := ""
		if err != nil {
			reason = err.Error()
		}
		h.remember(c, err, reason, FlagNone)
	}
	for i := range 10 {
		add(i, true, nil)
	}
	for i := range 1000 {
		add(1000+i, false, errors.New(strings.Repeat("x", 10*maxReason)))
	}
	p.history = h
	var ports []int
	for e := range p.Ended() {
		ports = append(ports, int(e.Source.Addr.Port()))
		if len(e.Reason) > maxReason {
			t.Errorf("a reason of %d bytes is kept", len(e.Reason))
		}
	}
	slices.Sort(ports)
	if want := []int{7, 8, 9, 1997, 1998, 1999}; !slices.Equal(ports, want) {
		t.Errorf("remembered are %v, want %v", ports, want)
	}
	p.history = history{newRing(0), newRing(0)}
	p.history.remember(&books{p: p, carried: true}, nil, "", FlagNone)
	if n := len(slices.Collect(p.Ended())); n != 0 {
		t.Errorf("%d remembered though nothing is to be", n)
	}
}

// TestConnectingIsListed: a connection that waits for its far side shows as such.
func TestConnectingIsListed(t *testing.T) {
	w := newWorldWith(t, remembering(1))
	release := make(chan struct{})
	w.dialMesh = func(netip.AddrPort) (net.Conn, error) { <-release; return nil, errors.New("gone") }
	f := &fakeFlow{t: t, src: netip.MustParseAddrPort(srcA), dst: appB, decided: make(chan struct{})}
	over := make(chan struct{})
	go func() { defer close(over); w.proxies[0].ServeOutbound(f) }()
	eventually(t, "the connection is listed", func() bool {
		for l := range w.proxies[0].Live() {
			return l.State == "connecting" && l.Direction == "outbound" && l.Source.Addr == f.src && l.Destination.Addr.Addr() ==
				addrB && !l.Start.IsZero()
		}
		return false
	})
	close(release)
	<-over
}

// TestReasonReachesTheOtherLog: the access line of who was refused says why, unless the refuser keeps it to itself.
func TestReasonReachesTheOtherLog(t *testing.T) {
	for _, send := range []bool{true, false} {
		w := newWorldWith(t, func(_ *world, _ int, o *Options) { o.Config.SendReason = send })
		w.connect(w.proxies[0].ServeOutbound, srcA, "10.91.2.2:7777") // denied by policy
		w.connect(w.proxies[0].ServeOutbound, srcA, "10.91.2.2:9001") // nobody listens
		w.settle()
		wants := []string{
			`error="http status: 401 Unauthorized: connection closed due to policy rejection: explicitly denied by: default/deny-7777"`,
			`error="http status: 503 Service Unavailable: connection failed: Connection refused (os error 111)"`,
		}
		if !send {
			wants = []string{`error="http status: 401 Unauthorized"`, `error="http status: 503 Service Unavailable"`}
		}
		lines := w.lines(0)
		for i, want := range wants {
			if len(lines) != 2 || !strings.Contains(lines[i], want) {
				t.Errorf("send %v: want %s in\n%s", send, want, strings.Join(lines, "\n"))
			}
		}
		w.stop()
	}
}

// TestRememberingIsFree: an orderly end that is remembered costs no memory.
func TestRememberingIsFree(t *testing.T) {
	h, p := history{newRing(8), newRing(8)}, &Proxy{}
	b := &books{p: p, carried: true, start: time.Now(), labels: &p.unlabelled}
	if n := testing.AllocsPerRun(100, func() { h.remember(b, nil, "", FlagNone) }); n > 0 {
		t.Errorf("%v allocations", n)
	}
}
