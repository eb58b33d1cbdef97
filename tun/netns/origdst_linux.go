package netns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// soOriginalDst is SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST (linux/netfilter_ipv4.h, netfilter_ipv6/ip6_tables.h).
const soOriginalDst = 80

// OriginalDst is where an accepted connection was going before a REDIRECT rule sent it to its listener: what the
// kernel's connection tracking remembers, for IPv4 (also on a socket of both families) and IPv6. A connection that
// nothing has redirected was going to its local address.
func OriginalDst(c *net.TCPConn) (netip.AddrPort, error) {
	local := c.LocalAddr().(*net.TCPAddr).AddrPort()
	local = netip.AddrPortFrom(local.Addr().Unmap().WithZone(""), local.Port())
	rc, err := c.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	var dst netip.AddrPort
	var inner error
	err = rc.Control(func(fd uintptr) {
		if local.Addr().Is4() {
			// x/sys knows no option that is a sockaddr_in; this one's value has as many bytes: family, port, address.
			var m *unix.IPv6Mreq
			if m, inner = unix.GetsockoptIPv6Mreq(int(fd), unix.SOL_IP, soOriginalDst); inner == nil {
				b := m.Multiaddr
				dst = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), uint16(b[2])<<8|uint16(b[3]))
			}
			return
		}
		// As above: this one's value begins with a sockaddr_in6.
		var m *unix.IPv6MTUInfo
		if m, inner = unix.GetsockoptIPv6MTUInfo(int(fd), unix.SOL_IPV6, soOriginalDst); inner == nil {
			var port [2]byte // in network order
			binary.NativeEndian.PutUint16(port[:], m.Addr.Port)
			dst = netip.AddrPortFrom(netip.AddrFrom16(m.Addr.Addr), binary.BigEndian.Uint16(port[:]))
		}
	})
	switch {
	case err != nil:
		return netip.AddrPort{}, err
	case errors.Is(inner, unix.ENOENT), errors.Is(inner, unix.ENOPROTOOPT):
		return local, nil // not tracked; no netfilter at all
	case inner != nil:
		return netip.AddrPort{}, fmt.Errorf("the original destination of %s: %w", c.RemoteAddr(),
			os.NewSyscallError("getsockopt SO_ORIGINAL_DST", inner))
	}
	return dst, nil
}
