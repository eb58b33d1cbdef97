package netstack

import (
	"cmp"
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"ztun/tun"
)

// ErrNoShortcut is what Flow.Shortcut returns when the packets of a flow cannot pass as they are: its bytes can still
// be copied.
var ErrNoShortcut = errors.New("netstack: no shortcut")

// Shortcut is a connection between the kernels of two pods of this process: each packet that one pod's device brings
// is written to the other's, with its addresses translated. Nothing of it ends here, so that windows, congestion
// control, half-closes and resets are the kernels' own, and nothing of it waits here. What is known of it is what
// passes (track).
type Shortcut struct {
	flow     *Flow    // until its client has answered
	sides    [2]side  // the client's, whose reader brings what goes forth, and the application's
	keys     [2]tuple // what such packets say
	turns    [2]turn  // what they are made to say
	patience *timer
	known    chan struct{} // closed when the application's kernel has answered, or refused, or will not

	mu      sync.Mutex
	t       track
	why     error  // what it has come to: what Shortcut returns of one that never stood, what watchers are told of another
	refused bool   // it never stood
	decided bool   // Accept was called
	quiet   [2]int // ticks since a packet came from either side
	probes  [2]int // that were sent there for that
	moved   [2]int
	watch   [2]watcher // those who want to know
}

// watcher is who keeps books about a Shortcut.
type watcher struct {
	carried func(forth bool, n int)
	ended   func(error)
}

// side is where one of the two kernels is reached: the device, who has which of its ports, and the stack on it.
type side struct {
	pump *pump
	t    *shortcuts
	hop  *hop
}

// Shortcut has the packets of a flow that the pod opens pass to the application at dst of another pod of this process,
// and waits for its kernel's answer: the SYN goes there now, with the client's own address and port. The answer goes to
// the client at once, so that what its connect says is true. ErrNoShortcut: with this flow, these devices or this port
// there can be none; other errors are DialApp's, and the flow is still to be refused.
func (fl *Flow) Shortcut(ctx context.Context, to *Stack, dst netip.AddrPort) (*Shortcut, error) {
	if to == fl.f.s || !to.cfg.Shortcuts || !to.isOwn(dst.Addr().Unmap()) {
		return nil, ErrNoShortcut // a kernel believes nobody who speaks in its own name
	}
	return fl.shorten(ctx, side{to.pump, &to.shortcuts, to.app}, dst)
}

// ShortcutPlain is Shortcut to dst in the network, as DialPlain. Only what the client called itself can be reached so:
// routers' errors, which it has to have, quote what was sent. And not from the ports of the mesh's own calls, whose
// answers the node's routing knows by them; nor with Config.UserTimeout, which is no kernel's of a pod.
func (fl *Flow) ShortcutPlain(ctx context.Context, dst netip.AddrPort) (*Shortcut, error) {
	s := fl.f.s
	dst = netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	if s.cfg.Uplink == nil || s.cfg.UserTimeout > 0 || dst != fl.dst || fl.src.Port() >= MeshPortMin ||
		!routable(dst.Addr()) || s.isOwn(dst.Addr()) {
		return nil, ErrNoShortcut
	}
	return fl.shorten(ctx, side{s.up.port.pump, &s.shortcuts, s.up}, dst)
}

// shorten is both.
func (fl *Flow) shorten(ctx context.Context, to side, dst netip.AddrPort) (*Shortcut, error) {
	from := fl.f.s
	dst = netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	if !from.cfg.Shortcuts || fl.inbound || fl.key.h != from.app || from.pump.gso != to.pump.gso {
		return nil, ErrNoShortcut
	}
	syn := shortcutSYN(fl.syn, fl.src, dst)
	if syn == nil {
		return nil, ErrNoShortcut
	}
	s := &Shortcut{
		flow: fl, sides: [2]side{{from.pump, &from.shortcuts, from.app}, to},
		keys:  [2]tuple{tupleOf(fl.src, fl.dst), tupleOf(dst, fl.src)},
		known: make(chan struct{}),
	}
	if fl.dst != dst {
		s.turns[forth], s.turns[back] = turnTo(dst, false), turnTo(fl.dst, true)
	}
	s.t.begin(fl.seq, to.hop.network)
	if !s.enter() {
		return nil, ErrNoShortcut
	}
	s.send(forth, syn)
	select {
	case <-s.known:
	case <-ctx.Done():
		s.Reset()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case !s.refused:
		return s, nil
	case s.why == net.ErrClosed && ctx.Err() != nil:
		return nil, dialError(fl.src, dst, ctx.Err())
	}
	return nil, dialError(fl.src, dst, cmp.Or(s.why, net.ErrClosed))
}

// enter has both readers know the connection; false: somebody else has the ports, or there is no room.
func (s *Shortcut) enter() bool {
	port := s.keys[back].endpoint()
	if !s.sides[back].hop.holdPort(port) {
		return false
	}
	for way := range s.sides {
		if !s.sides[way].t.add(s.keys[way], s, way) {
			if way == back {
				s.sides[forth].t.remove(s.keys[forth])
			}
			s.sides[back].hop.ports.giveBack(port)
			return false
		}
	}
	return true
}

func (s *Shortcut) leave() {
	for way := range s.sides {
		s.sides[way].t.remove(s.keys[way])
	}
	s.sides[back].hop.ports.giveBack(s.keys[back].endpoint())
}

// holdPort keeps the stack's own dials and probes from a client's port until giveBack; false if one of them, or a
// connection, has it.
func (h *hop) holdPort(id stack.TransportEndpointID) bool {
	h.mu.Lock()
	gs, closed := h.gs, h.closed
	h.mu.Unlock()
	if closed {
		return false
	}
	_, terr := h.ports.draw(gs, id)
	return terr == nil
}

// Accept is Flow.Accept of a flow with a Shortcut. It does not wait: a client that does not answer within
// handshakePatience, or whose flow loses its place before it has, is cut.
func (s *Shortcut) Accept() error {
	fl := s.flow
	if fl == nil || !fl.decide() {
		return ErrDecided
	}
	fl.req.Complete(false)
	if time.Since(fl.start) < promptly {
		fl.places.answers(fl.party)
	}
	fl.f.accepted.Add(1)
	fl.f.shortcuts.Add(1)
	// As an Accept that fails: whoever has lost his place, or does not answer, never was a connection.
	fl.OnGone(s.tire)
	s.mu.Lock()
	s.decided = true
	waits := s.t.phase < standing
	if waits {
		s.patience = fl.f.s.timers.after(fl.f.s.handshakePatience, s.tire)
	}
	s.mu.Unlock()
	if !waits {
		s.settled()
	}
	return nil
}

// tire ends a handshake that takes too long.
func (s *Shortcut) tire() {
	s.mu.Lock()
	late := s.t.phase < standing
	s.mu.Unlock()
	if late {
		s.end(nil)
	}
}

// settled lets go of the flow's place, if it was decided: the client has answered, or there is nothing to wait for any
// more. s.mu is not held.
func (s *Shortcut) settled() {
	s.mu.Lock()
	fl := s.flow
	if fl == nil || !s.decided {
		s.mu.Unlock()
		return
	}
	s.flow = nil
	if s.patience != nil {
		s.patience.Stop()
		s.patience = nil
	}
	s.mu.Unlock()
	fl.f.forget(fl)
}

// Watch has carried called with the bytes that arrive from now on, each once, and those that have before, and ended
// once when the connection has ended, at once if it has: with nil where the applications have ended it, be it by
// resets, net.ErrClosed where Reset or the end of a stack has, ETIMEDOUT where the kernels do not answer. carried
// must not wait, nor call the Shortcut; two may watch.
func (s *Shortcut) Watch(carried func(forth bool, n int), ended func(error)) {
	s.mu.Lock()
	for way, n := range s.moved {
		if n > 0 {
			carried(way == forth, n)
		}
	}
	over, why := s.t.phase == over, s.why
	if !over {
		for i := range s.watch {
			if s.watch[i].ended == nil {
				s.watch[i] = watcher{carried, ended}
				break
			}
		}
	}
	s.mu.Unlock()
	if over {
		ended(why)
	}
}

// Reset ends the connection: both kernels get a reset.
func (s *Shortcut) Reset() { s.end(net.ErrClosed) }

// end takes the connection out. Both kernels get resets, but for the client of a SYN that was never answered: that flow
// is still to be refused.
func (s *Shortcut) end(why error) {
	s.mu.Lock()
	was := s.t.phase
	if was == over {
		s.mu.Unlock()
		return
	}
	s.over(was, why)
	lanes := s.t.lanes
	s.mu.Unlock()
	s.finish(was)
	s.sendReset(forth, &lanes)
	if was != asking {
		s.sendReset(back, &lanes)
	}
}

// sendReset sends a reset one way, with the number that its receiver waits for if all that was written to its device
// was received.
func (s *Shortcut) sendReset(way int, lanes *[2]lane) {
	s.send(way, s.bare(way, lanes[way].next, lanes[1-way].next, header.TCPFlagRst|header.TCPFlagAck))
	if lanes[way].next != lanes[way].acked {
		s.ask(way, lanes)
	}
}

// ask is for a receiver that may not have believed a reset: because something before that was lost, or because the
// sender has told numbers that are not so. It gets one with the number that it has told itself, and an old segment,
// which it answers (RFC 9293 section 3.10.7.4): gVisor, which knows nothing of the connection, answers with a reset
// of just the number that is in that.
func (s *Shortcut) ask(way int, lanes *[2]lane) {
	s.send(way, s.bare(way, lanes[way].acked, lanes[1-way].next, header.TCPFlagRst|header.TCPFlagAck))
	s.send(way, s.old(way, lanes))
}

// old is a segment that whoever receives what goes way has received already, and answers.
func (s *Shortcut) old(way int, lanes *[2]lane) []byte {
	return s.bare(way, lanes[way].acked-1, lanes[1-way].acked, header.TCPFlagAck)
}

// probe asks the kernel that way begins at whether it still has the connection, by a segment that is older than what
// it has (RFC 9293 section 3.8.4): it answers it, or has no such connection and says so.
func (s *Shortcut) probe(way int, lanes *[2]lane) {
	s.send(1-way, s.old(1-way, lanes))
}

// bare is a segment without payload that goes way.
func (s *Shortcut) bare(way int, seq, ack uint32, flags header.TCPFlags) []byte {
	answers := &s.keys[1-way]
	return bareTCP(answers.dstAddrPort(), answers.srcAddrPort(),
		&header.TCPFields{SeqNum: seq, AckNum: ack, Flags: flags}, nil)
}

// send writes a packet of ours to the device that is the end of way.
func (s *Shortcut) send(way int, b []byte) {
	var vh tun.VNetHdr
	s.sides[1-way].pump.write(&vh, [][]byte{b}, len(b))
}

// over makes it so. s.mu is held.
func (s *Shortcut) over(was phase, why error) {
	if s.t.phase, s.why = over, why; was == asking {
		s.refused = true
		close(s.known)
	}
}

// finish says that the connection is over, once: who made it so calls it.
func (s *Shortcut) finish(was phase) {
	s.leave()
	if was == asking {
		return
	}
	s.settled()
	s.mu.Lock()
	watch, why := s.watch, s.why
	s.watch = [2]watcher{}
	s.mu.Unlock()
	for _, w := range watch {
		if w.ended != nil {
			w.ended(why)
		}
	}
}

// unreachable takes an ICMP error about a packet that went forth; false: it is not about a SYN that awaits its answer.
func (s *Shortcut) unreachable(q *quotedTCP) bool {
	s.mu.Lock()
	refused := q.unreachable && s.t.phase == asking && q.seq == s.t.lanes[forth].first
	if refused {
		s.over(asking, os.NewSyscallError("connect", q.errno))
	}
	s.mu.Unlock()
	if refused {
		s.finish(asking)
	}
	return refused
}

// pass takes a packet of n bytes that goes way, bufs[0] beginning with its headers; false: it is none of this
// connection's.
func (s *Shortcut) pass(way int, bufs [][]byte, n int, p *rxPacket, vh *tun.VNetHdr) bool {
	th := header.TCP(bufs[0][p.ipLen:])
	seg := segment{seq: th.SequenceNumber(), ack: th.AckNumber(), flags: th.Flags(), size: n - p.hdrLen}
	x, ok := s.note(way, &seg)
	if !ok {
		return false
	}
	switch x.what {
	case newSYN: // nobody else can send in the client's name: it has given the old one up
		s.end(nil)
		return false
	case newRefusal:
		s.finish(x.was)
		return true
	case sameSYN: // not as it is, and not the first one: a kernel gives options up that a path may not like
		syn := shortcutSYN(bufs[0], s.keys[back].dstAddrPort(), s.keys[back].srcAddrPort())
		if syn != nil {
			s.send(forth, syn)
		}
		return true
	case unfit:
		return true
	}
	s.turns[way].apply(bufs[0], p, vh)
	s.sides[1-way].pump.write(vh, bufs, n)
	switch x.what {
	case newStanding:
		s.settled()
	case doubtful:
		s.send(way, s.old(way, &x.lanes))
	case newReset:
		s.finish(x.was)
		if seg.seq != x.lanes[way].acked {
			s.ask(way, &x.lanes)
		}
	case newEnd:
		s.finish(x.was)
	}
	return true
}

// noted is what a segment has come to.
type noted struct {
	what  news
	was   phase
	lanes [2]lane
}

// note follows a segment; false: the connection is over.
func (s *Shortcut) note(way int, seg *segment) (x noted, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.t.phase == over {
		return x, false
	}
	x.was = s.t.phase
	carried := 0
	x.what, carried = s.t.see(way, seg)
	x.lanes = s.t.lanes
	switch x.what {
	case unfit:
		return x, true // no sign of life either
	case newAnswer:
		close(s.known)
	case newRefusal:
		s.over(x.was, os.NewSyscallError("connect", syscall.ECONNREFUSED))
	}
	s.quiet[way], s.probes[way] = 0, 0
	if carried > 0 {
		s.moved[1-way] += carried
		for i := range s.watch {
			if w := &s.watch[i]; w.carried != nil {
				w.carried(1-way == forth, carried)
			}
		}
	}
	return x, true
}

// passWhole takes a segment of a connection that passes by which a stack has put together, or has freed of options: of
// fragments, and of what has IP options or extension headers. It goes on as a packet without.
func (t *shortcuts) passWhole(h *hop, id stack.TransportEndpointID, th header.TCP, pkt *stack.PacketBuffer) bool {
	if t.n.Load() == 0 {
		return false
	}
	src, dst := addrPort(id.RemoteAddress, id.RemotePort), addrPort(id.LocalAddress, id.LocalPort)
	w := t.find(tupleOf(src, dst))
	if w.s == nil || w.s.sides[w.way].hop != h {
		return false
	}
	f := header.TCPFields{SeqNum: th.SequenceNumber(), AckNum: th.AckNumber(), Flags: th.Flags(),
		WindowSize: th.WindowSize(), UrgentPointer: th.UrgentPointer()}
	b := append(bareTCP(src, dst, &f, th.Options()), pkt.Data().AsRange().ToSlice()...)
	sealTCP(b)
	var p rxPacket
	bufs := [][]byte{b[:min(len(b), headSize)]}
	if len(b) > headSize {
		bufs = append(bufs, b[headSize:])
	}
	if parseHead(bufs[0], len(b), &p) == rxDeliver {
		w.s.pass(int(w.way), bufs, len(b), &p, &tun.VNetHdr{})
	}
	return true
}
