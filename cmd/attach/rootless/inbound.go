package rootless

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"ztun/cmd/attach"
	"ztun/netstack/usersock"
	"ztun/proxy/ports"
)

// Inbound is how the workload is reached, by listeners on the host's addresses, and what of the host it reaches.
type Inbound struct {
	// Mesh is where HBONE arrives; an address that is not valid stands for all of the host's. Port 0: where Announce
	// says, and by default the mesh's port, if it is free.
	Mesh netip.AddrPort
	// Publish are ports of the host's at which plaintext for ports of the workload's arrives.
	Publish []Published
	// Announced tells whether a record of the mesh says that HBONE arrives at an address.
	Announced func(netip.AddrPort) bool
	// Nameservers are those of the host, which may be on its loopback.
	Nameservers []netip.AddrPort
	// TUN is the workload's device, which somebody else has made and set up; nil: we make it, by the device file Device
	// ("": /dev/net/tun).
	TUN    *os.File
	Device string
}

// Published is one port.
type Published struct {
	At  netip.AddrPort // of the host; an address that is not valid stands for all
	To  uint16         // the workload's
	UDP bool           // else TCP
}

// maxListeners bounds how many addresses of a record are listened at: one of each family is what a record may have.
const maxListeners = 4

// listeners are the open ones, and whom they serve.
type listeners struct {
	of atomic.Pointer[workload] // nil: nobody, connections are reset

	mu        sync.Mutex
	published []*net.TCPListener
	mesh      map[netip.AddrPort]*net.TCPListener // by what was asked for
	closed    bool
	accepting sync.WaitGroup
	serving   sync.WaitGroup
}

// serve has w served from now on; nil: nobody.
func (l *listeners) serve(w *workload) { l.of.Store(w) }

// Open implements attach.Kind: what was asked for has to stand. By default the mesh's port is listened at as well: who
// has it already is another `ztun run`, mostly, and no reason not to run this one.
func (k *Kind) Open(ctx context.Context) error {
	for _, p := range k.in.Publish {
		if p.UDP {
			continue // publishUDP: there is nobody yet to whom a datagram could be given
		}
		ln, err := k.listen(ctx, p.At, false)
		if err != nil {
			k.Close()
			return fmt.Errorf("-p %s: %w", at(p.At), err)
		}
		k.open.published = append(k.open.published, ln)
		k.accept(ln, func(w *workload, conn *net.TCPConn) { w.publish(conn, p.To) })
	}
	if k.in.Mesh.Port() != 0 {
		if err := k.listenMesh(ctx, k.in.Mesh, false); err != nil {
			k.Close()
			return fmt.Errorf("--mesh-port %s: %w", at(k.in.Mesh), err)
		}
		return nil
	}
	if err := k.listenMesh(ctx, netip.AddrPortFrom(netip.Addr{}, ports.HBONE), false); err != nil {
		k.o.Logger("pods").Info("nobody reaches the workload by the mesh's default port", "error", err)
	}
	return nil
}

// Announce has HBONE listened for where the workload's record says that it arrives; what is listened at and is not
// among them any more is closed, the default as well. It has no effect where Inbound.Mesh says where to listen.
// The errors are those of addresses at which nobody listens now.
func (k *Kind) Announce(ctx context.Context, where []netip.AddrPort) error {
	if k.in.Mesh.Port() != 0 || len(where) == 0 {
		return nil
	}
	where = where[:min(len(where), maxListeners)]
	k.open.mu.Lock()
	for a, ln := range k.open.mesh {
		if !slices.Contains(where, a) {
			ln.Close()
			delete(k.open.mesh, a)
		}
	}
	k.open.mu.Unlock()
	var errs []error
	for _, a := range where {
		if err := k.listenMesh(ctx, a, true); err != nil {
			errs = append(errs, fmt.Errorf("nobody reaches the workload at %s, which its record announces: %w", a, err))
		}
	}
	return errors.Join(errs...)
}

// listenMesh accepts HBONE at an address, if that is not done already.
func (k *Kind) listenMesh(ctx context.Context, where netip.AddrPort, elsewhere bool) error {
	l := &k.open
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mesh[where] != nil || l.closed {
		return nil
	}
	ln, err := k.listen(ctx, where, elsewhere)
	if err != nil {
		return err
	}
	if l.mesh == nil {
		l.mesh = map[netip.AddrPort]*net.TCPListener{}
	}
	l.mesh[where] = ln
	k.accept(ln, (*workload).mesh)
	return nil
}

// listen opens a listener on the host. elsewhere: an address that is none of the host's is listened for on all.
func (k *Kind) listen(ctx context.Context, where netip.AddrPort, elsewhere bool) (*net.TCPListener, error) {
	lc := net.ListenConfig{KeepAliveConfig: k.o.Socket.KeepAlive, Control: k.o.Socket.Tune} // accepted ones inherit it
	lc.SetMultipathTCP(false)
	if !where.Addr().IsValid() {
		network, host := "tcp4", netip.IPv4Unspecified()
		if k.o.IPv6 {
			network, host = "tcp", netip.IPv6Unspecified()
		}
		ln, err := lc.Listen(ctx, network, netip.AddrPortFrom(host, where.Port()).String())
		if errors.Is(err, unix.EAFNOSUPPORT) && k.o.IPv6 { // a host without IPv6
			ln, err = lc.Listen(ctx, "tcp4", netip.AddrPortFrom(netip.IPv4Unspecified(), where.Port()).String())
		}
		if err != nil {
			return nil, listenError(where, err)
		}
		return ln.(*net.TCPListener), nil
	}
	ln, err := lc.Listen(ctx, "tcp", where.String())
	switch {
	case errors.Is(err, unix.EADDRNOTAVAIL) && elsewhere:
		return k.listen(ctx, netip.AddrPortFrom(netip.Addr{}, where.Port()), false)
	case err != nil:
		return nil, listenError(where, err)
	}
	return ln.(*net.TCPListener), nil
}

// listenError says what would help.
func listenError(where netip.AddrPort, err error) error {
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return fmt.Errorf("%w (another process listens there, a `ztun run` perhaps: choose another port)", err)
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w (choose a port above 1023, or as root: sysctl net.ipv4.ip_unprivileged_port_start=%d)", err,
			where.Port())
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return fmt.Errorf("%w (this host has no such address)", err)
	}
	return err
}

// at prints an address as it is given on the command line.
func at(a netip.AddrPort) string {
	if !a.Addr().IsValid() {
		return fmt.Sprint(a.Port())
	}
	return a.String()
}

// accept gives serve every connection of ln that somebody is there for.
func (k *Kind) accept(ln *net.TCPListener, serve func(*workload, *net.TCPConn)) {
	k.open.accepting.Go(k.o.Panics.Func("a listener", func() {
		attach.Accept(ln, k.o.Logger("pods"), func(conn *net.TCPConn) {
			w := k.open.of.Load()
			if w == nil || k.leaving.Load() {
				attach.Reset(conn)
				return
			}
			serve(w, conn)
		})
	}, nil))
}

// Close implements attach.Kind. Connections end with the workload, which is gone by now.
func (k *Kind) Close() error {
	l := &k.open
	l.mu.Lock()
	l.closed = true
	for _, ln := range l.published {
		ln.Close()
	}
	for _, ln := range l.mesh {
		ln.Close()
	}
	l.mu.Unlock()
	l.accepting.Wait()
	k.o.Panics.Wait(&l.serving)
	return nil
}

// mesh serves an accepted HBONE connection. It came to the host, and stands for the workload's address of its family;
// its CONNECTs may name the other.
func (w *workload) mesh(conn *net.TCPConn) {
	of := w.own(conn.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap().Is4())
	door := attach.Door{Label: w.spec.Label, At: netip.AddrPortFrom(of, ports.HBONE), Serve: w.h.ServeMesh}
	if serve := w.kind.o.Admit(door, conn); serve != nil {
		w.kind.open.serving.Go(w.kind.o.Panics.Func("a connection to the mesh port", serve, nil))
	}
}

// publish serves an accepted plaintext connection, as one to the workload's port.
func (w *workload) publish(conn *net.TCPConn, port uint16) {
	of := w.own(conn.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap().Is4())
	place := w.kind.o.Descriptors.Inbound(w.spec.Label, conn)
	f := w.kind.o.Published(place, conn, netip.AddrPortFrom(of, port))
	if f == nil {
		return
	}
	w.kind.open.serving.Go(w.kind.o.Panics.Func("a published connection", func() { w.h.ServePassthrough(f) }, nil))
}

// publishUDP opens the published UDP ports, at the host's addresses of each family that the workload has.
func (w *workload) publishUDP() error {
	for _, p := range w.kind.in.Publish {
		if !p.UDP {
			continue
		}
		opened := false
		for _, a := range w.spec.IPs {
			where := p.At
			switch {
			case where.Addr().IsValid() && where.Addr().Is4() != a.Is4():
				continue
			case where.Addr().IsValid():
			case a.Is4():
				where = netip.AddrPortFrom(netip.IPv4Unspecified(), where.Port())
			default:
				where = netip.AddrPortFrom(netip.IPv6Unspecified(), where.Port())
			}
			err := w.PublishUDP(usersock.Published{At: where, Pod: netip.AddrPortFrom(a, p.To),
				Local: seenAs(netip.IPv6Loopback(), a)})
			if errors.Is(err, unix.EAFNOSUPPORT) && !p.At.Addr().IsValid() {
				continue // a host without IPv6
			}
			if err != nil {
				return fmt.Errorf("-p %s/udp: %w", at(p.At), listenError(where, err))
			}
			opened = true
		}
		if !opened {
			return fmt.Errorf("-p %s/udp: the workload has no address of this family", at(p.At))
		}
	}
	return nil
}

// own is the workload's address of a family, or its only one.
func (w *workload) own(v4 bool) netip.Addr {
	for _, a := range w.spec.IPs {
		if a.Is4() == v4 {
			return a
		}
	}
	return w.spec.IPs[0]
}

// What an application sees as its client where that has no address which its namespace could answer: an IPv4 client in
// IPv6 by the prefix that is made for it (RFC 6052), any other by the address that stands for IPv4 where there is none
// (RFC 7600).
var (
	translated = netip.MustParsePrefix("64:ff9b::/96")
	dummy      = netip.MustParseAddr("192.0.0.8")
)

// seenAs is the address by which the application at dst sees the client src.
func seenAs(src, dst netip.Addr) netip.Addr {
	src = src.Unmap()
	if src == dst || src.Is4() == dst.Is4() && !src.IsLoopback() {
		return src
	}
	v4 := dummy
	if src.Is4() && !src.IsLoopback() {
		v4 = src
	}
	if dst.Is4() {
		return v4
	}
	b, four := translated.Addr().As16(), v4.As4()
	copy(b[12:], four[:])
	return netip.AddrFrom16(b)
}
