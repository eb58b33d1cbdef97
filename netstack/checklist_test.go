package netstack

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// TestSocketOptions: dataplane checklist 6 and 7 for the connections of the stacks (those on 15008 are the kernel's:
// package netns). Nagle is off and keepalive on for all: 180 s, 180 s, 9 towards the network; towards the pod's
// kernel we ask sooner (conn.go says why). The user timeout is the network's.
func TestSocketOptions(t *testing.T) {
	const userTimeout = 1800 * time.Second
	node, _ := memPair(1500, true)
	up := NewUplink(node, nil, nil)
	done := make(chan error, 1)
	go func() { done <- up.Run(context.Background()) }()
	t.Cleanup(func() { up.Close(); <-done })
	app, _ := memPair(1500, true)
	fam := families[0]
	s := startStack(t, Config{Addrs: []netip.Addr{fam.client.Addr()}, App: app, Uplink: up, UserTimeout: userTimeout})
	for _, want := range []struct {
		name           string
		h              *hop
		idle, interval time.Duration
		count          int
		user           time.Duration
	}{
		{"towards the pod", s.app, 30 * time.Second, 5 * time.Second, 3, 0},
		{"towards the network", s.up, 180 * time.Second, 180 * time.Second, 9, userTimeout},
	} {
		gs, err := want.h.stack()
		if err != nil {
			t.Fatal(err)
		}
		c := newConn(want.h, fam.client, fam.server)
		e, terr := gs.NewEndpoint(tcp.ProtocolNumber, ipv4.ProtocolNumber, &c.wq)
		if terr != nil {
			t.Fatal(terr)
		}
		ep := e.(*tcp.Endpoint)
		if err := c.start(ep); err != nil {
			t.Fatal(err)
		}
		var idle tcpip.KeepaliveIdleOption
		var interval tcpip.KeepaliveIntervalOption
		var user tcpip.TCPUserTimeoutOption
		for _, o := range []tcpip.GettableSocketOption{&idle, &interval, &user} {
			if terr := ep.GetSockOpt(o); terr != nil {
				t.Fatal(terr)
			}
		}
		count, terr := ep.GetSockOptInt(tcpip.KeepaliveCountOption)
		if terr != nil {
			t.Fatal(terr)
		}
		so := ep.SocketOptions()
		if !so.GetKeepAlive() || time.Duration(idle) != want.idle || time.Duration(interval) != want.interval ||
			count != want.count {
			t.Errorf("%s: keepalive %v, %v/%v/%d", want.name, so.GetKeepAlive(), time.Duration(idle),
				time.Duration(interval), count)
		}
		if so.GetDelayOption() {
			t.Errorf("%s: Nagle is on", want.name)
		}
		if time.Duration(user) != want.user {
			t.Errorf("%s: user timeout %v, want %v", want.name, time.Duration(user), want.user)
		}
		c.Close()
	}
}
