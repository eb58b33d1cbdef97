package netstack

// LinkStats counts what passed a device, and what did not. Super-packets count
// as one packet.
type LinkStats struct {
	RxPackets, RxBytes uint64
	// Packets that were read and dropped: not IP or lengths that contradict each
	// other; a protocol other than TCP, UDP and ICMP, or UDP that
	// nobody waits for or carries; a wrong TCP checksum; a
	// destination that is no pod's (uplink only).
	RxMalformed, RxNotTCP, RxBadChecksum, RxUnknownDst uint64
	// RxReturned were ICMP errors about connections of the kernel's, written to
	// the device again for it (uplink only); the transmit queue may still have
	// dropped them.
	RxReturned uint64
	// RxOverFragments were fragments beyond what a pod or all pods may get in a second (uplink only).
	RxOverFragments    uint64
	TxPackets, TxBytes uint64
	// TxDropped were refused because the transmit queue was full or closed;
	// TxErrors failed in the device. TxMerged travelled as a part of another packet of their connection, or were made
	// needless by it.
	TxDropped, TxErrors, TxMerged uint64
	// Offload reports whether super-packets and checksums are left to the kernel.
	Offload bool
}

// Stats is a snapshot of a stack's counters and gauges.
type Stats struct {
	App LinkStats

	// Flows by outcome. Duplicates are retransmitted SYNs of a pending flow.
	Flows, Duplicates, Accepted, AcceptFailed, Refused uint64
	// Evicted flows lost their place to others, Over were SYNs ignored because there was no place for them. Foreign were
	// SYNs, DNS queries and other datagrams from addresses that are not the pod's own, dropped. Delayed SYNs waited for
	// an older connection of the same ports to go.
	Evicted, Over, Foreign, Delayed uint64
	InFlight, Conns                 int
	// ShortcutsBegun of the accepted flows have their packets pass to another pod or to the network; Shortcuts of those,
	// and of what comes so from other pods, are there now; ShortcutsOver were copied instead, because there are too many.
	ShortcutsBegun, ShortcutsOver uint64
	Shortcuts                     int

	// UDP packets to port 53 handed to OnDNS; dropped because a bound was reached
	// or the stack closes; dropped because their header contradicts itself or they
	// cannot be answered. DNSInFlight of the first have not returned.
	DNSQueries, DNSOver, DNSMalformed uint64
	DNSInFlight                       int
	// UDPStray were delivered for somebody who had gone, or were fragments of what
	// nobody waited for.
	UDPStray uint64

	// Datagrams carried from the pod and to it (super-packets count as one), and their bytes with headers. Flows of
	// them: how many there are, begun, and ended by a bound; those that a bound let not begin. Datagrams dropped: policy
	// forbids their flow; they belong to no flow or go where nobody carries them; the queue of a device had no room.
	DatagramsOut, DatagramBytesOut, DatagramsIn, DatagramBytesIn uint64
	DatagramFlows                                                int
	DatagramFlowsOpened, DatagramFlowsEvicted, DatagramFlowsOver uint64
	DatagramsDenied, DatagramsStray, DatagramsFull               uint64

	// From gVisor: of all connections of this stack.
	Retransmits, Timeouts, ResetsSent, ResetsReceived, SegmentQueueDropped uint64
}

// Stats returns the counters so far.
func (s *Stack) Stats() Stats {
	f := s.flows
	st := Stats{
		App:        s.pump.stats(),
		Flows:      f.flows.Load(),
		Duplicates: f.duplicates.Load(), Accepted: f.accepted.Load(), AcceptFailed: f.failed.Load(),
		Refused: f.refused.Load(),
		Evicted: f.evicted.Load(), Over: f.over.Load(), Foreign: f.foreign.Load(), Delayed: f.delayed.Load(),
		InFlight: f.inFlight(), Conns: s.conns.len(),
		ShortcutsBegun: f.shortcuts.Load(), ShortcutsOver: s.shortcuts.over.Load(), Shortcuts: int(s.shortcuts.conns.Load()),
	}
	st.DNSQueries, st.DNSOver, st.DNSMalformed = s.dns.queries.Load(), s.dns.over.Load(), s.dns.malformed.Load()
	st.DNSInFlight, st.UDPStray = s.dns.inFlight(), s.dns.stray.Load()
	if d := s.dg; d != nil {
		st.DatagramsOut, st.DatagramBytesOut = d.outPackets.Load(), d.outBytes.Load()
		st.DatagramsIn, st.DatagramBytesIn = d.inPackets.Load(), d.inBytes.Load()
		st.DatagramFlows = d.count()
		st.DatagramFlowsOpened, st.DatagramFlowsEvicted, st.DatagramFlowsOver = d.opened.Load(), d.evicted.Load(),
			d.over.Load()
		st.DatagramsDenied, st.DatagramsStray, st.DatagramsFull = d.denied.Load(), d.stray.Load(), d.full.Load()
	}
	hops := []*hop{s.app}
	if s.up != nil && s.up != s.app {
		hops = append(hops, s.up)
	}
	for _, h := range hops {
		g := h.stats()
		st.Retransmits += g.TCP.Retransmits.Value()
		st.Timeouts += g.TCP.Timeouts.Value()
		st.ResetsSent += g.TCP.ResetsSent.Value()
		st.ResetsReceived += g.TCP.ResetsReceived.Value()
		st.SegmentQueueDropped += g.DroppedPackets.Value()
	}
	return st
}

// Stats returns the counters of the node's device.
func (u *Uplink) Stats() LinkStats { return u.pump.stats() }

func (p *pump) stats() LinkStats {
	return LinkStats{
		RxPackets: p.rx.packets.Load(), RxBytes: p.rx.bytes.Load(),
		RxMalformed: p.rx.malformed.Load(), RxNotTCP: p.rx.notTCP.Load(),
		RxBadChecksum: p.rx.badChecksum.Load(), RxUnknownDst: p.rx.unknownDst.Load(),
		RxReturned: p.rx.returned.Load(), RxOverFragments: p.rx.overFragments.Load(),
		TxPackets: p.tx.packets.Load(), TxBytes: p.tx.sent.Load(),
		TxDropped: p.tx.dropped.Load(), TxErrors: p.tx.errors.Load(), TxMerged: p.tx.merged.Load(),
		Offload: p.gso,
	}
}
