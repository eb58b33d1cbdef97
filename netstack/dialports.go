package netstack

import (
	"math/rand/v2"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// dialPorts draws the local ports of what one gVisor stack dials. A port is free for an address and a destination as
// long as no endpoint has the four of them, and nobody else has drawn them: as Linux's connect has it.
//
// gVisor's own reservation, which Bind makes and which lasts as long as the connection, is three maps for each port:
// 1.4 KiB of an idle connection, in which nothing is said that the table of its endpoints does not say.
type dialPorts struct {
	first, last uint16 // what is drawn from

	mu sync.Mutex
	// drawn are those that no endpoint has yet: of dials until their endpoint is registered, of probes, which have none,
	// until they are answered.
	drawn map[stack.TransportEndpointID]struct{}
}

// draw takes a local port for id in gs (nil: a stack without endpoints, yet), or id's own if that is not 0, until
// giveBack. Without a free one it is ErrNoPortAvailable. Ports are drawn at random and then in order (RFC 6056,
// section 3.3.1).
func (p *dialPorts) draw(gs *stack.Stack, id stack.TransportEndpointID) (stack.TransportEndpointID, tcpip.Error) {
	first, n := uint32(p.first), uint32(p.last)-uint32(p.first)+1
	if id.LocalPort != 0 {
		first, n = uint32(id.LocalPort), 1
	}
	at := rand.Uint32N(n)
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range n {
		id.LocalPort = uint16(first + (at+i)%n)
		if id.LocalPort == id.RemotePort && id.LocalAddress == id.RemoteAddress {
			continue // it would call itself
		}
		if _, drawn := p.drawn[id]; drawn {
			continue
		}
		if gs != nil && gs.FindTransportEndpoint(protoOf(id.LocalAddress), tcp.ProtocolNumber, id, nic) != nil {
			continue
		}
		if p.drawn == nil {
			p.drawn = make(map[stack.TransportEndpointID]struct{})
		}
		p.drawn[id] = struct{}{}
		return id, nil
	}
	return id, &tcpip.ErrNoPortAvailable{}
}

// giveBack ends what draw has begun.
func (p *dialPorts) giveBack(id stack.TransportEndpointID) {
	p.mu.Lock()
	delete(p.drawn, id)
	p.mu.Unlock()
}
