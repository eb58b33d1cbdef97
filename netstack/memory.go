package netstack

import (
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// Sizes of buffers, by what a pod's connections have to share. hop.sizes is one of these; zero: not set yet.
const (
	sizesFew   = iota + 1 // as configured
	sizesSome             // growth is bounded to what does not delay the others
	sizesMany             // new connections begin small
	sizesTight            // all stay small
)

// connCost is what a relayed connection takes without a byte in its buffers, in bytes.
const connCost = 24 << 10

// shortcutCost is what each of the two pods of a Shortcut is charged with, in bytes.
const shortcutCost = 2 << 10

// fit makes buffers fit the number of connections that the pod has, and its memory. Buffers that have grown stay as
// they are, except while memory is tight (Weigh).
func (h *hop) fit(conns int) {
	cfg := &h.s.cfg
	sizes := int32(sizesFew)
	switch {
	case cfg.Memory.Tight():
		sizes = sizesTight
	case conns > manyConns:
		sizes = sizesMany
	case conns > fewConns:
		sizes = sizesSome
	}
	if h.sizes.Swap(sizes) == sizes {
		return
	}
	rcv := tcpip.TCPReceiveBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: cfg.ReceiveBuffer,
		Max: cfg.MaxReceiveBuffer}
	snd := tcpip.TCPSendBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: cfg.SendBuffer, Max: cfg.MaxSendBuffer}
	if h.network {
		snd.Max = max(snd.Max, tcp.MaxBufferSize)
	}
	if sizes >= sizesSome {
		rcv.Max = min(rcv.Max, max(receiveBuffer(crowdedReceivePackets, cfg.MTU), cfg.ReceiveBuffer))
	}
	if sizes >= sizesMany {
		rcv.Default, snd.Default = min(rcv.Default, manyBuffer), min(snd.Default, manyBuffer)
	}
	if sizes == sizesTight {
		rcv.Default, rcv.Max = min(rcv.Default, tightBuffer), min(rcv.Max, tightBuffer)
		snd.Default, snd.Max = min(snd.Default, tightBuffer), min(snd.Max, tightBuffer)
	}
	h.mu.Lock()
	gs := h.gs
	h.mu.Unlock()
	if gs != nil {
		// Both fail only for ranges that contradict themselves.
		gs.SetTransportProtocolOption(tcp.ProtocolNumber, &rcv)
		gs.SetTransportProtocolOption(tcp.ProtocolNumber, &snd)
	}
}

// Weigh charges Config.Memory with what the connections hold now, and makes their buffers small while it is tight. It
// is to be called every now and then: to count each byte where it passes would cost every packet.
func (s *Stack) Weigh() {
	s.weighing.Lock()
	defer s.weighing.Unlock()
	s.charge(s.conns.weigh() + int64(s.shortcuts.conns.Load())*shortcutCost)
	n := s.conns.len()
	s.app.fit(n)
	if s.up != nil && s.up != s.app {
		s.up.fit(n)
	}
	s.conns.squeeze(s.cfg.Memory.Tight())
}

// charge makes weight what the budget is charged with. s.weighing is held.
func (s *Stack) charge(weight int64) {
	if s.weightless {
		weight = 0
	}
	s.cfg.Memory.Add(weight - s.weight)
	s.weight = weight
}

// unweigh gives everything back for good.
func (s *Stack) unweigh() {
	s.weighing.Lock()
	defer s.weighing.Unlock()
	s.weightless = true
	s.charge(0)
}

// weigh is what the connections hold, in bytes.
func (l *connList) weigh() (total int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for c := l.first; c != nil; c = c.next {
		total += connCost
		if n, err := c.ep.GetSockOptInt(tcpip.ReceiveQueueSizeOption); err == nil {
			total += int64(n)
		}
		if c.wr.armed.Load() != nil { // somebody waits for room: the send buffer is full
			c.full = max(c.full, c.ep.SocketOptions().GetSendBufferSize()) // it may have been larger when it filled up
			total += c.full
		} else {
			c.full = 0
		}
	}
	return total
}

// squeeze makes buffers small, or what they began with again. What is in them stays, and what a peer was told that it
// may send is still taken: the flow slows down, and none is lost.
func (l *connList) squeeze(tight bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !tight && !l.squeezed {
		return
	}
	l.squeezed = tight
	for c := l.first; c != nil; c = c.next {
		so, cfg := c.ep.SocketOptions(), &c.h.s.cfg
		rcv, snd := so.GetReceiveBufferSize(), so.GetSendBufferSize()
		switch {
		case tight:
			c.squeezed = true
			rcv, snd = min(rcv, tightBuffer), min(snd, tightBuffer)
		case c.squeezed:
			c.squeezed = false
			rcv, snd = max(rcv, int64(cfg.ReceiveBuffer)), max(snd, int64(cfg.SendBuffer))
		default:
			continue
		}
		// Without gVisor's notice, which would end its own tuning for good.
		so.SetReceiveBufferSize(rcv, false)
		so.SetSendBufferSize(snd, false)
		// gVisor says that there is room when less than half is used: of a buffer that was made larger that was so before.
		c.wr.wake()
	}
}
