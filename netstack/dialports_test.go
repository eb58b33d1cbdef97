package netstack

import (
	"context"
	"errors"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// No two calls of one destination have a port, however many there are at once, and whether they are dials or probes;
// another destination has all of them; and they come back.
func TestDialPorts(t *testing.T) {
	const n = 4
	for _, fam := range families {
		s, _ := newWire(t, Config{PortMin: 40000, PortMax: 40000 + n - 1}) // nobody answers
		src := netip.AddrPortFrom(fam.server.Addr(), 0)
		dst := netip.AddrPortFrom(fam.client.Addr(), 8080)
		ctx, stop := context.WithCancel(context.Background())
		ended := make(chan error, 4*n)
		dial := func(dst netip.AddrPort) {
			go func() {
				_, err := s.DialApp(ctx, src, dst)
				ended <- err
			}()
		}
		next := func() error {
			select {
			case err := <-ended:
				return err
			case <-time.After(patience):
				t.Fatal("a dial goes on that has no port")
			}
			return nil
		}
		probed := make(chan error, 1)
		go func() { probed <- s.ProbeApp(ctx, src.Addr(), dst) }()
		eventually(t, "a probe under way", func() bool { return s.probes.n.Load() == 1 })
		for range 2 * n {
			dial(dst)
		}
		for range n + 1 {
			if err := next(); !errors.Is(err, syscall.EADDRINUSE) {
				t.Errorf("one more than there are ports: %v", err)
			}
		}
		other := netip.AddrPortFrom(dst.Addr(), 8081)
		for range n {
			dial(other)
		}
		ids := map[netip.AddrPort]map[uint16]bool{dst: {}, other: {}}
		eventually(t, "connections from all ports", func() bool { return len(s.app.gs.RegisteredEndpoints()) == 2*n-1 })
		for _, e := range s.app.gs.RegisteredEndpoints() {
			id := e.(*tcp.Endpoint).TransportEndpointInfo.ID
			ids[addrPort(id.RemoteAddress, id.RemotePort)][id.LocalPort] = true
		}
		s.probes.mu.Lock()
		for id := range s.probes.by {
			ids[dst][id.LocalPort] = true
		}
		s.probes.mu.Unlock()
		if len(ids[dst]) != n || len(ids[other]) != n {
			t.Errorf("ports of the two destinations: %v, %v", ids[dst], ids[other])
		}
		stop()
		for range 2*n - 1 {
			if err := next(); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		}
		if err := <-probed; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		eventually(t, "ports that come back", func() bool {
			s.app.ports.mu.Lock()
			defer s.app.ports.mu.Unlock()
			return len(s.app.ports.drawn) == 0 && len(s.app.gs.RegisteredEndpoints()) == 0
		})
	}
}

// Nobody calls himself: a SYN to its own port would be taken for its answer.
func TestDialNotItself(t *testing.T) {
	for _, fam := range families {
		s, _ := newWire(t, Config{PortMin: 40000, PortMax: 40000})
		src := netip.AddrPortFrom(fam.client.Addr(), 0)
		if _, err := s.DialApp(context.Background(), src, netip.AddrPortFrom(src.Addr(), 40000)); !errors.Is(err,
			syscall.EADDRINUSE) {
			t.Error(err)
		}
	}
}
