package e2e

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"ztun/test/lab"
)

// source serves endless bytes in a pod, and sink takes connections and reads nothing of them, until the test ends.
func (m *mesh) source(p *lab.Pod, port uint16) {
	m.listen(p, port, func(c net.Conn) {
		b := make([]byte, 64<<10)
		for {
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	})
}

func (m *mesh) sink(p *lab.Pod, port uint16) {
	m.listen(p, port, func(c net.Conn) {
		<-m.ctx.Done()
	})
}

// listen runs an application in a pod, one goroutine per connection. All end with the test.
func (m *mesh) listen(p *lab.Pod, port uint16, app func(net.Conn)) {
	m.t.Helper()
	var ln net.Listener
	m.inside(p.NS, func() {
		var err error
		ln, err = net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(netip.AddrPortFrom(p.V4(), port)))
		must(m.t, err)
	})
	var mu sync.Mutex
	open, over := map[net.Conn]struct{}{}, false
	m.t.Cleanup(func() {
		ln.Close()
		mu.Lock()
		defer mu.Unlock()
		over = true
		for c := range open {
			c.Close()
		}
	})
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.(*net.TCPConn).SetReadBuffer(4096)
			mu.Lock()
			open[c] = struct{}{}
			if over {
				c.Close()
			}
			mu.Unlock()
			go app(c)
		}
	}()
}

// dialIn connects from a pod, with a receive buffer that fills at once.
func (m *mesh) dialIn(ctx context.Context, p *lab.Pod, to netip.AddrPort) (c *net.TCPConn, err error) {
	m.inside(p.NS, func() {
		var d net.Dialer
		d.Timeout = 5 * time.Second
		var nc net.Conn
		if nc, err = d.DialContext(ctx, "tcp4", to.String()); err == nil {
			c = nc.(*net.TCPConn)
			c.SetReadBuffer(4096)
		}
	})
	return c, err
}

// TestAttackPaused: an application pauses more downloads, and a server more uploads, than fill a tunnel's windows. The
// bystander is another connection between the same pods, on the same tunnel.
func TestAttackPaused(t *testing.T) {
	m := newMesh(t, meshOptions{})
	m.source(m.c, 9004)
	m.sink(m.c, 9003)
	m.attack(attackOptions{Name: "paused readers", From: m.a, Attack: func(ctx context.Context) {
		var open []*net.TCPConn
		var wg sync.WaitGroup
		for i := range 24 {
			port := []uint16{9004, 9003}[i%2]
			c, err := m.dialIn(ctx, m.a, netip.AddrPortFrom(m.c.V4(), port))
			if err != nil {
				t.Errorf("connection %d: %v", i, err)
				break
			}
			open = append(open, c)
			if port == 9003 {
				wg.Go(func() {
					b := make([]byte, 64<<10)
					for {
						if _, err := c.Write(b); err != nil {
							return
						}
					}
				})
			}
		}
		<-ctx.Done()
		for _, c := range open {
			c.SetLinger(0)
			c.Close()
		}
		wg.Wait()
	}})
}

// TestAttackDeaf: a client fills connections to an application that does not read and resets them, again and again. The
// application lives on, and keeps nothing in the daemons.
func TestAttackDeaf(t *testing.T) {
	m := newMesh(t, meshOptions{})
	m.sink(m.c, 9003)
	m.attack(attackOptions{Name: "resets to a deaf application", Attack: func(ctx context.Context) {
		b := make([]byte, 1<<20)
		resets := 0
		for ctx.Err() == nil {
			var wg sync.WaitGroup
			for range 20 {
				c, err := m.dialIn(ctx, m.a, netip.AddrPortFrom(m.c.V4(), 9003))
				if err != nil {
					continue
				}
				resets++
				wg.Go(func() {
					c.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
					for {
						if _, err := c.Write(b); err != nil {
							break
						}
					}
					c.SetLinger(0)
					c.Close()
				})
			}
			wg.Wait()
		}
		if resets < 60 {
			t.Errorf("%d resets are no attack", resets)
		}
	}})
}

// TestAttackMemory: a thousand connections of one pod read nothing of what they asked for. Without a budget each costs
// both daemons 0.45 MiB; what is left beyond the pod's budget is what a connection needs at least (a stream's window of
// 64 KiB, small buffers, goroutines) and what the collector lets lie. The daemons say that the bound was reached.
func TestAttackMemory(t *testing.T) {
	const conns, most = 1000, 330 << 20
	m := newMesh(t, meshOptions{env: map[string]string{"ZTUN_POD_MEMORY": "64Mi"}})
	m.source(m.c, 9004)
	m.attack(attackOptions{Name: "connections that read nothing", Tunnels: 40, Attack: func(ctx context.Context) {
		before := m.held()
		var open []*net.TCPConn
		for len(open) < conns && ctx.Err() == nil {
			c, err := m.dialIn(ctx, m.a, netip.AddrPortFrom(m.c.V4(), 9004))
			if err != nil {
				if ctx.Err() == nil {
					t.Errorf("connection %d: %v", len(open), err)
				}
				break
			}
			open = append(open, c)
			time.Sleep(3 * time.Millisecond) // it is about what they hold, not about how fast they come
		}
		<-ctx.Done()
		for i, now := range m.held() {
			grew := now.rss - before[i].rss
			t.Logf("%s: %d connections, %d MiB", now.d.Node.Name, len(open), grew>>20)
			if grew > most {
				t.Errorf("%s grew by %d MiB for %d connections that read nothing, want %d at most", now.d.Node.Name, grew>>20,
					len(open), most>>20)
			}
			if x, err := now.d.Metrics(m.ctx); err != nil || x.Sum("ztun_bounded_total") == 0 {
				t.Errorf("%s does not say that memory is tight (%v)", now.d.Node.Name, err)
			}
		}
		for _, c := range open {
			c.SetLinger(0)
			c.Close()
		}
	}})
}
