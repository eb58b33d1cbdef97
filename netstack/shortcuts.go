package netstack

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"ztun/tun"
)

const (
	// maxShortcuts bounds those of one pod, both ways. What is beyond is copied, within that way's own bounds.
	maxShortcuts = 1 << 16
	// shortcutTick is how often they are looked at, or as often as their keepalive asks for, once a second at most.
	shortcutTick = time.Minute
)

// tuple is where a TCP packet comes from and goes to: IPv4 addresses as IPv6 has them (RFC 4291 section 2.5.5.2).
type tuple struct {
	src, dst         [16]byte
	srcPort, dstPort uint16
}

func tupleOf(src, dst netip.AddrPort) tuple {
	return tuple{src.Addr().As16(), dst.Addr().As16(), src.Port(), dst.Port()}
}

func (t *tuple) srcAddrPort() netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(t.src).Unmap(), t.srcPort)
}

func (t *tuple) dstAddrPort() netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(t.dst).Unmap(), t.dstPort)
}

// endpoint is how a stack names the connection of a packet that comes to it.
func (t *tuple) endpoint() (id stack.TransportEndpointID) {
	id.RemoteAddress, _ = fromAddr(t.srcAddrPort().Addr())
	id.LocalAddress, _ = fromAddr(t.dstAddrPort().Addr())
	id.RemotePort, id.LocalPort = t.srcPort, t.dstPort
	return id
}

// mapped is how IPv4 addresses begin in a tuple: in an IPv6 packet they are nobody's.
var mapped = [12]byte{10: 0xff, 11: 0xff}

// tupleIn is a packet's. ok is false with IP options or extension headers: those are not for another pod's kernel.
func tupleIn(head []byte, p *rxPacket) (t tuple, ok bool) {
	if p.proto == header.IPv4ProtocolNumber {
		t.src[10], t.src[11], t.dst[10], t.dst[11] = 0xff, 0xff, 0xff, 0xff
		copy(t.src[12:], head[12:16])
		copy(t.dst[12:], head[16:20])
		ok = p.ipLen == header.IPv4MinimumSize
	} else {
		copy(t.src[:], head[8:24])
		copy(t.dst[:], head[24:40])
		ok = p.ipLen == header.IPv6MinimumSize && [12]byte(t.src[:12]) != mapped && [12]byte(t.dst[:12]) != mapped
	}
	t.srcPort, t.dstPort = binary.BigEndian.Uint16(head[p.ipLen:]), binary.BigEndian.Uint16(head[p.ipLen+2:])
	return t, ok
}

// shortcuts are one pod's: those that it opens, and those that come to it.
type shortcuts struct {
	cfg   *Config
	tick  time.Duration
	limit int32

	n     atomic.Int32 // of by
	conns atomic.Int32 // connections: one to the network has both of its keys here
	over  atomic.Uint64
	// probed are those that were idle, each time.
	probed atomic.Uint64

	mu     sync.Mutex
	by     map[tuple]shortcutWay
	closed bool
	ending chan struct{} // closed when closed is set
	timer  *time.Timer   // nil: nobody has to be looked at
	looks  sync.WaitGroup
}

// shortcutWay is what a packet's tuple stands for.
type shortcutWay struct {
	s   *Shortcut
	way uint8
}

func (t *shortcuts) begin(cfg *Config) {
	t.cfg, t.limit, t.ending = cfg, maxShortcuts, make(chan struct{})
	t.tick = max(min(shortcutTick, cfg.KeepaliveIdle, cfg.KeepaliveInterval), shortcutTick/60)
}

// of is the Shortcut that a packet of the pod's belongs to, and which way it goes.
func (t *shortcuts) of(head []byte, p *rxPacket) (*Shortcut, int) {
	if t.n.Load() == 0 {
		return nil, 0
	}
	key, ok := tupleIn(head, p)
	if !ok {
		return nil, 0
	}
	w := t.find(key)
	return w.s, int(w.way)
}

func (t *shortcuts) find(key tuple) shortcutWay {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.by[key]
}

// add has packets with this key be s's; false if somebody has the key, or there is no room.
func (t *shortcuts) add(key tuple, s *Shortcut, way int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.n.Load() >= t.limit {
		t.over.Add(1)
		return false
	}
	if _, taken := t.by[key]; taken || t.closed {
		return false
	}
	if t.by == nil {
		t.by = make(map[tuple]shortcutWay)
	}
	t.by[key] = shortcutWay{s, uint8(way)}
	t.n.Add(1)
	if way == forth || s.sides[forth].t != t {
		t.conns.Add(1)
	}
	if way == forth && t.timer == nil {
		t.lookLater()
	}
	return true
}

func (t *shortcuts) remove(key tuple) {
	t.mu.Lock()
	defer t.mu.Unlock()
	w := t.by[key]
	if w.s == nil {
		return
	}
	delete(t.by, key)
	t.n.Add(-1)
	if w.way == forth || w.s.sides[forth].t != t {
		t.conns.Add(-1)
	}
}

// about is the Shortcut whose packet an ICMP error is about that p's device has brought: one that went forth.
func (t *shortcuts) about(p *pump, q *quotedTCP) *Shortcut {
	client, app := addrPort(q.id.LocalAddress, q.id.LocalPort), addrPort(q.id.RemoteAddress, q.id.RemotePort)
	w := t.find(tupleOf(app, client))
	if w.s == nil || w.way != back || w.s.sides[back].pump != p {
		return nil
	}
	return w.s
}

// unreachable takes an ICMP error of the pod's kernel about a SYN.
func (t *shortcuts) unreachable(p *pump, q *quotedTCP) {
	if t.n.Load() == 0 {
		return
	}
	if s := t.about(p, q); s != nil {
		s.unreachable(q)
	}
}

// passError passes an ICMP error of the network's, which the node's device has brought, to the pod whose packet it is
// about: what a path can take, above all. False: it is about nothing that passes here.
func (t *shortcuts) passError(p *pump, bufs [][]byte, n int, vh *tun.VNetHdr) bool {
	if t.n.Load() == 0 {
		return false
	}
	q, ok := quoted(bufs[0])
	if !ok {
		return false
	}
	s := t.about(p, &q)
	if s == nil {
		return false
	}
	if !s.unreachable(&q) {
		s.sides[forth].pump.write(vh, bufs, n)
	}
	return true
}

// lookLater has those that the pod has opened looked at. t.mu is held.
func (t *shortcuts) lookLater() {
	if t.closed {
		return
	}
	t.looks.Add(1)
	t.timer = time.AfterFunc(t.tick, t.cfg.Panics.Func("a look for idle connections", func() {
		defer t.looks.Done()
		t.look()
	}, nil))
}

// askedAtOnce and askPause pace the questions to kernels: a device's queue holds some hundred packets, and beside the
// answers there are those of connections at work.
const (
	askedAtOnce = 32
	askPause    = 2 * time.Millisecond
)

func (t *shortcuts) look() {
	asked := 0
	for _, s := range t.opened() {
		if s.idle(t.tick, t.cfg) {
			asked++
		}
		if asked == askedAtOnce {
			asked = 0
			select {
			case <-time.After(askPause):
			case <-t.ending:
				return
			}
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.timer = nil; t.n.Load() > 0 {
		t.lookLater()
	}
}

// opened are those that begin at the pod.
func (t *shortcuts) opened() []*Shortcut {
	return t.list(func(w shortcutWay) bool { return w.way == forth })
}

func (t *shortcuts) list(want func(shortcutWay) bool) (list []*Shortcut) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, w := range t.by {
		if want(w) {
			list = append(list, w.s)
		}
	}
	return list
}

// close resets all of them, and lets none begin.
func (t *shortcuts) close() {
	t.mu.Lock()
	if !t.closed {
		close(t.ending)
	}
	t.closed = true
	if t.timer != nil && t.timer.Stop() {
		t.looks.Done()
	}
	t.mu.Unlock()
	t.looks.Wait()
	for _, s := range t.list(func(shortcutWay) bool { return true }) {
		s.Reset()
	}
}

// idle is called every tick. A kernel of which nothing has come for long is asked whether it still has the connection:
// a reset that was lost would leave it here for ever.
func (s *Shortcut) idle(tick time.Duration, c *Config) (asked bool) {
	after, every := int(max(1, c.KeepaliveIdle/tick)), int(max(1, c.KeepaliveInterval/tick))
	var due [2]bool
	dead := false
	s.mu.Lock()
	for way := range s.quiet {
		s.quiet[way]++
		if way == back && c.KeepaliveOff && s.sides[back].hop.network {
			continue
		}
		idle := s.quiet[way] - after
		due[way] = (s.t.phase == answered || s.t.phase == standing) && idle > 0 && (idle-1)%every == 0
		if due[way] {
			s.probes[way]++
			dead = dead || s.probes[way] > c.KeepaliveCount
		}
	}
	lanes := s.t.lanes
	s.mu.Unlock()
	if dead {
		s.end(syscall.ETIMEDOUT)
		return true
	}
	for way := range due {
		if due[way] {
			s.sides[forth].t.probed.Add(1)
			s.probe(way, &lanes)
			asked = true
		}
	}
	return asked
}

// turn is what becomes of a packet's source or destination.
type turn struct {
	addr tcpip.Address // empty: nothing
	port uint16
	src  bool
}

func turnTo(a netip.AddrPort, src bool) turn {
	addr, _ := fromAddr(a.Addr())
	return turn{addr, a.Port(), src}
}

// apply translates the headers in head, and their checksums (RFC 1624). That of a packet whose checksum is left to the
// device is the pseudo-header's alone.
func (u *turn) apply(head []byte, p *rxPacket, vh *tun.VNetHdr) {
	if u.addr.Len() == 0 {
		return
	}
	th := header.TCP(head[p.ipLen:])
	whole := vh.Flags&tun.FlagNeedsCSum == 0
	var old tcpip.Address
	if p.proto == header.IPv4ProtocolNumber {
		ip := header.IPv4(head)
		if u.src {
			old = ip.SourceAddress()
			ip.SetSourceAddressWithChecksumUpdate(u.addr)
		} else {
			old = ip.DestinationAddress()
			ip.SetDestinationAddressWithChecksumUpdate(u.addr)
		}
	} else {
		ip := header.IPv6(head)
		if u.src {
			old = ip.SourceAddress()
			ip.SetSourceAddress(u.addr)
		} else {
			old = ip.DestinationAddress()
			ip.SetDestinationAddress(u.addr)
		}
	}
	th.UpdateChecksumPseudoHeaderAddress(old, u.addr, whole)
	switch {
	case whole && u.src:
		th.SetSourcePortWithChecksumUpdate(u.port)
	case whole:
		th.SetDestinationPortWithChecksumUpdate(u.port)
	case u.src:
		th.SetSourcePort(u.port)
	default:
		th.SetDestinationPort(u.port)
	}
}

// plainSYNOptions are those that belong to the two kernels alone: maximum segment size, window scale, SACK permitted,
// timestamps.
var plainSYNOptions = [...]uint8{header.TCPOptionMSS, header.TCPOptionWS, header.TCPOptionSACKPermitted,
	header.TCPOptionTS}

// shortcutSYN is a client's SYN, of which b are the headers, as it goes to the application at dst: with no option that
// would make more of it than one connection that has been judged (Multipath TCP, TCP Fast Open), and without payload.
// nil: its headers are none that pass.
func shortcutSYN(b []byte, src, dst netip.AddrPort) []byte {
	l3, ok := seeIP(b)
	plain := header.IPv4MinimumSize
	if l3.v6 {
		plain = header.IPv6MinimumSize
	}
	if !ok || l3.part || l3.l4 != plain || l3.proto != header.TCPProtocolNumber || l3.v6 == dst.Addr().Is4() {
		return nil
	}
	th := header.TCP(b[l3.l4:])
	if len(th) < header.TCPMinimumSize || int(th.DataOffset()) < header.TCPMinimumSize || int(th.DataOffset()) > len(th) {
		return nil
	}
	opts, ok := plainOptions(th.Options())
	if !ok {
		return nil
	}
	return bareTCP(src, dst, &header.TCPFields{SeqNum: th.SequenceNumber(), Flags: th.Flags(),
		WindowSize: th.WindowSize()}, opts)
}

// plainOptions are a SYN's without those that do not pass; false: they contradict themselves.
func plainOptions(opts []byte) (_ []byte, ok bool) {
	out := bytes.Repeat([]byte{header.TCPOptionNOP}, len(opts))
	for i := 0; i < len(opts) && opts[i] != header.TCPOptionEOL; {
		size := 1
		if kind := opts[i]; kind != header.TCPOptionNOP {
			if i+2 > len(opts) || opts[i+1] < 2 || i+int(opts[i+1]) > len(opts) {
				return nil, false
			}
			size = int(opts[i+1])
			if slices.Contains(plainSYNOptions[:], kind) {
				copy(out[i:], opts[i:i+size])
			}
		}
		i += size
	}
	return out, true
}
