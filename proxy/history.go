package proxy

import (
	"cmp"
	"context"
	"errors"
	"iter"
	"log/slog"
	"net/netip"
	"sync/atomic"
	"time"

	"ztun/proxy/hbone"
	"ztun/proxy/route"
)

// Party is one side of a connection, as far as it is known here.
type Party struct {
	Addr                netip.AddrPort
	Workload, Namespace string
	Identity            string // of the tunnel's certificates; "" for plaintext
	Cluster             string
}

// ConnectionInfo is one connection as an operator sees it: what the books hold of it, while it lives and after. It is
// what /config_dump, `ztun connections` and `ztun flows` are made of.
type ConnectionInfo struct {
	Direction           string // outbound, inbound or passthrough (inbound plaintext)
	Protocol            string // HBONE, TCP or DOUBLEHBONE
	State               string // connecting, open or ended
	Source, Destination Party
	Called              netip.AddrPort // what the source called, where that is not Destination.Addr; else zero
	Service             string         // hostname; "" if none was called
	Authority           string         // of the CONNECT
	// TunnelLocal and TunnelRemote are the TCP connection of the node that carries an open one, as ss shows it; zero for
	// plaintext and for what has ended.
	TunnelLocal, TunnelRemote netip.AddrPort
	Memory                    bool      // it stood without a tunnel: both pods are of this daemon
	Start, End                time.Time // End is zero while it lives
	Sent, Received            uint64    // bytes, turned as in the access line

	// Of ended ones. Flag is the response_flags label of the metrics.
	Outcome, Reason, Flag string
}

// Outcomes of ended connections.
const (
	OutcomeSuccess = "success" // it ended as its ends wanted
	OutcomeDenied  = "denied"  // policy said no, here or at the peer (401)
	OutcomeFailed  = "failed"  // it never stood, for another reason
	OutcomeCut     = "cut"     // it stood, and ended in an error or because we cut it
)

// outcome says in a word how a connection ended.
func outcome(carried bool, err error) string {
	if err == nil {
		return OutcomeSuccess
	}
	if carried {
		return OutcomeCut
	}
	var e *Error // only now: it is taken to the heap
	if errors.As(err, &e) && (e.kind == kindDenied || e.kind == kindStatus && e.statusIs(401)) {
		return OutcomeDenied
	}
	return OutcomeFailed
}

// past is how a connection ended; its books have it from then on.
type past struct {
	after   time.Duration // since its start
	outcome string
	reason  string
	flag    Flag
}

// ring remembers the last connections that have ended. It holds on to their own books, so that remembering one costs
// two atomic operations. A nil ring remembers nothing.
type ring struct {
	next  atomic.Uint64
	slots []atomic.Pointer[books]
}

func newRing(size int) *ring {
	if size <= 0 {
		return nil
	}
	return &ring{slots: make([]atomic.Pointer[books], size)}
}

// add takes books that nobody writes to any more.
func (r *ring) add(b *books) {
	if r != nil {
		r.slots[(r.next.Add(1)-1)%uint64(len(r.slots))].Store(b)
	}
}

// all are those that are remembered, in no order.
func (r *ring) all(yield func(*books) bool) {
	if r == nil {
		return
	}
	for i := range r.slots {
		if b := r.slots[i].Load(); b != nil && !yield(b) {
			return
		}
	}
}

// history is what one pod's connections were. Those that never stood have a ring of their own: a scan that is refused
// a thousand times must not take the place of what really happened.
type history struct{ carried, refused *ring }

// maxReason bounds what is kept of a reason, in bytes.
const maxReason = 512

// remember keeps the books of a connection that has ended. reason is err's text.
func (h *history) remember(b *books, err error, reason string, flag Flag) {
	if h.carried == nil {
		return
	}
	b.past = past{time.Since(b.start), outcome(b.carried, err), clip(reason, maxReason), flag}
	if b.carried || err == nil {
		h.carried.add(b)
	} else {
		h.refused.add(b)
	}
}

// deny keeps the books of a connection that was turned down before anything was counted (spec 11, "early deny"): a
// WARN line, and what an operator sees of it. dir is the direction.
func (p *Proxy) deny(dir int, src, dst netip.AddrPort, err error) {
	b := &books{p: p, outbound: dir == outbound, src: src, dst: dst, labels: &p.unlabelled}
	if dir == inbound {
		b.protocol = route.HBONE
	}
	p.denied(b, err)
}

// denyMesh is deny for what comes over a tunnel, whose peer may have shown who it is.
func (p *Proxy) denyMesh(t *tunnel, authority string, err error) {
	b := &books{p: p, src: t.src, dst: t.dst, hbone: clip(authority, maxReason), protocol: route.HBONE,
		labels: &p.unlabelled}
	if t.hasPeer {
		b.mtls, b.labels = true, &labels{lSourcePrincipal: t.peer.String()}
	}
	p.denied(b, err)
}

func (p *Proxy) denied(b *books, err error) {
	b.start = time.Now()
	reason := err.Error()
	p.history.remember(b, err, reason, FlagNone)
	p.bounds.refusals.Log(context.Background(), slog.LevelWarn, sourceOf(b.src), "connection failed",
		slog.Any("src.addr", b.src), slog.Any("dst.addr", b.dst),
		slog.String("direction", direction(b.outbound)), slog.String("error", reason))
}

// Live yields what is open or being opened now, in no order. No lock is held while it yields.
func (p *Proxy) Live() iter.Seq[ConnectionInfo] {
	return func(yield func(ConnectionInfo) bool) {
		for _, c := range p.table.snapshot() {
			if !yield(c.info()) {
				return
			}
		}
	}
}

// Open is how many connections Live would yield, without a look at each one's books.
func (p *Proxy) Open() (inbound, outbound int) {
	for _, c := range p.table.snapshot() {
		if c.where().inbound {
			inbound++
		} else {
			outbound++
		}
	}
	return inbound, outbound
}

// Ended yields connections that have ended, as many as are remembered (Config.Remember), in no order.
func (p *Proxy) Ended() iter.Seq[ConnectionInfo] {
	return func(yield func(ConnectionInfo) bool) {
		for _, r := range []*ring{p.history.carried, p.history.refused} {
			for b := range r.all {
				i := b.info()
				i.State, i.End = "ended", b.start.Add(b.past.after)
				i.Outcome, i.Reason, i.Flag = b.past.outcome, b.past.reason, b.past.flag.String()
				if !yield(i) {
					return
				}
			}
		}
	}
}

// info is what the books hold.
func (b *books) info() ConnectionInfo {
	i := ConnectionInfo{
		Direction: directions[outbound], Protocol: b.protocol.String(), Called: b.called,
		Service:   b.labels[lDestinationService],
		Authority: b.hbone, Memory: b.memory, Start: b.start, Sent: b.sent.Load(), Received: b.received.Load(),
		Source: Party{
			Addr: b.src, Workload: cmp.Or(b.srcName, b.labels[lSourceCanonicalService]),
			Namespace: b.labels[lSourceNamespace], Cluster: b.labels[lSourceCluster],
		},
		Destination: Party{
			Addr: b.dst, Workload: cmp.Or(b.dstName, b.labels[lDestinationCanonicalService]),
			Namespace: b.labels[lDestinationNamespace], Cluster: b.labels[lDestinationCluster],
		},
	}
	switch {
	case b.outbound:
		i.Sent, i.Received = i.Received, i.Sent
	case b.protocol == route.TCP:
		i.Direction = directions[passthrough]
	default:
		i.Direction = directions[inbound]
	}
	if b.mtls {
		i.Source.Identity, i.Destination.Identity = b.labels[lSourcePrincipal], b.labels[lDestinationPrincipal]
	}
	if i.Called == i.Destination.Addr {
		i.Called = netip.AddrPort{}
	}
	return i
}

// info is what is known of a connection that lives; before it stands that is little.
func (c *connection) info() ConnectionInfo {
	c.mu.Lock()
	on, b, ends := c.path, c.books, c.ends
	c.mu.Unlock()
	if ends == [2]Conn{} {
		i := ConnectionInfo{Direction: directions[outbound], Protocol: on.protocol, State: "connecting", Start: on.start,
			Source: Party{Addr: on.src}, Destination: Party{Addr: on.actualDst}}
		if on.originalDst != on.actualDst {
			i.Called = on.originalDst
		}
		if on.inbound {
			i.Direction, i.Called = directions[inbound], netip.AddrPort{}
			if on.policy.HasID {
				i.Source.Identity = on.policy.ID.String()
			}
			if on.protocol == route.TCP.String() {
				i.Direction = directions[passthrough]
			}
		}
		return i
	}
	i := b.info()
	i.State = "open"
	if on.inbound && b.hbone != "" {
		i.Destination.Addr = on.actualDst // the application; the books have the tunnel's address, as ztunnel's access line
	}
	for _, e := range ends {
		if s, ok := e.(*hbone.Stream); ok {
			i.TunnelLocal, i.TunnelRemote = addrPort(s.LocalAddr()), addrPort(s.RemoteAddr())
		}
	}
	return i
}
