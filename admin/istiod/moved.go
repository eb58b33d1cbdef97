package istiod

import (
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
)

// openConns are the connections that channels have open. They are handed out as they are, for gRPC sets options of TCP
// connections, and are found to be closed when somebody looks.
type openConns struct {
	mu    sync.Mutex
	conns []net.Conn
}

// add takes one more.
func (o *openConns) add(conn net.Conn) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.conns = append(slices.DeleteFunc(o.conns, isClosed), conn)
}

// take takes out those that are open and that the function says.
func (o *openConns) take(which func(net.Conn) bool) (taken []net.Conn) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.conns = slices.DeleteFunc(o.conns, isClosed)
	o.conns = slices.DeleteFunc(o.conns, func(c net.Conn) bool {
		if which(c) {
			taken = append(taken, c)
			return true
		}
		return false
	})
	return taken
}

// isClosed tells of a socket whether we have closed it.
func isClosed(conn net.Conn) bool {
	s, ok := conn.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := s.SyscallConn()
	return err != nil || raw.Control(func(uintptr) {}) != nil
}

// Moved takes which addresses this host has now, all of them. A connection from one that it has no longer gets no
// answer any more, which the kernel finds out after a quarter of an hour and HTTP/2's PING within 40 s: it is closed,
// so that its calls end at once and the next one connects anew. It returns how many there were.
func (c *Connector) Moved(host []netip.Addr) (closed int) {
	lost := c.open.take(func(conn net.Conn) bool { return stranded(conn.LocalAddr(), host) })
	for _, conn := range lost {
		conn.Close()
	}
	return len(lost)
}

// stranded tells whether a connection from the address from is one that a host with these addresses cannot have. All of
// 127.0.0.0/8 is every host's own.
func stranded(from net.Addr, host []netip.Addr) bool {
	tcp, ok := from.(*net.TCPAddr)
	if !ok {
		return false
	}
	a := tcp.AddrPort().Addr().Unmap().WithZone("")
	return !a.IsLoopback() && !slices.ContainsFunc(host, func(h netip.Addr) bool { return h.Unmap().WithZone("") == a })
}
