package attach

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"ztun/proxy"
	"ztun/proxy/fair"
)

// Descriptors shares the process's file descriptors: a part is the daemon's own (files, netlink, namespaces to enter,
// its HTTP servers), every attached pod has what it consists of, and the rest is the pods' kernel sockets, HBONE
// connections both ways. At the bound the connections of the greediest end, by pod and far end, the oldest first.
// Connections of netstack take none.
type Descriptors struct {
	report *fair.Report
	all    *fair.Ledger[fdHolder]
	limit  int64

	mu      sync.Mutex
	inPods  map[string]*fair.Ledger[netip.Addr] // inbound connections of each pod, by their sources
	dialled map[*net.TCPConn]*Share
}

// fdHolder is who holds descriptors: a pod, by its label: for its calls (no address), a pod's clients at one source,
// or what the pod consists of.
type fdHolder struct {
	pod  string
	from netip.Addr
	part int // of what the pod consists of, from 1: each a holder, so that it is never the greediest
}

const (
	// ownDescriptors are kept for the daemon itself, or a quarter of the limit if that is less. Idle it has some 25;
	// an attachment opens ten for a moment, and every call has two while it is being made.
	ownDescriptors = 256
	// PodDescriptors is what an attached pod consists of: its namespace, the device and a socket for its settings,
	// and the listeners of the DNS proxy and SOCKS5 on both loopbacks (a test counts them).
	PodDescriptors = 10
	// podShare is the part of the limit that the clients of one pod, or its calls, may take at most.
	podShare = 4
)

// ErrNoDescriptor is what a pod or connection without a place gets.
var ErrNoDescriptor = fmt.Errorf("%w: the daemon's descriptors are shared out; raise its limit of open files (LimitNOFILE)", syscall.EMFILE)

// NewDescriptors shares out what limit leaves.
func NewDescriptors(limit uint64, report *fair.Report) *Descriptors {
	n := int64(min(limit, 1<<30))
	d := &Descriptors{report: report, limit: n - min(ownDescriptors, n/4), inPods: map[string]*fair.Ledger[netip.Addr]{},
		dialled: map[*net.TCPConn]*Share{}}
	d.all = fair.NewLedger(fair.LedgerOptions[fdHolder]{Limit: d.limit, Turned: func(h fdHolder, evicted bool) {
		d.turned(h.pod, h.from, evicted)
	}})
	return d
}

func (d *Descriptors) turned(pod string, from netip.Addr, evicted bool) {
	source := "its own calls"
	if from.IsValid() {
		source = from.String()
	}
	d.report.Turned("descriptors", pod, source, evicted)
}

// Share is a descriptor's, or a pod's, share.
type Share struct {
	all     []*fair.Place[fdHolder]
	inPod   *fair.Place[netip.Addr]
	end     atomic.Pointer[func()] // what ends the connection
	evicted atomic.Bool
}

func (p *Share) evict() {
	p.evicted.Store(true)
	if f := p.end.Load(); f != nil {
		(*f)()
	}
}

// take adds a descriptor; false: there is none to be had.
func (p *Share) take(d *Descriptors, h fdHolder, evict func()) bool {
	got := d.all.Take(h, 1, evict)
	if got == nil {
		return false
	}
	p.all = append(p.all, got)
	return true
}

// Release gives the place back; more than once is fine.
func (p *Share) Release() {
	if p == nil {
		return
	}
	for _, one := range p.all {
		one.Release()
	}
	p.inPod.Release()
}

// ForPod takes what an attached pod consists of; nil: there is no room.
func (d *Descriptors) ForPod(pod string) *Share {
	d.collect()
	p := &Share{}
	for i := range PodDescriptors {
		if !p.take(d, fdHolder{pod: pod, part: i + 1}, nil) {
			p.Release()
			return nil
		}
	}
	return p
}

// Inbound takes a place for an accepted connection of a pod; nil: it gets none. When somebody else needs the place
// the connection is reset.
func (d *Descriptors) Inbound(pod string, conn *net.TCPConn) *Share {
	from := fair.Group(conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap())
	end := func() { Reset(conn) }
	p := &Share{}
	p.end.Store(&end)
	if p.inPod = d.clients(pod).Take(from, 1, p.evict); p.inPod == nil {
		return nil
	}
	if !p.take(d, fdHolder{pod: pod, from: from}, p.evict) {
		p.Release()
		return nil
	}
	return p
}

// clients is the ledger of a pod's inbound connections.
func (d *Descriptors) clients(pod string) *fair.Ledger[netip.Addr] {
	d.mu.Lock()
	defer d.mu.Unlock()
	l := d.inPods[pod]
	if l == nil {
		l = fair.NewLedger(fair.LedgerOptions[netip.Addr]{Limit: max(d.limit/podShare, 1),
			Turned: func(from netip.Addr, evicted bool) {
				d.turned(pod, from, evicted)
			}})
		d.inPods[pod] = l
	}
	return l
}

// Forget lets go of a pod that is no more.
func (d *Descriptors) Forget(pod string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.inPods, pod)
}

// Outbound takes a place for a call of a pod, before it is made; nil: it gets none. When somebody else needs the
// place while the call is being made, giveUp is called.
func (d *Descriptors) Outbound(pod string, giveUp func()) *Share {
	p := &Share{}
	p.end.Store(&giveUp)
	h := fdHolder{pod: pod}
	if d.all.Held(h) >= max(d.limit/podShare, 1) {
		if d.collect(); d.all.Held(h) >= max(d.limit/podShare, 1) {
			d.turned(pod, netip.Addr{}, false)
			return nil
		}
	}
	if !p.take(d, h, p.evict) {
		return nil
	}
	return p
}

// forSockets is how many of a pod's descriptors may be UDP sockets, so that some are left for its calls.
func (d *Descriptors) forSockets() int { return int(max(d.limit/podShare/2, 1)) }

// Dial calls dst within the pod's share: without a place there it fails with ErrNoDescriptor. When somebody else
// needs the place while the call is being made, its context ends.
func (d *Descriptors) Dial(ctx context.Context, pod string, dst netip.AddrPort,
	dial func(context.Context) (*net.TCPConn, error)) (proxy.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	place := d.Outbound(pod, cancel)
	if place == nil {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(dst), Err: ErrNoDescriptor}
	}
	c, err := dial(ctx)
	if err != nil {
		place.Release()
		return nil, err
	}
	d.Opened(place, c)
	return c, nil
}

// DialBy is Dial by a dialer of the standard library's.
func (d *Descriptors) DialBy(ctx context.Context, pod string, dst netip.AddrPort, by *net.Dialer) (proxy.Conn, error) {
	return d.Dial(ctx, pod, dst, func(ctx context.Context) (*net.TCPConn, error) {
		c, err := by.DialContext(ctx, "tcp", dst.String())
		if err != nil {
			return nil, err
		}
		return c.(*net.TCPConn), nil // as net.Dialer says of "tcp"
	})
}

// Opened gives a place to a connection, of a call that was answered or accepted, until that is closed, which collect
// notices.
func (d *Descriptors) Opened(p *Share, conn *net.TCPConn) {
	end := func() { Reset(conn) }
	p.end.Store(&end)
	if p.evicted.Load() { // before it was to be closed
		end()
	}
	d.mu.Lock()
	d.dialled[conn] = p
	d.mu.Unlock()
}

// collectEvery is how often places of calls that were closed are given back at the latest.
const collectEvery = 2 * time.Second

// Run gives back the places of calls that were closed until ctx ends.
func (d *Descriptors) Run(ctx context.Context) {
	tick := time.NewTicker(collectEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			d.collect()
		}
	}
}

// collect gives back the places of calls that were closed. Whoever called keeps the bare socket, whose kind the
// relays look at, so nobody tells us; to look takes 50 ns each.
func (d *Descriptors) collect() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for conn, p := range d.dialled {
		rc, err := conn.SyscallConn()
		if err == nil {
			err = rc.Control(func(uintptr) {})
		}
		if err != nil {
			p.Release()
			delete(d.dialled, conn)
		}
	}
}
