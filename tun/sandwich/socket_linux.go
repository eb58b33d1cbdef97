package sandwich

import (
	"bytes"
	"encoding/binary"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"ztun/tun/netns"
)

// tcpSynSent is the state of a socket that waits for the answer to its SYN (include/net/tcp_states.h).
const tcpSynSent = 2

// Connecting says whether a namespace has a TCP socket that has sent a SYN from local to remote and waits for the
// answer. One that is connected already, or that the kernel remembers for a minute after its end, has not sent the SYN
// that somebody asks about. The kernel is asked for this one alone (inet_diag(7)); where there is none it offers a
// listener, which does not count either.
func Connecting(ns *netns.NS, local, remote netip.AddrPort) (bool, error) {
	var id [16 * 3]byte // struct inet_diag_sockid
	binary.BigEndian.PutUint16(id[0:], local.Port())
	binary.BigEndian.PutUint16(id[2:], remote.Port())
	copy(id[4:20], local.Addr().AsSlice())
	copy(id[20:36], remote.Addr().AsSlice())
	ask := append([]byte{unix.AF_INET, unix.IPPROTO_TCP, 0, 0, 0xff, 0xff, 0xff, 0xff}, id[:40]...)
	if local.Addr().Is6() {
		ask[0] = unix.AF_INET6
	}
	ask = append(ask, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff) // no cookie
	var found bool
	err := ns.Do(func() error {
		req := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, 0)
		req.AddRawData(ask)
		msgs, err := req.Execute(unix.NETLINK_INET_DIAG, nl.SOCK_DIAG_BY_FAMILY)
		if err == unix.ENOENT {
			return nil
		}
		for _, m := range msgs {
			found = found || len(m) >= 40 && m[1] == tcpSynSent && bytes.Equal(m[4:40], id[:36])
		}
		return err
	})
	return found, err
}

// Ends tells, until done is closed, when a pod's end of S has gone. Whoever calls it reads ends until it is closed.
func Ends(s *netns.NS, done chan struct{}) (ends <-chan netlink.LinkUpdate, err error) {
	links := make(chan netlink.LinkUpdate, 16)
	// The socket belongs to the namespace in which it is opened.
	if err := s.Do(func() error { return netlink.LinkSubscribe(links, done) }); err != nil {
		close(links)
		return links, err
	}
	return links, nil
}

// Ended says that an update is the end of the pod's end.
func Ended(u netlink.LinkUpdate) bool {
	return u.Header.Type == unix.RTM_DELLINK && u.Attrs().Name == In
}
