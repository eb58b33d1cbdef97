package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Netfilter lists every trace of netfilter in the namespace: legacy iptables tables, nf_tables tables and chains,
// conntrack entries. Nothing is the answer wanted. What the kernel does not have counts as nothing.
func (n *NS) Netfilter() ([]string, error) {
	var found []string
	for _, f := range []string{"ip_tables_names", "ip6_tables_names", "arp_tables_names", "nf_conntrack"} {
		b, err := n.ReadFile("/proc/net/" + f)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, line := range strings.Split(strings.TrimSpace(string(b)), "\n") {
			if line != "" {
				found = append(found, f+": "+line)
			}
		}
	}
	err := n.Do(func() error {
		for what, msg := range map[string]uint16{"nf_tables table": unix.NFT_MSG_GETTABLE,
			"nf_tables chain": unix.NFT_MSG_GETCHAIN} {
			names, err := nftDump(msg)
			if err != nil {
				return fmt.Errorf("%s: %w", what, err)
			}
			for _, name := range names {
				found = append(found, what+": "+name)
			}
		}
		return nil
	})
	return found, err
}

// nftDump asks nf_tables for all tables or chains of the calling thread's namespace; a kernel without nf_tables has
// none.
func nftDump(msg uint16) ([]string, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		if errors.Is(err, unix.EPROTONOSUPPORT) {
			return nil, nil
		}
		return nil, err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
		return nil, err
	}
	req := make([]byte, unix.NLMSG_HDRLEN+4) // nlmsghdr, nfgenmsg{family, version, res_id}
	binary.NativeEndian.PutUint32(req[0:], uint32(len(req)))
	binary.NativeEndian.PutUint16(req[4:], unix.NFNL_SUBSYS_NFTABLES<<8|msg)
	binary.NativeEndian.PutUint16(req[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	if err := unix.Sendto(fd, req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	var names []string
	buf := make([]byte, 64<<10)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			return nil, err
		}
		for b := buf[:n]; len(b) >= unix.NLMSG_HDRLEN; {
			l := int(binary.NativeEndian.Uint32(b))
			if l < unix.NLMSG_HDRLEN || l > len(b) {
				return nil, errors.New("bad netlink message")
			}
			switch typ := binary.NativeEndian.Uint16(b[4:]); typ {
			case unix.NLMSG_DONE:
				return names, nil
			case unix.NLMSG_ERROR:
				errno := unix.Errno(-int32(binary.NativeEndian.Uint32(b[unix.NLMSG_HDRLEN:])))
				if errno == unix.EINVAL || errno == unix.EOPNOTSUPP || errno == 0 {
					return names, nil // no such subsystem
				}
				return nil, errno
			default:
				names = append(names, attrName(b[unix.NLMSG_HDRLEN+4:l]))
			}
			l = (l + 3) &^ 3
			if l >= len(b) {
				break
			}
			b = b[l:]
		}
	}
}

// attrName joins the strings of the first two attributes that look like text.
func attrName(b []byte) string {
	var parts []string
	for len(b) >= 4 && len(parts) < 2 {
		l := int(binary.NativeEndian.Uint16(b))
		if l < 4 || l > len(b) {
			break
		}
		if v := strings.TrimRight(string(b[4:l]), "\x00"); len(v) > 0 && strings.IndexFunc(v, func(r rune) bool {
			return r < ' ' || r > '~'
		}) < 0 {
			parts = append(parts, v)
		}
		l = (l + 3) &^ 3
		if l > len(b) {
			break
		}
		b = b[l:]
	}
	return strings.Join(parts, "/")
}
