package redirected

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"

	"ztun/admin"
	"ztun/cmd/attach"
	"ztun/proxy/ports"
	"ztun/tun/netns"
)

// Kind is the way of attaching.
type Kind struct {
	o         attach.Options
	ownSource bool
	self      *attach.Listener // of the daemon's own pod; nil: it is none
	unknown   atomic.Uint64    // connections to it for another address

	mu      sync.Mutex
	pods    map[*pod]struct{}
	leaving bool
}

var _ attach.Kind = (*Kind)(nil)

// New makes the kind. With ownSource applications see the pod's own address as their client's (ENABLE_ORIG_SRC=false).
func New(o attach.Options, ownSource bool) *Kind {
	return &Kind{o: o, ownSource: ownSource, pods: map[*pod]struct{}{}}
}

// Open implements attach.Kind: pods share nothing. The daemon's own pod is served in its own namespace, which nobody
// redirects.
func (k *Kind) Open(ctx context.Context) error {
	if k.o.Self == nil {
		return nil
	}
	o := k.o.Socket
	o.Mark = 0
	ln, err := k.o.ListenMesh(ctx, k.o.NetNS, ports.HBONE, o)
	if err != nil {
		return fmt.Errorf("port %d (HBONE) of the daemon's own pod: %w", ports.HBONE, err)
	}
	k.self = ln
	k.o.Serve("port 15008", func() error {
		attach.Accept(ln, k.o.Logger("pods"), k.serveSelf)
		return nil
	})
	return nil
}

func (k *Kind) serveSelf(conn *net.TCPConn) {
	door, ok := k.o.Self(conn.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap())
	if !ok {
		k.unknown.Add(1)
		attach.Reset(conn)
		return
	}
	if serve := k.o.Admit(door, conn); serve != nil {
		go k.o.Panics.Func("a connection to port 15008", serve, nil)()
	}
}

// Locate implements attach.Kind. Addresses are for those who look at the pod: one that has none yet is attached.
func (k *Kind) Locate(p *attach.Pod) error {
	if err := attach.LocateAddrs(p); !errors.Is(err, attach.ErrNoAddress) {
		return err
	}
	return nil
}

// Shares implements attach.Kind: what is a pod's is in its namespace, and listeners share ports there.
func (*Kind) Shares() bool { return true }

// Outlives implements attach.Kind.
func (*Kind) Outlives() bool { return false }

// Gone implements attach.Kind.
func (*Kind) Gone(p attach.Place) error { return p.Gone() }

// Clean implements attach.Kind: nothing outlives the daemon.
func (*Kind) Clean(attach.Place) error { return nil }

// Sweep implements attach.Kind.
func (*Kind) Sweep([]netip.Addr) error { return nil }

// Leave implements attach.Kind.
func (k *Kind) Leave() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.leaving = true
	for p := range k.pods {
		p.closeListeners()
	}
}

// Close implements attach.Kind.
func (k *Kind) Close() error {
	if k.self == nil {
		return nil
	}
	return k.self.Close()
}

// Stats implements attach.Kind.
func (k *Kind) Stats() attach.NodeStats { return attach.NodeStats{MeshUnknown: k.unknown.Load()} }

// Attach implements attach.Kind.
func (k *Kind) Attach(ctx context.Context, spec attach.Pod, h attach.Handler) (_ attach.Attachment, err error) {
	p := &pod{kind: k, spec: spec, h: h, log: k.o.Logger("pods")}
	defer func() {
		if err != nil {
			p.Remove()
		}
	}()
	if p.fds = k.o.Descriptors.ForPod(spec.Label); p.fds == nil {
		return nil, fmt.Errorf("%w: %w", admin.ErrPodUnavailable, attach.ErrNoDescriptor)
	}
	own, err := k.own()
	if err != nil {
		return nil, err
	}
	defer own.Close()
	if p.ns, err = attach.OpenApart(spec, own); err != nil {
		return nil, err
	}
	for _, l := range []struct {
		port  uint16
		serve func(*net.TCPConn)
	}{{ports.HBONE, p.mesh}, {ports.InboundPlaintext, p.passthrough}, {ports.Outbound, p.outbound}} {
		ln, err := k.o.ListenMesh(ctx, p.ns, l.port, k.o.Socket)
		if err != nil {
			// Others' fault, and it may pass: the pod is tried again.
			return nil, fmt.Errorf("%w: port %d in the pod's namespace: %w", admin.ErrPodUnavailable, l.port, err)
		}
		p.doors = append(p.doors, door{ln, l.serve})
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.leaving {
		return nil, fmt.Errorf("%w: the daemon is shutting down", admin.ErrPodUnavailable)
	}
	k.pods[p] = struct{}{}
	return p, nil
}

// own is the daemon's namespace.
func (k *Kind) own() (*netns.NS, error) {
	if k.o.NetNS != nil {
		return k.o.NetNS.Dup()
	}
	return netns.Current()
}
