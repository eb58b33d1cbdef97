package netstack

import (
	"context"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// settlePoll is how often Settle looks.
const settlePoll = 5 * time.Millisecond

// Settle waits until what closed connections have still to send has been acknowledged, or for ctx. A
// connection that was closed in good order lives on in gVisor until then, and Close would reset it: its
// reader would lose the end of what was sent to it. Call it when the users of all connections are done.
func (s *Stack) Settle(ctx context.Context) error {
	tick := time.NewTicker(settlePoll)
	defer tick.Stop()
	for s.unsettled() > 0 {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
	return nil
}

// unsettled counts the connections that wait for their last bytes or their FIN to be acknowledged.
func (s *Stack) unsettled() (n int) {
	for _, h := range []*hop{s.app, s.up} {
		if h == nil {
			continue
		}
		h.mu.Lock()
		gs := h.gs
		h.mu.Unlock()
		if gs == nil {
			continue
		}
		for _, e := range gs.RegisteredEndpoints() {
			ep, ok := e.(*tcp.Endpoint)
			if !ok {
				continue
			}
			switch ep.EndpointState() {
			case tcp.StateFinWait1, tcp.StateClosing, tcp.StateLastAck:
				n++
			}
		}
	}
	return n
}
