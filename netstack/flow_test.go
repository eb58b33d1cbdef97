package netstack

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"ztun/proxy/refusal"
	"ztun/tun"
)

// The client's connect must fail at once, with the errno that the refusal stands for.
func TestRefuse(t *testing.T) {
	// What gVisor makes of them as a client; the kernel's view is in tun_test.go.
	for _, r := range []struct {
		r  refusal.Way
		v4 syscall.Errno
		v6 syscall.Errno
	}{
		{refusal.Reset, syscall.ECONNREFUSED, syscall.ECONNREFUSED},
		{refusal.HostUnreachable, syscall.EHOSTUNREACH, syscall.ENETUNREACH}, // see knownICMP6
		{refusal.AdminProhibited, syscall.EHOSTUNREACH, syscall.ENETUNREACH},
		{refusal.NetUnreachable, syscall.ENETUNREACH, syscall.ENETUNREACH},
	} {
		t.Run(r.r.String(), func(t *testing.T) {
			eachWay(t, func(t *testing.T, j *joined, fam family) {
				go func() { (<-j.flows).Refuse(r.r) }()
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				defer cancel()
				_, err := j.client.DialApp(ctx, fam.client, fam.server)
				want := r.v4
				if fam.name == "ipv6" {
					want = r.v6
				}
				if !errors.Is(err, want) {
					t.Errorf("got %v, want %v", err, want)
				}
				// The client may hear before the place is given back.
				eventually(t, "no flow pending", func() bool { return j.server.Stats().InFlight == 0 })
				if n := j.server.Stats(); n.Refused != 1 {
					t.Errorf("stats %+v", n)
				}
			})
		})
	}
}

// TestCloseWaitsForVerdict: what decides on a flow may be another goroutine than OnFlow's, and slower. Close returns
// when it has given the flow's place back, not before.
func TestCloseWaitsForVerdict(t *testing.T) {
	flows, returned := make(chan *Flow, 1), make(chan struct{})
	s, w := newWire(t, Config{CloseTimeout: time.Minute, OnFlow: func(f *Flow) {
		flows <- f
		for !f.decided.Load() {
			time.Sleep(time.Millisecond)
		}
		close(returned)
	}})
	w.syn("10.1.0.2:500", "10.8.0.1:80", 1)
	f := <-flows
	f.places.mu.Lock() // where a prompt verdict has to pass
	verdict := make(chan struct{})
	go func() {
		f.Refuse(refusal.Reset)
		close(verdict)
	}()
	<-returned
	closed := make(chan struct{})
	go func() {
		s.Close()
		close(closed)
	}()
	select {
	case <-closed:
		t.Error("Close returned before the verdict was given")
	case <-time.After(100 * time.Millisecond):
	}
	f.places.mu.Unlock()
	<-closed
	holdsNothing(t, s)
	<-verdict
}

// TestCloseBeforeAccept: a flow whose Accept begins when the stack is about to close does not wait for its client.
func TestCloseBeforeAccept(t *testing.T) {
	flows, errs := make(chan *Flow, 1), make(chan error, 1)
	release := make(chan struct{})
	s, w := newWire(t, Config{CloseTimeout: time.Minute, OnFlow: func(f *Flow) {
		flows <- f
		<-release
		_, err := f.Accept()
		errs <- err
	}})
	s.handshakePatience = time.Hour
	w.syn("10.1.0.2:500", "10.8.0.1:80", 1)
	f := <-flows
	closed := make(chan struct{})
	go func() {
		s.Close()
		close(closed)
	}()
	eventually(t, "the hop closed", func() bool {
		s.app.mu.Lock()
		defer s.app.mu.Unlock()
		return s.app.closed
	})
	eventually(t, "the flow told", func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.closing
	})
	close(release)
	select {
	case err := <-errs:
		if err == nil {
			t.Error("accepted by a stack that is closed")
		}
	case <-time.After(patience):
		t.Fatal("Accept waits for a client of a stack that is closed")
	}
	<-closed
	holdsNothing(t, s)
}

// A silent refusal leaves the next SYN to be a new flow.
func TestRefuseSilent(t *testing.T) {
	j := join(t, true, nil)
	go func() {
		(<-j.flows).Refuse(refusal.Silent)
		(<-j.flows).Refuse(refusal.Reset)
	}()
	if _, err := j.client.DialApp(context.Background(), families[0].client, families[0].server); !errors.Is(err,
		syscall.ECONNREFUSED) {
		t.Errorf("dial: %v", err)
	}
	if st := j.server.Stats(); st.Flows != 2 {
		t.Errorf("flows %d, want 2", st.Flows)
	}
}

// TestSilence: once it is silent a stack refuses nobody, neither by a verdict that comes late nor for a SYN that comes
// while it closes.
func TestSilence(t *testing.T) {
	flows := make(chan *Flow, 3)
	s, w := newWire(t, Config{CloseTimeout: time.Minute, OnFlow: func(f *Flow) {
		flows <- f
		for !f.decided.Load() {
			time.Sleep(time.Millisecond)
		}
	}})
	w.syn("10.1.0.2:500", "10.8.0.1:80", 1)
	asked := <-flows
	w.syn("10.1.0.2:501", "10.8.0.1:80", 1)
	(<-flows).Refuse(refusal.Reset)
	if _, to, th := w.next(patience); th == nil || to.Port() != 501 || !th.Flags().Contains(header.TCPFlagRst) {
		t.Fatalf("the answer to a SYN that is refused before: %v %v", to, th)
	}
	s.Silence()
	w.syn("10.1.0.2:502", "10.8.0.1:80", 1)
	(<-flows).Refuse(refusal.HostUnreachable)
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		s.Close()
	}()
	eventually(t, "no new flows", func() bool {
		s.flows.mu.Lock()
		defer s.flows.mu.Unlock()
		return s.flows.stopped
	})
	read := s.Stats().App.RxPackets
	w.syn("10.1.0.2:503", "10.8.0.1:80", 1)
	eventually(t, "the last SYN read", func() bool { return s.Stats().App.RxPackets > read })
	asked.Refuse(refusal.Reset)
	<-closed
	if from, to, th := w.next(50 * time.Millisecond); th != nil {
		t.Errorf("%v to %v: %v", from, to, th.Flags())
	}
}

// While a flow is pending, retransmitted SYNs are ignored, and the accept that
// comes later still works.
func TestDuplicateSYN(t *testing.T) {
	j := join(t, true, nil)
	got := make(chan error, 1)
	go func() {
		c, err := j.client.DialApp(context.Background(), families[0].client, families[0].server)
		if err == nil {
			c.Close()
		}
		got <- err
	}()
	f := <-j.flows
	for j.server.Stats().Duplicates == 0 { // gVisor repeats the SYN after a second
		time.Sleep(10 * time.Millisecond)
	}
	c, err := f.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := <-got; err != nil {
		t.Fatal(err)
	}
	if st := j.server.Stats(); st.Flows != 1 {
		t.Errorf("flows %d, want 1", st.Flows)
	}
}

func TestFlowDecidedOnce(t *testing.T) {
	var second error
	done := make(chan struct{})
	a, b := memPair(1500, true)
	client := startStack(t, Config{Addrs: []netip.Addr{families[0].client.Addr()}, App: a})
	startStack(t, Config{Addrs: []netip.Addr{families[0].client.Addr()}, App: b, OnFlow: func(f *Flow) {
		f.Refuse(refusal.Reset)
		f.Refuse(refusal.HostUnreachable)
		_, second = f.Accept()
		close(done)
	}})
	if _, err := client.DialApp(context.Background(), families[0].client, families[0].server); !errors.Is(err,
		syscall.ECONNREFUSED) {
		t.Errorf("dial: %v", err)
	}
	<-done
	if !errors.Is(second, ErrDecided) {
		t.Errorf("second decision: %v", second)
	}
}

// A handler that forgets its flow must not leave the client waiting.
func TestFlowUndecided(t *testing.T) {
	a, b := memPair(1500, true)
	client := startStack(t, Config{Addrs: []netip.Addr{families[0].client.Addr()}, App: a})
	startStack(t, Config{Addrs: []netip.Addr{families[0].client.Addr()}, App: b, OnFlow: func(*Flow) {}})
	if _, err := client.DialApp(context.Background(), families[0].client, families[0].server); !errors.Is(err,
		syscall.ECONNREFUSED) {
		t.Errorf("dial: %v", err)
	}
}

func TestInbound(t *testing.T) {
	j := join(t, true, func(_, server *Config) {
		server.Addrs, server.UplinkIsApp = append(server.Addrs, families[0].server.Addr(), families[1].server.Addr()), true
	})
	for _, tc := range []struct {
		dst  string
		want bool
	}{{"10.2.0.3:80", true}, {"10.2.0.4:80", false}, {"[fd00:2::3]:80", true}, {"[fd00:2::4]:80", false}} {
		dst := netip.MustParseAddrPort(tc.dst)
		src := families[0].client
		if dst.Addr().Is6() {
			src = families[1].client
		}
		go func() {
			f := <-j.flows
			if f.Inbound() != tc.want || f.Dst() != dst || f.Src().Addr() != src.Addr() {
				t.Errorf("%v: inbound %v, src %v, dst %v", tc.dst, f.Inbound(), f.Src(), f.Dst())
			}
			f.Refuse(refusal.Reset)
		}()
		if _, err := j.client.DialApp(context.Background(), src, dst); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dial: %v", err)
		}
	}
}

func TestDialErrors(t *testing.T) {
	j := join(t, true, nil)
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	// Nobody decides on the flow: the dial ends with its context.
	_, err := j.client.DialApp(ctx, families[0].client, families[0].server)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("deadline: %v", err)
	}
	if te, ok := err.(interface{ Timeout() bool }); !ok || !te.Timeout() {
		t.Errorf("deadline is no timeout: %v", err)
	}
	if _, err := j.client.DialPlain(context.Background(), families[0].server); !errors.Is(err, syscall.ENETUNREACH) {
		t.Errorf("no uplink: %v", err)
	}
	if _, err := j.client.DialApp(context.Background(), families[0].client, families[1].server); !errors.Is(err,
		syscall.EINVAL) {
		t.Errorf("mixed families: %v", err)
	}
}

func TestDialFixedPort(t *testing.T) {
	j := join(t, true, nil)
	fam := families[0]
	fam.client = netip.AddrPortFrom(fam.client.Addr(), 12345)
	a, b := j.pipe(t, fam)
	if b.RemoteAddrPort() != fam.client {
		t.Errorf("peer sees %v", b.RemoteAddrPort())
	}
	if _, err := j.client.DialApp(context.Background(), fam.client, fam.server); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("second dial from the same port: %v", err)
	}
	a.Close()
	b.Close()
}

// Close ends everything that waits, and returns.
func TestStackClose(t *testing.T) {
	before := runtime.NumGoroutine()
	a, b := memPair(1500, true)
	entered := make(chan struct{}, 8)
	client, err := New(Config{Addrs: []netip.Addr{families[0].client.Addr()}, App: a, OnFlow: func(*Flow) {}})
	if err != nil {
		t.Fatal(err)
	}
	conns := make(chan *Conn, 8)
	stop := make(chan struct{})
	server, err := New(Config{Addrs: []netip.Addr{families[0].client.Addr()}, App: b, OnFlow: func(f *Flow) {
		entered <- struct{}{}
		if f.Dst().Port() == 1 { // stays undecided
			<-stop
			return
		}
		c, err := f.Accept()
		if err == nil {
			conns <- c
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	wg.Go(func() {
		if err := client.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	wg.Go(func() {
		if err := server.Run(context.Background()); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	dst := families[0].server
	c, err := client.DialApp(context.Background(), families[0].client, dst)
	if err != nil {
		t.Fatal(err)
	}
	sc := <-conns
	<-entered
	errs := make(chan error, 4)
	go func() { _, err := c.Read(make([]byte, 1)); errs <- err }()
	go func() { _, err := sc.Read(make([]byte, 1)); errs <- err }()
	go func() {
		_, err := client.DialApp(context.Background(), families[0].client, netip.AddrPortFrom(dst.Addr(), 1))
		errs <- err
	}()
	<-entered
	close(stop)
	server.Close()
	cancel() // the other way to close
	for range 3 {
		if err := <-errs; err == nil {
			t.Error("a waiting call succeeded")
		}
	}
	wg.Wait()
	client.Close()
	if _, err := client.DialApp(context.Background(), families[0].client, dst); err == nil {
		t.Error("dial on a closed stack succeeded")
	}
	for end := time.Now().Add(patience); runtime.NumGoroutine() > before; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			buf := make([]byte, 1<<20)
			t.Fatalf("goroutines left: %d, before %d\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
		}
	}
}

// One device for two pods: packets find their stack by address, both can dial
// each other through the node, and what belongs to nobody is counted.
func TestUplink(t *testing.T) {
	nodeA, nodeB := memPair(1500, true)
	uplink := NewUplink(nodeA, nil, nil)
	upDone := make(chan error, 1)
	go func() { upDone <- uplink.Run(context.Background()) }()

	// The node: sends every packet back down, as a router between the pods.
	routerDone := make(chan struct{})
	go func() {
		defer close(routerDone)
		buf := make([]byte, 1<<16)
		var h tun.VNetHdr
		for {
			n, err := nodeB.ReadPacket(&h, [][]byte{buf})
			if err != nil {
				return
			}
			nodeB.WritePacket(&h, [][]byte{slices.Clone(buf[:n])})
		}
	}()

	type pod struct {
		s     *Stack
		app   *memDevice
		flows chan *Flow
	}
	mk := func(v4, v6 string) *pod {
		p := &pod{flows: make(chan *Flow, 4)}
		var dev *memDevice
		dev, p.app = memPair(1500, true)
		p.s = startStack(t, Config{
			Addrs: []netip.Addr{netip.MustParseAddr(v4), netip.MustParseAddr(v6)}, App: dev, Uplink: uplink,
			OnFlow: func(f *Flow) {
				c, err := f.Accept()
				if err != nil {
					t.Error(err)
					return
				}
				defer c.Close()
				if !f.Inbound() {
					t.Errorf("%v is not inbound", f.Dst())
				}
				fmt.Fprintf(c, "%v", f.Src().Addr())
			},
		})
		return p
	}
	p1, p2 := mk("10.1.0.2", "fd00:1::2"), mk("10.1.0.3", "fd00:1::3")
	for _, tc := range []struct {
		from *pod
		dst  string
		want string
	}{
		{p1, "10.1.0.3:80", "10.1.0.2"}, {p2, "10.1.0.2:80", "10.1.0.3"},
		{p1, "[fd00:1::3]:80", "fd00:1::2"}, {p2, "[fd00:1::2]:80", "fd00:1::3"},
	} {
		c, err := tc.from.s.DialPlain(context.Background(), netip.MustParseAddrPort(tc.dst))
		if err != nil {
			t.Fatal(err)
		}
		if got := readAll(t, c); string(got) != tc.want {
			t.Errorf("%s sees %q, want %q", tc.dst, got, tc.want)
		}
		c.Close()
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	p1.s.DialPlain(ctx, netip.MustParseAddrPort("10.1.0.9:80"))
	cancel()
	eventually(t, "a packet to nobody counted", func() bool { return uplink.Stats().RxUnknownDst > 0 })
	a, _ := memPair(1500, true)
	if _, err := New(Config{Addrs: []netip.Addr{netip.MustParseAddr("10.1.0.2")}, App: a, Uplink: uplink,
		OnFlow: func(*Flow) {}}); !errors.Is(err, ErrAddressTaken) {
		t.Errorf("same address twice: %v", err)
	}
	p1.s.Close()
	p2.s.Close()
	uplink.Close()
	if err := <-upDone; err != nil {
		t.Errorf("uplink: %v", err)
	}
	nodeB.Close()
	<-routerDone
	if err := nodeA.WritePacket(&tun.VNetHdr{}, nil); !errors.Is(err, os.ErrClosed) {
		t.Errorf("device of the closed uplink: %v", err)
	}
}

func TestConfig(t *testing.T) {
	a, _ := memPair(1500, true)
	good := Config{App: a, Addrs: []netip.Addr{netip.MustParseAddr("10.1.0.2")}, OnFlow: func(*Flow) {}}
	for name, mod := range map[string]func(*Config){
		"no device":   func(c *Config) { c.App = nil },
		"no address":  func(c *Config) { c.Addrs = nil },
		"loopback":    func(c *Config) { c.Addrs = []netip.Addr{netip.MustParseAddr("127.0.0.1")} },
		"zone":        func(c *Config) { c.Addrs = []netip.Addr{netip.MustParseAddr("fe80::1%eth0")} },
		"no handler":  func(c *Config) { c.OnFlow = nil },
		"small MTU":   func(c *Config) { c.MTU = 576 },
		"port range":  func(c *Config) { c.PortMin, c.PortMax = 5, 4 },
		"two uplinks": func(c *Config) { c.UplinkIsApp, c.Uplink = true, &Uplink{} },
	} {
		c := good
		mod(&c)
		if s, err := New(c); err == nil {
			s.Close()
			t.Errorf("%s: accepted", name)
		}
	}
}

// A stack that never ran gives everything back as well.
func TestCloseWithoutRun(t *testing.T) {
	a, _ := memPair(1500, true)
	s, err := New(Config{App: a, Addrs: []netip.Addr{families[0].client.Addr()}, OnFlow: func(*Flow) {}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	s.DialApp(ctx, families[0].client, families[0].server) // queues a SYN
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := s.Run(context.Background()); err != nil {
		t.Errorf("Run after Close: %v", err)
	}
}
