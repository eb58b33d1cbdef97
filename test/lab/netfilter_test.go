package lab

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// nftAddTable adds a table of family inet by a netlink batch, as `nft add table inet ztlab` does.
func nftAddTable(ns *NS) error {
	return ns.Do(func() error {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		msg := func(typ, flags uint16, family byte, resID uint16, attrs []byte) []byte {
			b := make([]byte, unix.NLMSG_HDRLEN+4, 64)
			binary.NativeEndian.PutUint16(b[4:], typ)
			binary.NativeEndian.PutUint16(b[6:], flags)
			b[unix.NLMSG_HDRLEN] = family
			binary.BigEndian.PutUint16(b[unix.NLMSG_HDRLEN+2:], resID)
			b = append(b, attrs...)
			binary.NativeEndian.PutUint32(b, uint32(len(b)))
			return b
		}
		name := append([]byte{10, 0, unix.NFTA_TABLE_NAME, 0}, "ztlab\x00\x00\x00"...) // nla_len 4+6, padded to 12
		batch := msg(unix.NFNL_MSG_BATCH_BEGIN, unix.NLM_F_REQUEST, 0, unix.NFNL_SUBSYS_NFTABLES, nil)
		batch = append(batch, msg(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWTABLE, unix.NLM_F_REQUEST|unix.NLM_F_CREATE|
			unix.NLM_F_ACK, unix.NFPROTO_INET, 0, name)...)
		batch = append(batch, msg(unix.NFNL_MSG_BATCH_END, unix.NLM_F_REQUEST, 0, unix.NFNL_SUBSYS_NFTABLES, nil)...)
		if err := unix.Sendto(fd, batch, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			return err
		}
		buf := make([]byte, 4096)
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err != nil || n < unix.NLMSG_HDRLEN+4 {
			return err
		}
		if errno := -int32(binary.NativeEndian.Uint32(buf[unix.NLMSG_HDRLEN:])); errno != 0 {
			return unix.Errno(errno)
		}
		return nil
	})
}
