package main

import (
	"context"
	"net"
	"net/netip"
	"syscall"

	"ztun/admin"
	"ztun/cmd/attach"
	"ztun/proxy"
	"ztun/proxy/identity"
	"ztun/proxy/state"
)

// selfPod is the daemon's own pod as the mesh sees it (POD_NAME, POD_NAMESPACE, SERVICE_ACCOUNT): its metrics can be
// had over HBONE at its own address, as ztunnel's in shared mode. It has no device: what it serves is in our own
// namespace.
//
// ztunnel connects to any port of its own pod then. Here that might be every port of the node, whose services the mesh
// has no business with: it is the metrics' port alone.
type selfPod struct {
	spec  admin.PodSpec
	proxy *proxy.Proxy
	view  func() *state.View
	addr  netip.Addr // INSTANCE_IP; not valid if unknown
}

// newSelf is nil where the daemon is not told which pod is its own.
func (d *daemon) newSelf() *selfPod {
	c := d.c
	if c.Self.Identity == (identity.ID{}) || c.Mode.Workload != (state.WorkloadInfo{}) {
		return nil
	}
	s := &selfPod{spec: admin.PodSpec{Name: c.Self.Pod, Namespace: c.Self.Namespace,
		ServiceAccount: c.Self.ServiceAccount},
		view: d.loop.View}
	s.addr, _ = netip.ParseAddr(c.Self.InstanceIP)
	s.addr = s.addr.Unmap()
	s.proxy = d.newProxy(s.spec, selfNetwork{c.Admin.StatsPort}, nil, nil)
	return s
}

func (s *selfPod) info() state.WorkloadInfo {
	return state.WorkloadInfo{Name: s.spec.Name, Namespace: s.spec.Namespace, ServiceAccount: s.spec.ServiceAccount}
}

// owns reports whether a is the own pod's address, by the control plane's record or by INSTANCE_IP.
func (s *selfPod) owns(a netip.Addr) bool {
	if s == nil {
		return false
	}
	if a == s.addr {
		return true
	}
	w := s.view().WorkloadByInfo(s.info())
	return w != nil && w.HasAddress(a)
}

// selfDoor is the own pod's door in the kind of attachment.
func (d *daemon) selfDoor(local netip.Addr) (attach.Door, bool) {
	s := d.pods.self.Load()
	if !s.owns(local) {
		return attach.Door{}, false
	}
	return attach.Door{Label: refOf(s.spec).String(), Serve: s.proxy.ServeMesh}, true
}

// selfNetwork is the own pod's ways out: to the metrics' port, and no other.
type selfNetwork struct{ port uint16 }

func (n selfNetwork) DialApp(ctx context.Context, _, dst netip.AddrPort) (proxy.Conn, error) {
	if dst.Port() != n.port {
		return nil, n.refused(dst)
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", dst.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

func (n selfNetwork) ProbeApp(_ context.Context, _ netip.Addr, dst netip.AddrPort) error {
	if dst.Port() != n.port {
		return n.refused(dst)
	}
	return nil
}

func (n selfNetwork) DialMesh(_ context.Context, dst netip.AddrPort) (net.Conn, error) {
	return nil, n.refused(dst)
}

func (n selfNetwork) DialPlain(_ context.Context, dst netip.AddrPort) (proxy.Conn, error) {
	return nil, n.refused(dst)
}

func (n selfNetwork) refused(dst netip.AddrPort) error {
	return &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(dst), Err: syscall.ECONNREFUSED}
}
