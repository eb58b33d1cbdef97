package attachtest

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"

	"ztun/admin"
	"ztun/cmd/attach"
	"ztun/netstack"
	"ztun/proxy"
	"ztun/proxy/refusal"
	"ztun/tun"
	"ztun/tun/tuntest"
)

// Network is what hosts and nodes have in common.
type Network struct {
	mu    sync.Mutex
	hosts []*Host
	pods  map[netip.Addr]*pod // captured ones
}

// NewNetwork makes one without hosts.
func NewNetwork() *Network { return &Network{pods: map[netip.Addr]*pod{}} }

// Host is where a pod lives: its namespace, by name, with its applications.
type Host struct {
	name  string
	ino   uint64
	addrs []netip.Addr

	mu      sync.Mutex
	gone    bool
	stack   *netstack.Stack // nil: nothing is attached
	serving map[uint16]func(net.Conn)
}

// Host adds a namespace that has the addresses already.
func (n *Network) Host(name string, addrs ...netip.Addr) *Host {
	n.mu.Lock()
	defer n.mu.Unlock()
	h := &Host{name: name, ino: uint64(len(n.hosts) + 1), addrs: addrs, serving: map[uint16]func(net.Conn){}}
	n.hosts = append(n.hosts, h)
	return h
}

// Listen has an application serve a port; serve closes what it gets.
func (h *Host) Listen(port uint16, serve func(net.Conn)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.serving[port] = serve
}

// Vanish is the end of the namespace.
func (h *Host) Vanish() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.gone = true
}

// Dial is an application's connect.
func (h *Host) Dial(ctx context.Context, dst netip.AddrPort) (*netstack.Conn, error) {
	h.mu.Lock()
	s := h.stack
	h.mu.Unlock()
	for _, a := range h.addrs {
		if s != nil && a.Is4() == dst.Addr().Is4() {
			return s.DialApp(ctx, netip.AddrPortFrom(a, 0), dst)
		}
	}
	return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(dst), Err: syscall.ENETUNREACH}
}

// attach gives the host's kernel its end of the pair.
func (h *Host) attach(dev tun.Device) (end func(), err error) {
	s, err := netstack.New(netstack.Config{Addrs: slices.Clone(h.addrs), App: dev, UplinkIsApp: true,
		OnFlow: func(f *netstack.Flow) {
			h.mu.Lock()
			serve := h.serving[f.Dst().Port()]
			h.mu.Unlock()
			if serve == nil {
				f.Refuse(refusal.Reset)
				return
			}
			if c, err := f.Accept(); err == nil {
				serve(c)
			}
		}})
	if err != nil {
		return nil, err
	}
	var running sync.WaitGroup
	running.Go(func() { s.Run(context.Background()) })
	h.mu.Lock()
	h.stack = s
	h.mu.Unlock()
	return func() {
		h.mu.Lock()
		h.stack = nil
		h.mu.Unlock()
		s.Close()
		running.Wait()
	}, nil
}

func (n *Network) host(is func(*Host) bool) *Host {
	n.mu.Lock()
	defer n.mu.Unlock()
	if i := slices.IndexFunc(n.hosts, is); i >= 0 {
		return n.hosts[i]
	}
	return nil
}

func (n *Network) at(p attach.Place) *Host {
	return n.host(func(h *Host) bool { return h.ino == p.Ino })
}

// Kind is a node of the network.
type Kind struct {
	o       attach.Options
	net     *Network
	uplink  *netstack.Uplink
	far     *tuntest.Device
	leaving bool // guarded by net.mu
	running sync.WaitGroup
}

var _ attach.Kind = (*Kind)(nil)

// Kind makes a node.
func (n *Network) Kind(o attach.Options) *Kind { return &Kind{o: o, net: n} }

// Open implements attach.Kind.
func (k *Kind) Open(context.Context) error {
	near, far := tuntest.Pair(tuntest.Options{MTU: k.o.MTU, Drop: true})
	k.uplink, k.far = netstack.NewUplink(near, k.o.Panics, k.o.Logger("netstack")), far
	k.running.Go(func() { k.uplink.Run(context.Background()) })
	// The node's routes: what a pod sends to the network goes to the pod that has the address, by the same device.
	k.running.Go(func() {
		buf := make([]byte, tun.MaxPacket)
		for {
			var h tun.VNetHdr
			n, err := far.ReadPacket(&h, [][]byte{buf})
			if err != nil {
				return
			}
			far.WritePacket(&h, [][]byte{buf[:n]}) // what cannot be sent is a lost packet
		}
	})
	return nil
}

// Locate implements attach.Kind. Addresses that are not given are the host's.
func (k *Kind) Locate(p *attach.Pod) error {
	name := p.NetNS
	if p.Place.Path = name; p.File != nil {
		name, p.Place.Path = p.File.Name(), "" // as elsewhere: a descriptor has no path by which it is found again
	}
	h := k.net.host(func(h *Host) bool { return h.name == name })
	if h == nil || h.isGone() {
		return fmt.Errorf("%w: there is no host %q", admin.ErrPodInvalid, name)
	}
	if p.Place.Ino = h.ino; len(p.IPs) == 0 {
		p.IPs = slices.Clone(h.addrs)
	}
	return nil
}

func (h *Host) isGone() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.gone
}

// Shares implements attach.Kind.
func (*Kind) Shares() bool { return false }

// Outlives implements attach.Kind.
func (*Kind) Outlives() bool { return true }

// Gone implements attach.Kind.
func (k *Kind) Gone(p attach.Place) error {
	if h := k.net.at(p); h == nil || h.isGone() {
		return fmt.Errorf("host %q is gone", p.Path)
	}
	return nil
}

// Attach implements attach.Kind.
func (k *Kind) Attach(_ context.Context, spec attach.Pod, h attach.Handler) (attach.Attachment, error) {
	host := k.net.at(spec.Place)
	near, far := tuntest.Pair(tuntest.Options{MTU: k.o.MTU})
	s, err := attach.NewStack(&k.o, spec, k.o.MTU, near, k.uplink, h)
	if err != nil {
		return nil, err
	}
	p := &pod{Stack: s, kind: k, spec: spec, h: h, done: make(chan struct{})}
	if p.end, err = host.attach(far); err != nil {
		s.Stop()
		return nil, err
	}
	return p, nil
}

// Clean implements attach.Kind: nothing outlives a daemon.
func (*Kind) Clean(attach.Place) error { return nil }

// Sweep implements attach.Kind.
func (*Kind) Sweep([]netip.Addr) error { return nil }

// Leave implements attach.Kind.
func (k *Kind) Leave() {
	k.net.mu.Lock()
	defer k.net.mu.Unlock()
	k.leaving = true
}

// Close implements attach.Kind.
func (k *Kind) Close() error {
	if k.uplink != nil {
		k.uplink.Close()
		k.far.Close()
		k.running.Wait()
	}
	return nil
}

// Stats implements attach.Kind.
func (k *Kind) Stats() attach.NodeStats {
	link := k.uplink.Stats()
	return attach.NodeStats{Link: &link}
}

// pod is one attached pod.
type pod struct {
	*attach.Stack
	kind *Kind
	spec attach.Pod
	h    attach.Handler
	end  func() // of the host's side
	once sync.Once
	done chan struct{} // closed by Stop: mesh connections are cut
	cut  sync.Once
	mesh sync.WaitGroup
}

func (p *pod) Place() attach.Place { return p.spec.Place }

func (p *pod) Capture(context.Context) error {
	p.Run()
	p.kind.net.mu.Lock()
	defer p.kind.net.mu.Unlock()
	for _, a := range p.spec.IPs {
		p.kind.net.pods[a] = p
	}
	return nil
}

func (p *pod) Stop() bool {
	n := p.kind.net
	n.mu.Lock()
	for _, a := range p.spec.IPs {
		if n.pods[a] == p {
			delete(n.pods, a)
		}
	}
	n.mu.Unlock()
	p.cut.Do(func() { close(p.done) })
	p.mesh.Wait()
	return p.Stack.Stop()
}

func (p *pod) Remove() error {
	p.once.Do(func() {
		p.Stop()
		p.end()
	})
	return nil
}

// DialMesh is a pipe to the pod that has the address.
func (p *pod) DialMesh(_ context.Context, dst netip.AddrPort) (net.Conn, error) {
	n := p.kind.net
	n.mu.Lock()
	defer n.mu.Unlock()
	to := n.pods[dst.Addr()]
	if to == nil || to.kind.leaving {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(dst), Err: syscall.ECONNREFUSED}
	}
	near, far := net.Pipe()
	src := net.TCPAddrFromAddrPort(netip.AddrPortFrom(p.spec.IPs[0], 61000))
	at := net.TCPAddrFromAddrPort(dst)
	to.mesh.Go(func() {
		served := make(chan struct{})
		to.mesh.Go(func() {
			select {
			case <-to.done:
				far.Close()
			case <-served:
			}
		})
		defer close(served)
		to.h.ServeMesh(end{far, at, src}, netip.AddrPort{})
	})
	return end{near, src, at}, nil
}

// end is one of a pipe's, with addresses.
type end struct {
	net.Conn
	local, remote net.Addr
}

func (e end) LocalAddr() net.Addr  { return e.local }
func (e end) RemoteAddr() net.Addr { return e.remote }

// A host has no loopback that the pod's servers could listen on.
func (p *pod) Listen(network, addr string) (net.Listener, error) {
	return nil, &net.OpError{Op: "listen", Net: network, Err: syscall.EAFNOSUPPORT}
}

func (p *pod) ListenPacket(network, addr string) (net.PacketConn, error) {
	return nil, &net.OpError{Op: "listen", Net: network, Err: syscall.EAFNOSUPPORT}
}

var (
	_ attach.Attachment = (*pod)(nil)
	_ proxy.Network     = (*pod)(nil)
)
