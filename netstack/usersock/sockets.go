package usersock

import (
	"errors"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"ztun/proxy/fair"
	"ztun/proxy/rescue"
)

// Datagram is what passes, in either direction.
type Datagram struct {
	// Echo: a ping or its answer. Payload is the ICMP message then, and the pod's port its identifier.
	Echo      bool
	Pod, Peer netip.AddrPort // of one family; of an echo the peer has no port
	// Payload is the receiver's during the call only.
	Payload []byte
	// Segment, if not 0, says that Payload is several datagrams of so many bytes each, the last perhaps shorter.
	Segment int
	// TTL is the hop limit that it is to leave with, 0 the host's own. Not set on what comes in.
	TTL uint8
	// DF: it is not to be fragmented on its way. Not set on what comes in.
	DF bool
}

// Failure is an ICMP error about a datagram that the pod has sent.
type Failure struct {
	Echo      bool
	Pod, Peer netip.AddrPort
	From      netip.Addr // who says so; the zero Addr: this host
	// Type and Code are those of ICMP, of ICMPv6 if Peer is IPv6.
	Type, Code uint8
	MTU        int    // what would fit, where the datagram was too large
	Seq        uint16 // of the ping that it is about: traceroute tells its probes apart by it
}

// Options is what Sockets are made of.
type Options struct {
	// Deliver and Fail get what comes in; they must not wait. The arguments' memory is theirs during the call only.
	Deliver func(Datagram)
	Fail    func(Failure)
	// Turned, if set, is told of each mapping that a bound turned away, and of the peer it was first made for.
	Turned func(peer netip.Addr, evicted bool)
	// Descriptor, if set, takes a place for a socket, which end makes free when somebody else needs it; nil: there is
	// none. What it returns gives the place back.
	Descriptor func(end func()) (release func())
	// MaxSockets bounds the mappings, each of which is a descriptor (default 1024); at the bound the peer with the most
	// loses its oldest.
	MaxSockets int
	Panics     *rescue.Panics
}

const (
	defaultMaxSockets = 1024
	// maxPeers bounds the peers that a mapping lets in; beyond, one is forgotten that has not been spoken to for longest.
	maxPeers = 4096

	tick     = 10 * time.Second
	udpLife  = 5 * time.Minute
	echoLife = time.Minute
)

// ErrNoPing is the error of a ping where the host lets nobody of this process's groups have ICMP sockets.
var ErrNoPing = errors.New("the host's net.ipv4.ping_group_range leaves out this process's groups: pings cannot " +
	"leave; as root: sysctl net.ipv4.ping_group_range='0 2147483647'")

// ErrBound is the error of a datagram for which there is no place, ErrClosed that of one after Close.
var (
	ErrBound  = errors.New("too many UDP mappings")
	ErrClosed = os.ErrClosed
)

// Stats are the counters and gauges.
type Stats struct {
	Sockets                          int
	Opened, Evicted, Refused, Ended  uint64
	Sent, SentBytes, Received, Bytes uint64
	// Dropped could not be sent, Filtered came from who was not spoken to.
	Dropped, Filtered, Failures uint64
}

// Sockets are one pod's mappings. All methods may be called at the same time.
type Sockets struct {
	o       Options
	places  *fair.Ledger[netip.Addr]
	intakes sync.Pool

	mu     sync.Mutex
	by     map[key]*socket
	tick   uint32
	timer  *time.Timer
	closed bool
	work   sync.WaitGroup

	opened, evicted, refused, ended  atomic.Uint64
	sent, sentBytes, received, bytes atomic.Uint64
	dropped, filtered, failures      atomic.Uint64
}

type key struct {
	echo bool
	pod  netip.AddrPort
}

// socket is one mapping.
type socket struct {
	s    *Sockets
	key  key
	at   *Published // nil: it is there for whom the pod speaks to
	file *os.File
	rc   syscall.RawConn
	over atomic.Bool // its reader is to end

	mu    sync.Mutex
	place *fair.Place[netip.Addr]
	free  func()                // gives the descriptor's place back
	peers map[netip.Addr]uint32 // whom the pod has spoken to, and when (Sockets.tick)
	seen  uint32
	gone  bool
	df    bool
	// oneByOne: datagrams of so many bytes and more are not sent together; 0: the kernel has refused none yet.
	oneByOne int
}

// New makes an empty set.
func New(o Options) *Sockets {
	if o.MaxSockets <= 0 {
		o.MaxSockets = defaultMaxSockets
	}
	s := &Sockets{o: o, by: map[key]*socket{}}
	s.intakes.New = func() any { return new(intake) }
	s.places = fair.NewLedger(fair.LedgerOptions[netip.Addr]{Limit: int64(o.MaxSockets),
		Turned: func(peer netip.Addr, evicted bool) {
			if evicted {
				s.evicted.Add(1)
			} else {
				s.refused.Add(1)
			}
			if o.Turned != nil {
				o.Turned(peer, evicted)
			}
		}})
	return s
}

// Send sends a datagram of the pod's. It never waits: what the socket's buffer has no room for is dropped and
// counted. What the host itself says against it (no route, too large) goes to Options.Fail, as if a router had said
// it.
func (s *Sockets) Send(d Datagram) error {
	if !d.Pod.IsValid() || !d.Peer.IsValid() || d.Pod.Addr().Is4() != d.Peer.Addr().Is4() || d.Echo && len(d.Payload) < 8 {
		return unix.EINVAL
	}
	k := key{d.Echo, d.Pod}
	s.mu.Lock()
	c, now := s.by[k], s.tick
	s.mu.Unlock()
	if c == nil {
		var err error
		if c, err = s.open(k, d.Peer.Addr()); err != nil {
			s.dropped.Add(1)
			s.hostSays(&d, err)
			return err
		}
	}
	c.spoke(d.Peer.Addr(), now)
	err := c.send(&d)
	if err != nil {
		s.dropped.Add(1)
		s.hostSays(&d, err)
		return err
	}
	s.sent.Add(1)
	s.sentBytes.Add(uint64(len(d.Payload)))
	return nil
}

// open makes a mapping.
func (s *Sockets) open(k key, peer netip.Addr) (*socket, error) {
	c := &socket{s: s, key: k, peers: map[netip.Addr]uint32{}}
	place, free := s.places.Take(fair.Group(peer), 1, c.end), func() {}
	if place != nil && s.o.Descriptor != nil {
		free = s.o.Descriptor(c.end)
	}
	if place == nil || free == nil {
		place.Release()
		return nil, ErrBound
	}
	fd, err := newSocket(k)
	if err != nil {
		place.Release()
		free()
		return nil, err
	}
	file := os.NewFile(uintptr(fd), "udp")
	rc, err := file.SyscallConn()
	if err != nil {
		place.Release()
		free()
		file.Close()
		return nil, err
	}
	s.mu.Lock()
	c.mu.Lock()
	before := s.by[k]
	if s.closed || c.gone || before != nil {
		closed := s.closed
		c.gone = true
		c.mu.Unlock()
		s.mu.Unlock()
		place.Release()
		free()
		file.Close()
		switch {
		case before != nil: // somebody else was first
			return before, nil
		case closed:
			return nil, ErrClosed
		}
		return nil, ErrBound
	}
	c.place, c.free, c.file, c.rc, c.seen = place, free, file, rc, s.tick
	c.mu.Unlock()
	s.by[k] = c
	if s.timer == nil {
		s.timer = time.AfterFunc(tick, s.o.Panics.Func("the end of mappings", s.sweep, nil))
	}
	s.work.Go(s.o.Panics.Func("a mapping's reader", c.read, func(error) { c.end() }))
	s.mu.Unlock()
	s.opened.Add(1)
	return c, nil
}

// spoke notes that the pod has spoken to a peer, who may answer from now on.
func (c *socket) spoke(peer netip.Addr, now uint32) {
	if c.at != nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seen = now
	if _, known := c.peers[peer]; !known && len(c.peers) >= maxPeers {
		oldest, at, n := netip.Addr{}, uint32(0), 0
		for p, t := range c.peers { // of a few: Go begins anywhere
			if n == 0 || now-t > now-at {
				oldest, at = p, t
			}
			if n++; n == 16 {
				break
			}
		}
		delete(c.peers, oldest)
	}
	c.peers[peer] = now
}

// admits reports whether the pod has spoken to a peer, or anybody may speak to it.
func (c *socket) admits(peer netip.Addr) bool {
	if c.at != nil {
		return true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	_, ok := c.peers[peer]
	return ok
}

// end ends a mapping: its reader finds the socket closed.
func (c *socket) end() {
	c.s.mu.Lock()
	if c.s.by[c.key] == c {
		delete(c.s.by, c.key)
	}
	c.s.mu.Unlock()
	c.mu.Lock()
	c.gone = true
	place, free, file := c.place, c.free, c.file
	c.mu.Unlock()
	c.over.Store(true)
	place.Release()
	if file != nil { // else open sees to it
		file.Close()
		free()
	}
}

// sweep ends the mappings by which the pod has not spoken for their time.
func (s *Sockets) sweep() {
	var over []*socket
	s.mu.Lock()
	s.tick++
	published := 0
	for k, c := range s.by {
		if c.at != nil {
			published++
			continue
		}
		life := udpLife
		if k.echo {
			life = echoLife
		}
		c.mu.Lock()
		if time.Duration(s.tick-c.seen-1)*tick >= life {
			over = append(over, c)
		}
		c.mu.Unlock()
	}
	switch {
	case s.closed:
	case len(s.by)-published == len(over):
		s.timer = nil
	default:
		s.timer.Reset(tick)
	}
	s.mu.Unlock()
	for _, c := range over {
		c.end()
	}
	s.ended.Add(uint64(len(over)))
}

// Close ends all mappings and waits for their readers. It must not be called from Deliver or Fail.
func (s *Sockets) Close() {
	s.mu.Lock()
	s.closed = true
	if s.timer != nil {
		s.timer.Stop()
	}
	all := make([]*socket, 0, len(s.by))
	for _, c := range s.by {
		all = append(all, c)
	}
	s.mu.Unlock()
	for _, c := range all {
		c.end()
	}
	s.work.Wait()
}

// Stats returns the figures of this moment.
func (s *Sockets) Stats() Stats {
	s.mu.Lock()
	n := len(s.by)
	s.mu.Unlock()
	return Stats{
		Sockets: n, Opened: s.opened.Load(), Evicted: s.evicted.Load(), Refused: s.refused.Load(), Ended: s.ended.Load(),
		Sent: s.sent.Load(), SentBytes: s.sentBytes.Load(), Received: s.received.Load(), Bytes: s.bytes.Load(),
		Dropped: s.dropped.Load(), Filtered: s.filtered.Load(), Failures: s.failures.Load(),
	}
}
