package e2e

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// What TestPast... send: packets that are to reach a TCP port of a pod's application past ztun.

// crafted is one attempt: the IP packets of it (fragments are several), and the sequence number that its TCP header
// has, by which a witness knows it again.
type crafted struct {
	kind  string
	seq   uint32
	parts [][]byte
}

// pastMark is in the upper half of each sequence number.
const pastMark = 0x5a54

// battery are all attempts against the ports of an application at an address. first is the source of what is not about
// sources; spoofed are others'. Ports are those of every rule there is, and of none.
func battery(to netip.Addr, first netip.Addr, spoofed []netip.Addr, ports []uint16) (out []crafted) {
	n := uint32(0)
	add := func(kind string, build func(seq uint32) [][]byte) {
		n++
		seq := pastMark<<16 | n
		out = append(out, crafted{kind, seq, build(seq)})
	}
	segment := func(src netip.Addr, sport, dport uint16, seq uint32, flags byte) []byte {
		p := tcpPacket(netip.AddrPortFrom(src, sport), netip.AddrPortFrom(to, dport), seq, 0, flags)
		s := append(p[len(ipHeader(src, to, 0)):], "more to cut"...)
		s[16], s[17] = 0, 0
		binary.BigEndian.PutUint16(s[16:], checksum(append(pseudo(src, to, unix.IPPROTO_TCP, len(s)), s...)))
		return s
	}
	sports := []uint16{15008, 15006, 15001, 15053, 53, 443, 61000, 65534, 40001}
	for _, src := range append([]netip.Addr{first}, spoofed...) {
		for _, sport := range sports {
			for _, dport := range ports {
				add("source port", func(seq uint32) [][]byte {
					return [][]byte{ipPacket(src, to, unix.IPPROTO_TCP, nil, segment(src, sport, dport, seq, tcpSYN))}
				})
			}
		}
	}
	const fin, psh, urg, ece, cwr = 0x01, 0x08, 0x20, 0x40, 0x80
	for _, flags := range []byte{tcpSYN | ece | cwr, tcpSYN | psh, tcpSYN | urg, tcpSYN | fin, tcpSYN | tcpRST, tcpSYN |
		tcpACK, tcpACK, tcpACK | psh, tcpACK | fin, tcpRST, 0, fin | psh | urg, 0xff} {
		add("flags", func(seq uint32) [][]byte {
			return [][]byte{ipPacket(first, to, unix.IPPROTO_TCP, nil, segment(first, 40002, ports[0], seq, flags))}
		})
	}
	syn := func(seq uint32) []byte { return segment(first, 15008, ports[0], seq, tcpSYN) }
	const tcp, udp, icmp6 = unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_ICMPV6
	for _, labels := range [][2]byte{{tcp, tcp}, {udp, tcp}, {tcp, udp}, {icmp6, tcp}, {tcp, icmp6}} {
		if to.Is4() {
			for i, l := range labels {
				if l == icmp6 {
					labels[i] = unix.IPPROTO_ICMP
				}
			}
		}
		for _, at := range []int{8, 16, 24} { // the last has all that a first fragment must have (RFC 7112)
			for _, reverse := range []bool{false, true} {
				add("fragments", func(seq uint32) [][]byte {
					parts := fragments(first, to, labels, uint16(seq), at, syn(seq))
					if reverse {
						slices.Reverse(parts)
					}
					return parts
				})
			}
		}
	}
	for _, decoy := range []uint16{15008, 53} { // two begins, of which rules may look at the one and TCP get the other
		for _, reverse := range []bool{false, true} {
			add("fragments", func(seq uint32) [][]byte {
				both := [2]byte{tcp, tcp}
				parts := fragments(first, to, both, uint16(seq), 24, syn(seq))
				other := fragments(first, to, both, uint16(seq), 24, segment(first, 15008, decoy, seq, tcpSYN))
				begins := [][]byte{other[0], parts[0]}
				if reverse {
					slices.Reverse(begins)
				}
				return append(begins, parts[1])
			})
		}
	}
	if to.Is4() {
		for _, o := range [][]byte{{1, 1, 1, 1}, {7, 7, 4, 0, 0, 0, 0, 0}, {68, 8, 5, 0, 0, 0, 0, 0}, {148, 4, 0, 0},
			{131, 7, 4, 127, 0, 0, 1, 1}, {137, 7, 4, 127, 0, 0, 1, 1}, {130, 11, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1},
			slices.Repeat([]byte{1}, 40)} {
			add("IP options", func(seq uint32) [][]byte {
				return [][]byte{ipPacket(first, to, unix.IPPROTO_TCP, o, syn(seq))}
			})
		}
	} else {
		pad := []byte{0, 0, 1, 4, 0, 0, 0, 0} // next header, length, PadN
		route := func(kind, left byte) []byte {
			return append([]byte{0, 2, kind, left, 0, 0, 0, 0}, to.AsSlice()...)
		}
		const hop, dest, routing, auth = 0, 60, 43, 51
		many := func(n int) (out []extension) {
			for range n {
				out = append(out, extension{dest, pad})
			}
			return out
		}
		for _, chain := range [][]extension{{{hop, pad}}, {{hop, []byte{0, 0, 5, 2, 0, 0, 1, 0}}}, many(1), many(2), many(14),
			many(15), many(16), many(17), many(60), {{routing, route(0, 0)}}, {{routing, route(0, 1)}}, {{routing, route(2, 1)}},
			{{routing, route(4, 0)}}, {{hop, pad}, {dest, pad}, {routing, route(4, 0)}, {dest, pad}},
			{{auth, []byte{0, 4, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}}}} {
			add("extension headers", func(seq uint32) [][]byte {
				next, body := extended(chain, syn(seq))
				return [][]byte{ipPacket(first, to, next, nil, body)}
			})
			add("extension headers, fragments", func(seq uint32) [][]byte {
				next, body := extended(chain, syn(seq))
				return fragments(first, to, [2]byte{next, unix.IPPROTO_TCP}, uint16(seq), 8, body)
			})
		}
		for _, next := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_ICMPV6, unix.IPPROTO_TCP} {
			add("extension headers, fragments", func(seq uint32) [][]byte { // one fragment that is all
				return [][]byte{ipPacket(first, to, 44, nil, append([]byte{next, 0, 0, 0, 0, 0, 0, byte(seq)}, syn(seq)...))}
			})
		}
	}
	for _, inner := range []netip.Addr{first, to} {
		whole := func(seq uint32) []byte {
			return ipPacket(inner, to, unix.IPPROTO_TCP, nil, segment(inner, 15008, ports[0], seq, tcpSYN))
		}
		ether := func(seq uint32) []byte {
			kind := uint16(unix.ETH_P_IPV6)
			if to.Is4() {
				kind = unix.ETH_P_IP
			}
			return binary.BigEndian.AppendUint16(make([]byte, 12, 64), kind)
		}
		same := byte(unix.IPPROTO_IPIP)
		if to.Is6() {
			same = unix.IPPROTO_IPV6
		}
		for what, wrap := range map[string]func(seq uint32) (proto byte, body []byte){
			"IP in IP": func(seq uint32) (byte, []byte) { return same, whole(seq) },
			"GRE": func(seq uint32) (byte, []byte) {
				return unix.IPPROTO_GRE, append([]byte{0, 0, ether(seq)[12], ether(seq)[13]}, whole(seq)...)
			},
			"GRE, Ethernet": func(seq uint32) (byte, []byte) {
				return unix.IPPROTO_GRE, slices.Concat([]byte{0, 0, 0x65, 0x58}, ether(seq), whole(seq))
			},
			"VXLAN": func(seq uint32) (byte, []byte) {
				return unix.IPPROTO_UDP, datagram(first, to, 40003, 4789, slices.Concat([]byte{8, 0, 0, 0, 0, 0, 1, 0}, ether(seq),
					whole(seq)))
			},
			"Geneve": func(seq uint32) (byte, []byte) {
				return unix.IPPROTO_UDP, datagram(first, to, 40003, 6081, slices.Concat([]byte{0, 0, 0x65, 0x58, 0, 0, 1, 0},
					ether(seq), whole(seq)))
			},
			"UDP":     func(seq uint32) (byte, []byte) { return unix.IPPROTO_UDP, syn(seq) },
			"SCTP":    func(seq uint32) (byte, []byte) { return unix.IPPROTO_SCTP, syn(seq) },
			"UDPLITE": func(seq uint32) (byte, []byte) { return unix.IPPROTO_UDPLITE, syn(seq) },
			"ICMP": func(seq uint32) (byte, []byte) { // an error about a connection of the application's
				return icmpError(to, first, ports[0], seq)
			},
		} {
			add("tunnel: "+what, func(seq uint32) [][]byte {
				proto, body := wrap(seq)
				return [][]byte{ipPacket(first, to, proto, nil, body)}
			})
		}
	}
	return out
}

// ipPacket is one with options, IPv4's, of a multiple of four bytes.
func ipPacket(src, dst netip.Addr, proto byte, options, body []byte) []byte {
	h := ipHeader(src, dst, len(options)+len(body))
	if src.Is6() {
		h[6] = proto
		return append(h, body...)
	}
	for len(options)%4 != 0 {
		options = append(options, 0)
		binary.BigEndian.PutUint16(h[2:], binary.BigEndian.Uint16(h[2:])+1)
	}
	h[0], h[9], h[10], h[11] = 0x40|byte(5+len(options)/4), proto, 0, 0
	h = append(h, options...)
	binary.BigEndian.PutUint16(h[10:], checksum(h))
	return append(h, body...)
}

// fragments are two, cut at a multiple of eight, each with a label of its own for what is inside.
func fragments(src, dst netip.Addr, labels [2]byte, id uint16, at int, body []byte) (out [][]byte) {
	for i, b := range [][]byte{body[:at], body[at:]} {
		off := uint16(0) // in bytes
		if i == 1 {
			off = uint16(at)
		}
		if src.Is4() {
			p := ipPacket(src, dst, labels[i], nil, b)
			binary.BigEndian.PutUint16(p[4:], id)
			binary.BigEndian.PutUint16(p[6:], off/8|uint16(1-i)<<13)
			p[10], p[11] = 0, 0
			binary.BigEndian.PutUint16(p[10:], checksum(p[:20]))
			out = append(out, p)
			continue
		}
		h := []byte{labels[i], 0, 0, 0, 0, 0, 0, 0}
		binary.BigEndian.PutUint16(h[2:], off|uint16(1-i))
		binary.BigEndian.PutUint16(h[6:], id)
		out = append(out, ipPacket(src, dst, 44, nil, append(h, b...)))
	}
	return out
}

// extension is one header of IPv6's, without the number of the next.
type extension struct {
	kind byte
	body []byte
}

// extended puts a chain of headers before a TCP segment: the first's number, and all of them.
func extended(chain []extension, body []byte) (first byte, out []byte) {
	first, out = unix.IPPROTO_TCP, body
	for _, e := range slices.Backward(chain) {
		h := slices.Clone(e.body)
		h[0] = first
		first, out = e.kind, append(h, out...)
	}
	return first, out
}

func datagram(src, dst netip.Addr, sport, dport uint16, body []byte) []byte {
	d := binary.BigEndian.AppendUint16(nil, sport)
	d = binary.BigEndian.AppendUint16(d, dport)
	d = binary.BigEndian.AppendUint16(d, uint16(8+len(body)))
	d = append(append(d, 0, 0), body...)
	binary.BigEndian.PutUint16(d[6:], checksum(append(pseudo(src, dst, unix.IPPROTO_UDP, len(d)), d...)))
	return d
}

// icmpError is "port unreachable" about a segment that the application at to is said to have sent.
func icmpError(to, from netip.Addr, port uint16, seq uint32) (proto byte, body []byte) {
	about := tcpPacket(netip.AddrPortFrom(to, port), netip.AddrPortFrom(from, 40004), seq, 0, tcpSYN)
	body = append([]byte{3, 3, 0, 0, 0, 0, 0, 0}, about...)
	if to.Is4() {
		binary.BigEndian.PutUint16(body[2:], checksum(body))
		return unix.IPPROTO_ICMP, body
	}
	body[0], body[1] = 1, 4
	binary.BigEndian.PutUint16(body[2:], checksum(append(pseudo(from, to, unix.IPPROTO_ICMPV6, len(body)), body...)))
	return unix.IPPROTO_ICMPV6, body
}

func pseudo(src, dst netip.Addr, proto byte, n int) []byte {
	p := append(append([]byte{}, src.AsSlice()...), dst.AsSlice()...)
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(p, uint32(n)), uint32(proto))
}
