package netstack

import (
	"encoding/binary"
	"fmt"
	"strings"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// seg is a packet of a connection as it is queued, and as it is written.
type seg struct {
	v6       bool
	port     uint16
	flags    header.TCPFlags
	seq, ack uint32
	win      uint16
	opts     int
	size     int
	plain    bool // the device completes no checksum
}

func (s seg) packet() *stack.PacketBuffer {
	raw := tcpPacket(s.v6, s.opts, s.size)
	ipLen := 20
	if s.v6 {
		ipLen = 40
	}
	th := header.TCP(raw[ipLen:])
	th.SetSourcePort(4000 + s.port)
	th.SetSequenceNumber(s.seq)
	th.SetAckNumber(s.ack)
	th.SetFlags(uint8(s.flags))
	th.SetWindowSize(s.win)
	if s.opts > 0 { // a timestamp that is as old as the acknowledgement
		binary.BigEndian.PutUint32(th[20:], s.ack)
	}
	p := outgoing(raw, stack.GSO{Type: stack.GSOTCPv4, NeedsCsum: !s.plain, CsumOffset: 16, MSS: 1448})
	p.TransportProtocolNumber = header.TCPProtocolNumber
	p.NetworkProtocolNumber = header.IPv4ProtocolNumber
	if s.v6 {
		p.NetworkProtocolNumber = header.IPv6ProtocolNumber
	}
	return p
}

// written is what a device gets.
func written(v6 bool, b []byte) string {
	ipLen := 20
	if v6 {
		ipLen = 40
	}
	th := header.TCP(b[ipLen:])
	off := int(th.DataOffset())
	s := fmt.Sprintf("%d:%s seq %d ack %d win %d len %d", th.SourcePort()-4000,
		strings.ReplaceAll(th.Flags().String(), " ", ""), th.SequenceNumber(), th.AckNumber(), th.WindowSize(),
		len(b)-ipLen-off)
	if off > 20 {
		s += fmt.Sprint(" ts ", binary.BigEndian.Uint32(th[20:]))
	}
	return s
}

// TestMerge: of a connection's packets that have not been written yet only what is needed is, with the newest of what
// they say and in order; others' are not touched.
func TestMerge(t *testing.T) {
	const ack, psh, fin, syn, rst = header.TCPFlagAck, header.TCPFlagPsh, header.TCPFlagFin, header.TCPFlagSyn,
		header.TCPFlagRst
	data := seg{flags: ack | psh, seq: 10, ack: 5, win: 7, size: 4}
	end := seg{flags: ack | fin, seq: 14, ack: 6, win: 8}
	opening := seg{flags: syn, seq: 9}
	pure := func(n uint32) seg { return seg{flags: ack, seq: 10, ack: n, win: 7} }
	with := func(s seg, f func(*seg)) seg { f(&s); return s }
	v6 := func(s *seg) { s.v6 = true }
	opts := func(s *seg) { s.opts = 12 }
	plain := func(s *seg) { s.plain = true }
	for _, tc := range []struct {
		name string
		in   []seg
		out  []string
	}{
		{"FIN joins the last bytes", []seg{data, end}, []string{"0:FPA seq 10 ack 6 win 8 len 4"}},
		{"the newest timestamp", []seg{with(data, opts), with(end, opts)}, []string{"0:FPA seq 10 ack 6 win 8 len 4 ts 6"}},
		{"IPv6", []seg{with(data, v6), with(end, v6)}, []string{"0:FPA seq 10 ack 6 win 8 len 4"}},
		{"a newer acknowledgement", []seg{pure(5), pure(6)}, []string{"0:A seq 10 ack 6 win 7 len 0"}},
		{"one that data carries, and FIN", []seg{opening, pure(5), data, end},
			[]string{"0:S seq 9 ack 0 win 0 len 0", "0:FPA seq 10 ack 6 win 8 len 4"}},
		{"one that data carries, IPv6", []seg{with(opening, v6), with(pure(5), v6), with(data, v6)},
			[]string{"0:S seq 9 ack 0 win 0 len 0", "0:PA seq 10 ack 5 win 7 len 4"}},
		{"one that FIN carries", []seg{opening, pure(5), pure(6), with(end, func(s *seg) { s.seq = 10 })},
			[]string{"0:S seq 9 ack 0 win 0 len 0", "0:FA seq 10 ack 6 win 8 len 0"}},
		{"one that repeats data's", []seg{with(data, func(s *seg) { s.seq = 6 }), pure(5), data},
			[]string{"0:PA seq 6 ack 5 win 7 len 4", "0:A seq 10 ack 5 win 7 len 0",
				"0:PA seq 10 ack 5 win 7 len 4"}},
		{"one that repeats a super-packet's", []seg{opening, with(pure(4), func(s *seg) { s.size = 1449 }),
			with(pure(4), func(s *seg) { s.seq = 1459 }), with(end, func(s *seg) { s.seq, s.ack = 1459, 4 })},
			[]string{"0:S seq 9 ack 0 win 0 len 0", "0:A seq 10 ack 4 win 7 len 1449", "0:A seq 1459 ack 4 win 7 len 0",
				"0:FA seq 1459 ack 4 win 8 len 0"}},
		{"repeated ones before data", []seg{opening, pure(5), pure(5), data},
			[]string{"0:S seq 9 ack 0 win 0 len 0", "0:A seq 10 ack 5 win 7 len 0", "0:A seq 10 ack 5 win 7 len 0",
				"0:PA seq 10 ack 5 win 7 len 4"}},
		{"one of which nothing is known", []seg{pure(5), data},
			[]string{"0:A seq 10 ack 5 win 7 len 0", "0:PA seq 10 ack 5 win 7 len 4"}},
		{"across the end of the numbers", []seg{pure(1<<32 - 1), pure(3)}, []string{"0:A seq 10 ack 3 win 7 len 0"}},
		{"with others between", []seg{with(opening, func(s *seg) { s.port = 1 }), data,
			with(pure(5), func(s *seg) { s.port = 1 }), end, with(data, func(s *seg) { s.port = 1 })},
			[]string{"1:S seq 9 ack 0 win 0 len 0", "0:FPA seq 10 ack 6 win 8 len 4", "1:PA seq 10 ack 5 win 7 len 4"}},
		{"repeated acknowledgements tell of a loss", []seg{pure(5), pure(5)},
			[]string{"0:A seq 10 ack 5 win 7 len 0", "0:A seq 10 ack 5 win 7 len 0"}},
		{"selective ones as well", []seg{with(pure(5), opts), pure(6)},
			[]string{"0:A seq 10 ack 5 win 7 len 0 ts 5", "0:A seq 10 ack 6 win 7 len 0"}},
		{"an older acknowledgement", []seg{pure(6), pure(5)},
			[]string{"0:A seq 10 ack 6 win 7 len 0", "0:A seq 10 ack 5 win 7 len 0"}},
		{"another FIN", []seg{data, with(end, func(s *seg) { s.seq = 15 })},
			[]string{"0:PA seq 10 ack 5 win 7 len 4", "0:FA seq 15 ack 6 win 8 len 0"}},
		{"a super-packet", []seg{with(data, func(s *seg) { s.size = 1449 }), with(end, func(s *seg) { s.seq += 1445 })},
			[]string{"0:PA seq 10 ack 5 win 7 len 1449", "0:FA seq 1459 ack 6 win 8 len 0"}},
		{"data after data", []seg{data, with(data, func(s *seg) { s.seq = 14 })},
			[]string{"0:PA seq 10 ack 5 win 7 len 4", "0:PA seq 14 ack 5 win 7 len 4"}},
		{"past what lies between", []seg{pure(4), with(data, func(s *seg) { s.seq, s.ack = 20, 3 }), pure(6)},
			[]string{"0:A seq 10 ack 4 win 7 len 0", "0:PA seq 20 ack 3 win 7 len 4", "0:A seq 10 ack 6 win 7 len 0"}},
		{"a reset", []seg{pure(5), {flags: ack | rst, seq: 10, ack: 6}},
			[]string{"0:A seq 10 ack 5 win 7 len 0", "0:RA seq 10 ack 6 win 0 len 0"}},
		{"a SYN", []seg{{flags: ack | syn, seq: 10, ack: 5}, pure(6)},
			[]string{"0:SA seq 10 ack 5 win 0 len 0", "0:A seq 10 ack 6 win 7 len 0"}},
		{"checksums that are complete", []seg{with(data, plain), with(end, plain)},
			[]string{"0:PA seq 10 ack 5 win 7 len 4", "0:FA seq 14 ack 6 win 8 len 0"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dev := &sink{}
			q := &txQueue{wake: make(chan struct{}, 1)}
			for _, s := range tc.in {
				p := s.packet()
				if q.push([]*stack.PacketBuffer{p}) != 1 {
					t.Fatal("not taken")
				}
				p.DecRef()
			}
			<-q.wake
			q.drain(dev, true)
			var got []string
			for _, b := range dev.packets {
				got = append(got, written(tc.in[0].v6, b))
			}
			if fmt.Sprintf("%q", got) != fmt.Sprintf("%q", tc.out) {
				t.Errorf("written\n\t%q, want\n\t%q", got, tc.out)
			}
			if q.bytes != 0 || !q.idle() {
				t.Errorf("%d bytes are left", q.bytes)
			}
			if int(q.merged.Load()) != len(tc.in)-len(tc.out) {
				t.Errorf("%d merged", q.merged.Load())
			}
		})
	}
}

// TestMergeRepeated: an acknowledgement that repeats one which has been written is written as well, although data with
// the same number follows it at once: a peer without SACK counts three that carry nothing (RFC 5681).
func TestMergeRepeated(t *testing.T) {
	dev, p := &sink{}, &pump{}
	q := &p.tx
	push := func(s seg) {
		p := s.packet()
		q.push([]*stack.PacketBuffer{p})
		p.DecRef()
	}
	push(seg{flags: header.TCPFlagSyn, seq: 9})
	for i := range 4 {
		pure := seg{flags: header.TCPFlagAck, seq: 10 + 4*uint32(i), ack: 5}
		data := pure
		data.size = 4
		push(pure)
		push(data)
		q.drain(dev, true)
	}
	pure := 0
	for _, b := range dev.packets {
		if strings.HasSuffix(written(false, b), "ack 5 win 0 len 0") {
			pure++
		}
	}
	if pure != 3 || len(dev.packets) != 8 || p.stats().TxMerged != 1 {
		t.Errorf("%d repeated acknowledgements among %d packets, %d merged; want 3 among 8, 1", pure, len(dev.packets),
			p.stats().TxMerged)
	}
}

// BenchmarkPush: what looking for something to merge with costs where there is nothing.
func BenchmarkPush(b *testing.B) {
	q := &txQueue{wake: make(chan struct{}, 1)}
	for i := range mergeReach {
		p := seg{port: uint16(i), flags: header.TCPFlagAck, opts: 12}.packet()
		q.push([]*stack.PacketBuffer{p})
		p.DecRef()
	}
	p := seg{port: 99, flags: header.TCPFlagAck | header.TCPFlagPsh, size: 1, opts: 12}.packet()
	for b.Loop() {
		if q.merge(p, mergePorts(p), q.firstAck(p)) {
			b.Fatal("merged")
		}
	}
	p.DecRef()
	q.close()
}
