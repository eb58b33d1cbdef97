package netstack

import "gvisor.dev/gvisor/pkg/tcpip/header"

// segment is what a Shortcut has to know of a TCP segment.
type segment struct {
	seq, ack uint32
	flags    header.TCPFlags
	size     int // bytes of payload
}

// lane is one direction of a connection that passes by: what was sent, and what of it has arrived.
type lane struct {
	first uint32 // the SYN's number
	next  uint32 // beyond the last that was sent, SYN and FIN counted (SND.NXT of RFC 9293)
	acked uint32 // beyond the last that the receiver has acknowledged (SND.UNA)
	fin   uint32 // beyond the FIN, if ended
	ended bool   // its FIN was seen
}

// maxGap is how far ahead of what has passed a segment may be: by no more than a window can have been lost before it.
const maxGap = 1 << 24

// maxAhead bounds what may be on its way: the largest window that TCP can tell (RFC 7323 section 2.3).
const maxAhead = 1 << 30

// phase is how far a connection that passes by has come.
type phase uint8

const (
	asking   phase = iota // the client's SYN is before the application's kernel
	answered              // whose SYN-ACK went to the client
	standing              // and the client's acknowledgement to it
	over
)

// news is what a segment says beside its bytes, and what becomes of it.
type news uint8

const (
	nothingNew  news = iota
	newAnswer        // the SYN-ACK
	newRefusal       // the reset of a SYN; for who asked, not for the client
	newStanding      // the client's answer to the SYN-ACK
	newReset         // an end at once
	newEnd           // the acknowledgement of the second FIN
	newSYN           // the client's, of another connection of the same ports
	sameSYN          // the client's once more, for which ours goes
	doubtful         // a reset that may be a guess: who gets it is asked
	unfit            // no part of a connection that was judged: it does not pass
)

// The directions of a connection.
const (
	forth = iota // from the client
	back         // from the application
)

// track follows a TCP connection that passes by. It believes both ends no more than their own connection depends on:
// what is told here keeps the books and says when it is over, and which segments can open one does not depend on what
// they claim.
type track struct {
	phase   phase
	network bool // what goes back may be anybody's
	lanes   [2]lane
}

// begin takes the client's SYN.
func (t *track) begin(seq uint32, network bool) {
	t.network = network
	t.lanes[forth] = lane{first: seq, next: seq + 1, acked: seq + 1}
}

// see takes a segment that goes way. carried are the bytes of the other way that it acknowledges: those have arrived,
// once each.
func (t *track) see(way int, s *segment) (n news, carried int) {
	if s.flags.Contains(header.TCPFlagSyn) {
		return t.seeSYN(way, s), 0
	}
	if t.phase == asking {
		return t.seeEarly(way, s), 0
	}
	mine, other := &t.lanes[way], &t.lanes[1-way]
	ack := s.flags.Contains(header.TCPFlagAck)
	if ack && ahead(s.ack, other.acked) && !ahead(s.ack, other.next) {
		carried = int(s.ack - other.acked)
		if other.ended && s.ack == other.fin {
			carried--
		}
		other.acked = s.ack
	}
	if s.flags.Contains(header.TCPFlagRst) {
		switch {
		case ahead(mine.acked, s.seq) || ahead(s.seq, mine.next+maxGap): // beyond next if something before it was lost
			return nothingNew, carried
		case t.network && way == back && s.seq != mine.acked:
			return doubtful, carried // exactly that number is believed (RFC 5961 section 3), as far as it is known here
		}
		t.phase = over
		return newReset, carried
	}
	if ahead(s.seq, mine.next+maxGap) || ahead(s.seq, mine.acked+maxAhead) {
		return nothingNew, carried // somebody's guess
	}
	end := s.seq + uint32(s.size)
	if s.flags.Contains(header.TCPFlagFin) {
		if end++; !mine.ended || mine.acked != mine.fin {
			mine.ended, mine.fin = true, end
		}
	}
	if ahead(end, mine.next) {
		mine.next = end
	}
	for _, l := range t.lanes {
		if !l.ended || l.acked != l.fin {
			if t.phase == answered && way == forth && ack {
				t.phase = standing
				return newStanding, carried
			}
			return nothingNew, carried
		}
	}
	t.phase = over
	return newEnd, carried
}

// seeSYN is see of what can open a connection. Only the client's own SYN, and its answer, may: between kernels whose
// sockets have gone, or by a simultaneous open, another would be a connection that nobody has judged.
func (t *track) seeSYN(way int, s *segment) news {
	const kinds = header.TCPFlagSyn | header.TCPFlagAck | header.TCPFlagRst | header.TCPFlagFin
	switch s.flags & kinds {
	case header.TCPFlagSyn:
		switch {
		case way == back:
		case s.seq != t.lanes[forth].first:
			return newSYN
		case t.phase <= answered:
			return sameSYN
		}
	case header.TCPFlagSyn | header.TCPFlagAck:
		switch {
		case way == forth:
		case t.phase != asking && s.seq == t.lanes[back].first:
			return nothingNew // sent once more
		case t.phase == asking && s.ack == t.lanes[forth].next:
			t.phase = answered
			t.lanes[back] = lane{first: s.seq, next: s.seq + 1, acked: s.seq + 1}
			return newAnswer
		case t.phase == asking:
			return nothingNew // to an older SYN: the client says that it is not its own
		}
	}
	return unfit
}

// seeEarly is see of what is no SYN while the application's kernel has not answered.
func (t *track) seeEarly(way int, s *segment) news {
	rst := s.flags.Contains(header.TCPFlagRst)
	switch {
	case way == forth && rst, way == back && !rst && s.size == 0 && !s.flags.Contains(header.TCPFlagFin):
		return nothingNew // what an older connection's end has said to the SYN, and the client's answer to that
	case way == back && rst && s.flags.Contains(header.TCPFlagAck) && s.ack == t.lanes[forth].next:
		t.phase = over
		return newRefusal
	}
	return unfit
}

// ahead reports whether a is beyond b in the space of sequence numbers (RFC 9293 section 3.4).
func ahead(a, b uint32) bool { return int32(a-b) > 0 }
