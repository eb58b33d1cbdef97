package attach

import (
	"context"
	"net"
	"net/netip"
	"os"

	"ztun/admin/fdstore"
	"ztun/tun/netns"
)

// Listener is a TCP listener that the next life of this process finds again, should this one be killed and should
// there be a store (Options.Store).
type Listener struct {
	*net.TCPListener
	keepAlive *net.KeepAliveConfig // of its connections, if that is not Go's doing; nil: it is
	slot      slot
}

// slot is a socket's place in the store.
type slot struct {
	store *fdstore.Store
	name  string
}

// Release takes the socket out of the store, which has happened when that is flushed. Closing it does so, too; but who
// has several to close, or empties its queue before, releases them first.
func (s slot) Release() { s.store.Drop(s.name) }

// Release is the slot's.
func (l *Listener) Release() { l.slot.Release() }

// AcceptTCP is net.TCPListener's.
func (l *Listener) AcceptTCP() (*net.TCPConn, error) {
	c, err := l.TCPListener.AcceptTCP()
	if err == nil && l.keepAlive != nil {
		c.SetKeepAliveConfig(*l.keepAlive)
	}
	return c, err
}

// Accept is net.Listener's.
func (l *Listener) Accept() (net.Conn, error) {
	c, err := l.AcceptTCP()
	if err != nil {
		return nil, err
	}
	return c, nil
}

// Close is net.Listener's.
func (l *Listener) Close() error {
	l.Release()
	return l.TCPListener.Close()
}

// packets is a UDP socket of which the same is true.
type packets struct {
	*net.UDPConn
	slot slot
}

func (p packets) Close() error {
	p.slot.Release()
	return p.UDPConn.Close()
}

// ListenMesh is netns.ListenTransparent, or the listener that an earlier life had there.
func (o *Options) ListenMesh(ctx context.Context, ns *netns.NS, port uint16, s netns.SocketOptions) (*Listener, error) {
	at := netip.AddrPortFrom(netip.IPv6Unspecified(), port)
	place := slotOf(o.Store, ns, "tcp", at)
	if l := adopt(o, place, func(f *os.File) (*net.TCPListener, error) {
		return netns.AdoptTransparent(f, ns, port, o.IPv6, s)
	}); l != nil {
		alive := s.KeepAliveConfig()
		return &Listener{l, &alive, place}, nil
	}
	l, err := netns.ListenTransparent(ctx, ns, port, o.IPv6, s)
	if err != nil {
		return nil, err
	}
	place.store.Keep(place.name, l)
	return &Listener{l, nil, place}, nil
}

// Listen is net.Listen in ns with Control of s, or the listener that an earlier life had there.
func (o *Options) Listen(ns *netns.NS, network, addr string, s netns.SocketOptions) (net.Listener, error) {
	at, known := parse(addr)
	place := slot{}
	if known {
		place = slotOf(o.Store, ns, "tcp", at)
		if l := adopt(o, place, func(f *os.File) (*net.TCPListener, error) {
			return netns.AdoptListener(f, ns, at, s)
		}); l != nil {
			return &Listener{l, nil, place}, nil
		}
	}
	var ln net.Listener
	err := ns.Do(func() (err error) {
		lc := net.ListenConfig{Control: s.Control}
		lc.SetMultipathTCP(false)
		ln, err = lc.Listen(context.Background(), network, addr)
		return err
	})
	if err != nil || place.store == nil {
		return ln, err
	}
	l, isTCP := ln.(*net.TCPListener)
	if !isTCP {
		return ln, nil
	}
	place.store.Keep(place.name, l)
	return &Listener{l, nil, place}, nil
}

// ListenPacket is Listen for UDP: questions that come meanwhile wait in the socket.
func (o *Options) ListenPacket(ns *netns.NS, network, addr string, s netns.SocketOptions) (net.PacketConn, error) {
	at, known := parse(addr)
	place := slot{}
	if known {
		place = slotOf(o.Store, ns, "udp", at)
		if c := adopt(o, place, func(f *os.File) (*net.UDPConn, error) { return netns.AdoptPacket(f, ns, at, s) }); c != nil {
			return packets{c, place}, nil
		}
	}
	var pc net.PacketConn
	err := ns.Do(func() (err error) {
		lc := net.ListenConfig{Control: s.Control}
		pc, err = lc.ListenPacket(context.Background(), network, addr)
		return err
	})
	if err != nil || place.store == nil {
		return pc, err
	}
	c, isUDP := pc.(*net.UDPConn)
	if !isUDP {
		return pc, nil
	}
	place.store.Keep(place.name, c)
	return packets{c, place}, nil
}

// parse reads an address that names one; others (a port that is to be chosen) are nobody's to find again.
func parse(addr string) (netip.AddrPort, bool) {
	at, err := netip.ParseAddrPort(addr)
	return at, err == nil && at.Port() != 0
}

// slotOf is where a socket is kept; without a store none, whose methods do nothing. ns nil: the process's.
func slotOf(s *fdstore.Store, ns *netns.NS, network string, at netip.AddrPort) slot {
	if s == nil {
		return slot{}
	}
	if ns == nil {
		own, err := netns.Current()
		if err != nil {
			return slot{}
		}
		defer own.Close()
		ns = own
	}
	dev, ino := ns.ID()
	return slot{s, fdstore.Name(dev, ino, network, at)}
}

// adopt is the socket that an earlier life had in a slot, as it should be; the zero value: there is none.
func adopt[S any](o *Options, from slot, fit func(*os.File) (S, error)) (none S) {
	f := from.store.Take(from.name)
	if f == nil {
		return none
	}
	defer f.Close()
	s, err := fit(f)
	if err == nil {
		return s
	}
	o.Logger("pods").Warn("a socket of an earlier run is let go of: connections that wait there are reset", "socket",
		from.name, "error", err)
	from.Release()
	f.Close()
	from.store.Flush() // until then the address is in use
	return none
}
