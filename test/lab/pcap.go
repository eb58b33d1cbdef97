package lab

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"sort"
	"strings"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
)

// Packet is what the tests want to know of a captured packet.
type Packet struct {
	Time               time.Time
	Src, Dst           netip.AddrPort // ports 0 unless TCP or UDP
	Proto              layers.IPProtocol
	SYN, ACK, FIN, RST bool
	Seq, AckNum        uint32
	Payload            []byte // of TCP or UDP, as far as the snap length reaches
	Len                int    // of the IP packet on the wire
	ICMP               string // type and code in words, "" unless ICMP
	Raw                []byte // the IP packet, as far as captured
}

// Packets is a capture, in order of arrival.
type Packets []Packet

// ParsePcap reads a pcap file with link type Ethernet, raw IP, or Linux cooked (v1, v2); packets that are not IP are
// left out.
func ParsePcap(b []byte) (Packets, error) {
	r, err := pcapgo.NewReader(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("pcap: %w", err)
	}
	var out Packets
	for {
		data, ci, err := r.ReadPacketData()
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				return out, nil // the last packet may be cut
			}
			return out, fmt.Errorf("pcap: %w", err)
		}
		ip, strip := stripLink(int(r.LinkType()), data)
		if ip == nil {
			continue
		}
		if p, ok := parseIP(ip); ok {
			p.Time, p.Len = ci.Timestamp, ci.Length-strip
			out = append(out, p)
		}
	}
}

// stripLink takes the link header off; nil if what is left is not IP.
func stripLink(link int, b []byte) (ip []byte, n int) {
	ethertype := func(at, hdr int) ([]byte, int) {
		if len(b) < hdr || len(b) < at+2 {
			return nil, 0
		}
		switch binary.BigEndian.Uint16(b[at:]) {
		case 0x0800, 0x86dd:
			return b[hdr:], hdr
		}
		return nil, 0
	}
	switch link {
	case 1:
		return ethertype(12, 14)
	case 12, 101, 228, 229:
		return b, 0
	case 113: // SLL: protocol at 14, header 16. A TUN has no link header at all: protocol is filled in all the same.
		return ethertype(14, 16)
	case 276: // SLL2: protocol at 0, header 20
		return ethertype(0, 20)
	}
	return nil, 0
}

func parseIP(b []byte) (Packet, bool) {
	if len(b) == 0 {
		return Packet{}, false
	}
	first := gopacket.LayerType(layers.LayerTypeIPv4)
	if b[0]>>4 == 6 {
		first = layers.LayerTypeIPv6
	}
	pk := gopacket.NewPacket(b, first, gopacket.DecodeOptions{Lazy: true, NoCopy: true})
	p := Packet{Raw: b}
	var src, dst netip.Addr
	switch l := pk.NetworkLayer().(type) {
	case *layers.IPv4:
		src, _ = netip.AddrFromSlice(l.SrcIP.To4())
		dst, _ = netip.AddrFromSlice(l.DstIP.To4())
		p.Proto = l.Protocol
	case *layers.IPv6:
		src, _ = netip.AddrFromSlice(l.SrcIP)
		dst, _ = netip.AddrFromSlice(l.DstIP)
		p.Proto = l.NextHeader
	default:
		return Packet{}, false
	}
	var sport, dport uint16
	switch l := pk.TransportLayer().(type) {
	case *layers.TCP:
		sport, dport = uint16(l.SrcPort), uint16(l.DstPort)
		p.Proto = layers.IPProtocolTCP
		p.SYN, p.ACK, p.FIN, p.RST = l.SYN, l.ACK, l.FIN, l.RST
		p.Seq, p.AckNum, p.Payload = l.Seq, l.Ack, l.Payload
	case *layers.UDP:
		sport, dport = uint16(l.SrcPort), uint16(l.DstPort)
		p.Proto, p.Payload = layers.IPProtocolUDP, l.Payload
	}
	if l, ok := pk.Layer(layers.LayerTypeICMPv4).(*layers.ICMPv4); ok {
		p.ICMP = l.TypeCode.String()
	}
	if l, ok := pk.Layer(layers.LayerTypeICMPv6).(*layers.ICMPv6); ok {
		p.ICMP = l.TypeCode.String()
	}
	p.Src, p.Dst = netip.AddrPortFrom(src, sport), netip.AddrPortFrom(dst, dport)
	return p, true
}

// String is one line in the manner of tcpdump.
func (p Packet) String() string {
	var fl strings.Builder
	for _, f := range []struct {
		on bool
		s  string
	}{{p.SYN, "S"}, {p.FIN, "F"}, {p.RST, "R"}, {p.ACK, "."}} {
		if f.on {
			fl.WriteString(f.s)
		}
	}
	return fmt.Sprintf("%s %v %v > %v [%s] %s len %d payload %d", p.Time.Format("15:04:05.000000"), p.Proto, p.Src, p.Dst,
		&fl, p.ICMP, p.Len, len(p.Payload))
}

// String shows at most 60 packets.
func (ps Packets) String() string {
	var b strings.Builder
	for i, p := range ps {
		if i == 60 {
			fmt.Fprintf(&b, "... and %d more\n", len(ps)-i)
			break
		}
		b.WriteString(p.String() + "\n")
	}
	return b.String()
}

// Where keeps what f likes.
func (ps Packets) Where(f func(Packet) bool) Packets {
	var out Packets
	for _, p := range ps {
		if f(p) {
			out = append(out, p)
		}
	}
	return out
}

// Between keeps the packets between two addresses, both ways.
func (ps Packets) Between(a, b netip.Addr) Packets {
	return ps.Where(func(p Packet) bool {
		return p.Src.Addr() == a && p.Dst.Addr() == b || p.Src.Addr() == b && p.Dst.Addr() == a
	})
}

// TCP keeps TCP packets.
func (ps Packets) TCP() Packets {
	return ps.Where(func(p Packet) bool { return p.Proto == layers.IPProtocolTCP })
}

// Port keeps TCP and UDP packets from or to a port.
func (ps Packets) Port(port uint16) Packets {
	return ps.Where(func(p Packet) bool { return p.Src.Port() == port || p.Dst.Port() == port })
}

// ServerPorts are the destination ports of the SYNs (without ACK), sorted: who was called.
func (ps Packets) ServerPorts() []uint16 {
	seen := map[uint16]bool{}
	for _, p := range ps {
		if p.SYN && !p.ACK {
			seen[p.Dst.Port()] = true
		}
	}
	out := make([]uint16, 0, len(seen))
	for port := range seen {
		out = append(out, port)
	}
	sort.Slice(out, func(i, j int) bool { return out[i] < out[j] })
	return out
}

// Contains tells whether any captured packet holds the bytes (headers included: nothing is left out by a wrong parse).
func (ps Packets) Contains(b []byte) bool {
	for _, p := range ps {
		if bytes.Contains(p.Raw, b) {
			return true
		}
	}
	return false
}

// Bytes adds up the lengths on the wire.
func (ps Packets) Bytes() int64 {
	var n int64
	for _, p := range ps {
		n += int64(p.Len)
	}
	return n
}

// SYNs, SYNACKs and RSTs keep the packets of that kind.
func (ps Packets) SYNs() Packets    { return ps.Where(func(p Packet) bool { return p.SYN && !p.ACK }) }
func (ps Packets) SYNACKs() Packets { return ps.Where(func(p Packet) bool { return p.SYN && p.ACK }) }
func (ps Packets) RSTs() Packets    { return ps.Where(func(p Packet) bool { return p.RST }) }
