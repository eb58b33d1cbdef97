package netstack

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"

	"ztun/proxy/refusal"
	"ztun/tun"
)

// memDevice is one end of an in-memory link: what one end writes the other
// reads. A full queue blocks the writer.
type memDevice struct {
	name    string
	mtu     int
	offload bool
	in      chan memPacket
	peer    *memDevice
	closed  chan struct{}
	once    sync.Once
	// filter sees every packet written and may drop it.
	filter func(b []byte) bool
}

type memPacket struct {
	h tun.VNetHdr
	b []byte
}

func memPair(mtu int, offload bool) (a, b *memDevice) {
	mk := func(name string) *memDevice {
		return &memDevice{name: name, mtu: mtu, offload: offload, in: make(chan memPacket, 256), closed: make(chan struct{})}
	}
	a, b = mk("mem-a"), mk("mem-b")
	a.peer, b.peer = b, a
	return a, b
}

func (d *memDevice) Name() string { return d.name }
func (d *memDevice) MTU() int     { return d.mtu }
func (d *memDevice) Offload() tun.Offload {
	o := d.offload
	return tun.Offload{VNetHdr: o, CSum: o, TSO4: o, TSO6: o}
}
func (d *memDevice) SetMTU(int) error { return nil }
func (d *memDevice) Close() error {
	d.once.Do(func() { close(d.closed) })
	return nil
}

func (d *memDevice) ReadPacket(h *tun.VNetHdr, bufs [][]byte) (int, error) {
	select {
	case <-d.closed:
		return 0, os.ErrClosed
	case p := <-d.in:
		return p.read(h, bufs)
	}
}

func (d *memDevice) TryReadPacket(h *tun.VNetHdr, bufs [][]byte) (int, error) {
	select {
	case p := <-d.in:
		return p.read(h, bufs)
	default:
		return 0, tun.ErrNothing
	}
}

func (p memPacket) read(h *tun.VNetHdr, bufs [][]byte) (int, error) {
	*h = p.h
	b := p.b
	for _, to := range bufs {
		b = b[copy(to, b):]
	}
	if len(b) > 0 {
		return 0, tun.ErrShortBuffer
	}
	return len(p.b), nil
}

func (d *memDevice) WritePacket(h *tun.VNetHdr, bufs [][]byte) error {
	var b []byte
	for _, p := range bufs {
		b = append(b, p...)
	}
	if err := h.Validate(len(b)); err != nil {
		return err
	}
	if !d.offload && !h.IsZero() {
		return tun.ErrNoOffload
	}
	if !d.offload && len(b) > d.mtu {
		return errors.New("packet longer than the MTU")
	}
	if d.filter != nil && !d.filter(b) {
		return nil
	}
	select {
	case <-d.closed:
		return os.ErrClosed
	default:
	}
	select {
	case <-d.closed:
		return os.ErrClosed
	case <-d.peer.closed:
		return nil
	case d.peer.in <- memPacket{*h, b}:
		return nil
	}
}

// write injects a packet from outside a stack.
func (d *memDevice) inject(b []byte) { d.WritePacket(&tun.VNetHdr{}, [][]byte{b}) }

// patience is how long a test waits for what has to come: a machine that others use may stand still for a second.
const patience = 30 * time.Second

// eventually waits for what others do in their own time.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// startStack makes and runs a stack that is closed with the test.
func startStack(t testing.TB, cfg Config) *Stack {
	t.Helper()
	if cfg.OnFlow == nil {
		cfg.OnFlow = func(f *Flow) { f.Refuse(refusal.Reset) }
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Run(context.Background()) }()
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(patience):
			t.Error("Run did not return after Close")
		}
		holdsNothing(t, s)
	})
	return s
}

// holdsNothing checks a stack that is closed: no flow awaits a verdict, and none has a place.
func holdsNothing(t testing.TB, s *Stack) {
	t.Helper()
	if n := s.flows.inFlight(); n != 0 {
		t.Errorf("%d flows are pending after Close", n)
	}
	for what, p := range map[string]*places{"opened": s.flows.opened, "arriving": s.flows.arriving} {
		if n := p.known.Used() + p.strange.Used(); n != 0 {
			t.Errorf("%d places of %s flows are taken after Close", n, what)
		}
	}
}

// family is one IP version's addresses.
type family struct {
	name           string
	client, server netip.AddrPort
}

var families = []family{
	{"ipv4", netip.MustParseAddrPort("10.1.0.2:0"), netip.MustParseAddrPort("10.2.0.3:80")},
	{"ipv6", netip.MustParseAddrPort("[fd00:1::2]:0"), netip.MustParseAddrPort("[fd00:2::3]:80")},
}

// joined are two stacks back to back: dial from one, accept in the other.
type joined struct {
	client, server *Stack
	flows          chan *Flow
}

// join makes two stacks: client is the pod's kernel, server our stack for the pod, so that both have the pod's
// addresses. Flows arrive on j.flows; OnFlow returns when they are decided.
func join(t testing.TB, offload bool, mod func(client, server *Config)) *joined {
	a, b := memPair(1500, offload)
	j := &joined{flows: make(chan *Flow, 64)}
	addrs := func() []netip.Addr { return []netip.Addr{families[0].client.Addr(), families[1].client.Addr()} }
	stop := make(chan struct{})
	cc := Config{Addrs: addrs(), App: a}
	sc := Config{Addrs: addrs(), App: b, OnFlow: func(f *Flow) {
		j.flows <- f
		// Whoever took the flow decides; undecided ones end with the test.
		for !f.decided.Load() {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
			}
		}
	}}
	if mod != nil {
		mod(&cc, &sc)
	}
	j.client, j.server = startStack(t, cc), startStack(t, sc)
	t.Cleanup(func() { close(stop) })
	return j
}

// pipe opens one connection.
func (j *joined) pipe(t testing.TB, f family) (client, server *Conn) {
	t.Helper()
	type res struct {
		c   *Conn
		err error
	}
	ch := make(chan res, 1)
	go func() {
		c, err := j.client.DialApp(context.Background(), f.client, f.server)
		ch <- res{c, err}
	}()
	var err error
	select {
	case fl := <-j.flows:
		if server, err = fl.Accept(); err != nil {
			t.Fatal(err)
		}
	case r := <-ch:
		t.Fatalf("dial ended without a flow: %v", r.err)
	case <-time.After(patience):
		t.Fatal("no flow")
	}
	r := <-ch
	if r.err != nil {
		t.Fatal(r.err)
	}
	return r.c, server
}

func readAll(t testing.TB, r io.Reader) []byte {
	t.Helper()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func rawBuffer(b []byte) buffer.Buffer { return buffer.MakeWithData(b) }
