package attach

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"ztun/tun/netns"
)

// Connections of the pod's kernel that no stack knows: a daemon that was killed had their other ends. What has
// something to send finds out by itself; a client that only reads, or a server whose client is gone, would wait for
// ever.

// Orphan is such a connection, as the pod's kernel sees it.
type Orphan struct{ Local, Remote netip.AddrPort }

const (
	// orphanRounds, orphanWait: a kernel lets itself be asked once in half a second per connection, and a packet may
	// be lost.
	orphanRounds = 5
	orphanWait   = 600 * time.Millisecond
	// orphanBatch are asked at once, between pauses: fewer than the device's queue holds.
	orphanBatch = 256
)

// Orphans lists the connections of a pod's namespace that would go through its device, from the pod's addresses to
// any but its own, and that may rest for ever: the others repeat themselves, or end by a timer.
func Orphans(ns *netns.NS, own []netip.Addr) (out []Orphan, err error) {
	all, err := connections(ns, own)
	for _, c := range all {
		if c.state == tcpEstablished || c.state == tcpFinWait2 || c.state == tcpCloseWait {
			out = append(out, Orphan{c.Local, c.Remote})
		}
	}
	return out, err
}

// Conn is a connection of a pod's that goes on.
type Conn struct {
	Local, Remote netip.AddrPort
	// Socket is the number of the application's file; 0 before it has accepted the connection, and after it has closed it
	// with something left to be sent.
	Socket uint64
}

// Unfinished lists the connections of a pod's namespace that have something to send or to get, where Orphans would list
// them, but for those that a client has only begun.
func Unfinished(ns *netns.NS, own []netip.Addr) (out []Conn, err error) {
	all, err := connections(ns, own)
	for _, c := range all {
		switch c.state {
		case tcpSynRecv, tcpTimeWait, tcpClose, tcpListen:
		default:
			out = append(out, c.Conn)
		}
	}
	return out, err
}

// connection is a line of the kernel's table.
type connection struct {
	Conn
	state uint64
}

// connections lists those of a namespace from an address of own to any other.
func connections(ns *netns.NS, own []netip.Addr) ([]connection, error) {
	var files []*os.File
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	// A table belongs to the namespace in which it was opened; it is read outside.
	err := ns.Do(func() error {
		for _, name := range []string{"tcp", "tcp6"} {
			f, err := os.Open("/proc/thread-self/net/" + name)
			if os.IsNotExist(err) && name == "tcp6" {
				continue // a kernel without IPv6
			}
			if err != nil {
				return err
			}
			files = append(files, f)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	var all []connection
	for _, f := range files {
		found, err := parseTCPTable(f)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.Name(), err)
		}
		for _, o := range found {
			if slices.Contains(own, o.Local.Addr()) && !slices.Contains(own, o.Remote.Addr()) {
				all = append(all, o)
			}
		}
	}
	return all, nil
}

// States of connections (include/net/tcp_states.h).
const (
	tcpEstablished = 1
	tcpSynRecv     = 3
	tcpFinWait2    = 5
	tcpTimeWait    = 6
	tcpClose       = 7
	tcpCloseWait   = 8
	tcpListen      = 10
)

// parseTCPTable reads /proc/net/tcp or tcp6.
func parseTCPTable(r io.Reader) ([]connection, error) {
	var out []connection
	lines := bufio.NewScanner(r)
	lines.Scan() // the headings
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) < 10 {
			return nil, fmt.Errorf("%q is no line of a table of connections", lines.Text())
		}
		var o connection
		var err error
		if o.state, err = strconv.ParseUint(f[3], 16, 8); err == nil {
			o.Socket, err = strconv.ParseUint(f[9], 10, 64)
		}
		if err != nil {
			return nil, fmt.Errorf("%q is no line of a table of connections: %w", lines.Text(), err)
		}
		if o.Local, err = parseTCPAddr(f[1]); err == nil {
			o.Remote, err = parseTCPAddr(f[2])
		}
		if err != nil {
			return nil, err
		}
		out = append(out, o)
	}
	return out, lines.Err()
}

// parseTCPAddr reads ADDRESS:PORT in hexadecimal, the address in words of 32 bits of the host's byte order.
func parseTCPAddr(s string) (netip.AddrPort, error) {
	host, port, _ := strings.Cut(s, ":")
	b, err := hex.DecodeString(host)
	if err != nil || len(b) != 4 && len(b) != 16 {
		return netip.AddrPort{}, fmt.Errorf("%q is no address of a table of connections", s)
	}
	for w := b; len(w) > 0; w = w[4:] {
		binary.NativeEndian.PutUint32(w, binary.BigEndian.Uint32(w))
	}
	n, err := strconv.ParseUint(port, 16, 16)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("%q is no address of a table of connections: %w", s, err)
	}
	a, _ := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(a.Unmap(), uint16(n)), nil
}

// EndOrphans resets connections that were there before the stack was, until none is left or ctx ends.
func (s *Stack) EndOrphans(ctx context.Context, ns *netns.NS, found []Orphan) {
	left := found
	for range orphanRounds {
		for i, o := range left {
			s.EndOrphan(o.Local, o.Remote)
			if i%orphanBatch == orphanBatch-1 && !pause(ctx, 5*time.Millisecond) {
				return
			}
		}
		if !pause(ctx, orphanWait) {
			return
		}
		now, err := Orphans(ns, s.addrs)
		if err != nil {
			s.log.Warn("the pod's connections of an earlier run cannot be listed", "pod", s.label, "error", err)
			return
		}
		still := make(map[Orphan]bool, len(now))
		for _, o := range now {
			still[o] = true
		}
		left = slices.DeleteFunc(slices.Clone(left), func(o Orphan) bool { return !still[o] })
		if len(left) == 0 {
			break
		}
	}
	s.log.Info("reset connections of an earlier run", "pod", s.label, "count", len(found)-len(left), "left", len(left))
}

// pause waits; false: ctx has ended.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
