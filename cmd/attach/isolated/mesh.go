package isolated

import (
	"errors"
	"net"
	"net/netip"
	"time"

	"ztun/cmd/attach"
)

// acceptWait is the longest pause of an accept loop after failures: long enough not to burn a processor, short enough
// that nobody who waits in the listener's queue repeats his SYN meanwhile.
const acceptWait = 500 * time.Millisecond

// serveMesh accepts HBONE connections for all pods until the listener is closed.
func (n *Node) serveMesh(ln *net.TCPListener) error {
	delay, said := time.Duration(0), time.Time{}
	for {
		conn, err := ln.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			// Out of file descriptors, mostly (the machine's: ours are shared out): accepting again at once would
			// only burn the processor.
			delay = min(max(2*delay, 5*time.Millisecond), acceptWait)
			if now := time.Now(); now.Sub(said) > 10*time.Second {
				said = now
				n.o.Logger("pods").Warn("accept on port 15008 failed, will be tried again", "error", err)
			}
			time.Sleep(delay)
			continue
		}
		delay = 0
		local := conn.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
		to, ok := n.door(local)
		if !ok || n.leaving.Load() {
			if !ok {
				n.unknown.Add(1)
			}
			conn.SetLinger(0)
			conn.Close()
			continue
		}
		place := n.o.Descriptors.Inbound(to.Label, conn)
		if place == nil {
			conn.SetLinger(0)
			conn.Close()
			continue
		}
		go n.o.Panics.Func("a connection to port 15008", func() {
			defer place.Release()
			to.Serve(conn)
		}, nil)()
	}
}

// door is who serves the mesh at an address: the pod that has it, or the daemon itself.
func (n *Node) door(a netip.Addr) (attach.Door, bool) {
	if p := (*n.byAddr.Load())[a]; p != nil {
		return attach.Door{Label: p.spec.Label, Serve: p.h.ServeMesh}, true
	}
	if n.o.Self == nil {
		return attach.Door{}, false
	}
	return n.o.Self(a)
}
