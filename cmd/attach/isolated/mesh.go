package isolated

import (
	"net"
	"net/netip"

	"ztun/cmd/attach"
)

// serveMesh accepts HBONE connections for all pods until the listener is closed.
func (n *Node) serveMesh(ln *net.TCPListener) error {
	attach.Accept(ln, n.o.Logger("pods"), func(conn *net.TCPConn) {
		local := conn.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
		to, ok := n.door(local)
		if !ok {
			n.unknown.Add(1)
			attach.Reset(conn)
			return
		}
		if serve := n.o.Admit(to, conn); serve != nil {
			go n.o.Panics.Func("a connection to port 15008", serve, nil)()
		}
	})
	return nil
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
