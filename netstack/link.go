package netstack

import (
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// gsoMaxSize is the largest IP packet that we let gVisor build: what the total
// length field of IPv4 can say. The kernel cuts it to the receiver's MSS, or
// hands it whole to a local socket.
const gsoMaxSize = 65535

// port is a pump as one stack sees it: gVisor's LinkEndpoint. The App device
// has one port, the node's uplink one per pod.
type port struct {
	pump *pump
	mtu  atomic.Uint32
	disp atomic.Pointer[stack.NetworkDispatcher]
	// udp counts the sockets of DialUDP on this link; dns is the DNS tap if
	// it is on.
	udp atomic.Int32
	dns *dnsTap
	// dg carries the rest of the pod's datagrams; nil: nobody does.
	dg *datagrams
	// shortcuts are the pod's connections whose packets pass.
	shortcuts *shortcuts
	// first makes the stack when the first packet comes.
	first func()
	// wait takes a SYN that an older connection of the same ports stands in the way of; see late.go.
	wait func(syn synID, p *rxPacket, pkt *stack.PacketBuffer) bool
	// crashed is told of a panic while a packet was delivered.
	crashed func(error)
}

var (
	_ stack.LinkEndpoint = (*port)(nil)
	_ stack.GSOEndpoint  = (*port)(nil)
)

func newPort(p *pump, mtu int) *port {
	l := &port{pump: p}
	l.mtu.Store(uint32(mtu))
	return l
}

// deliver hands an incoming packet to the stack and consumes the caller's
// reference. Everything up to the segment queue of the endpoint happens inline.
func (l *port) deliver(proto tcpip.NetworkProtocolNumber, pkt *stack.PacketBuffer) {
	defer pkt.DecRef()
	d := l.disp.Load()
	if d == nil {
		l.first()
		d = l.disp.Load()
	}
	if d != nil { // nil on a stack that is closing
		(*d).DeliverNetworkPacket(proto, pkt)
	}
}

// WritePackets queues; see pump for who writes. It never blocks: the endpoint's
// lock is held here.
func (l *port) WritePackets(list stack.PacketBufferList) (int, tcpip.Error) {
	n := l.pump.tx.push(list.AsSlice())
	if n == 0 {
		return 0, &tcpip.ErrNoBufferSpace{}
	}
	return n, nil
}

func (l *port) MTU() uint32       { return l.mtu.Load() }
func (l *port) SetMTU(mtu uint32) { l.mtu.Store(mtu) }

// MaxHeaderLength is zero: a TUN has no link header, and the virtio header is
// written from a buffer of the writer's.
func (*port) MaxHeaderLength() uint16                 { return 0 }
func (*port) LinkAddress() tcpip.LinkAddress          { return "" }
func (*port) SetLinkAddress(tcpip.LinkAddress)        {}
func (*port) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareNone }
func (*port) AddHeader(*stack.PacketBuffer)           {}
func (*port) ParseHeader(*stack.PacketBuffer) bool    { return true }
func (*port) SetOnCloseAction(func())                 {}
func (*port) Close()                                  {}
func (*port) Wait()                                   {}

// Capabilities declares checksum offload for reception only: the reader has
// vouched for what it delivers. With transmit offload gVisor would leave the
// checksum of SYN-ACKs empty and nothing would ever connect; what host GSO
// needs is declared by SupportedGSO.
func (l *port) Capabilities() stack.LinkEndpointCapabilities {
	return stack.CapabilityRXChecksumOffload
}

// SupportedGSO reports host segmentation if the device takes super-packets of
// both families; otherwise segments of at most the MSS leave one by one.
func (l *port) SupportedGSO() stack.SupportedGSO {
	if l.pump.gso {
		return stack.HostGSOSupported
	}
	return stack.GSONotSupported
}

func (l *port) GSOMaxSize() uint32 { return gsoMaxSize }

func (l *port) Attach(d stack.NetworkDispatcher) {
	if d == nil {
		l.disp.Store(nil)
		return
	}
	l.disp.Store(&d)
}

func (l *port) IsAttached() bool { return l.disp.Load() != nil }
