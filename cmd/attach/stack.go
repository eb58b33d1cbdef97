package attach

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"

	"ztun/admin"
	"ztun/netstack"
	"ztun/netstack/usersock"
	"ztun/proxy"
	"ztun/proxy/ports"
	"ztun/proxy/refusal"
	"ztun/proxy/rescue"
	"ztun/tun"
)

// Stack is what the kinds with a TUN have towards the application, and towards the network where that is netstack's
// too: the device, netstack behind it, and what runs it. It is most of an Attachment.
type Stack struct {
	*netstack.Stack
	dev     *tun.Tap
	addrs   []netip.Addr
	panics  *rescue.Panics
	log     *slog.Logger
	label   string
	end     context.CancelFunc // of what Go started
	ctx     context.Context
	running sync.WaitGroup
	way     *way // nil: an uplink, or no datagrams
	failure atomic.Pointer[error]
}

// NewStack puts netstack behind dev, which it owns from then on. What arrives goes to h, once Run is called. mtu is
// in bytes. uplink is the node's device; nil: the way to the network is another.
func NewStack(o *Options, p Pod, mtu int, dev tun.Device, uplink *netstack.Uplink, h Handler) (*Stack, error) {
	s := &Stack{dev: tun.NewTap(dev), addrs: p.IPs, panics: o.Panics, log: o.Logger("pods"), label: p.Label}
	c := o.Stack
	c.Addrs, c.MTU, c.App, c.Uplink, c.Memory = p.IPs, mtu, s.dev, uplink, p.Memory
	c.Panics, c.Logger = o.Panics, s.log
	c.OnFlow = func(f *netstack.Flow) {
		switch {
		case !f.Inbound():
			h.ServeOutbound(outFlow{flow{f}})
		case f.Dst().Port() == ports.HBONE: // from before the routes to the listener, which has the caller's next SYN
			f.Refuse(refusal.Silent)
		default:
			h.ServePassthrough(flow{f})
		}
	}
	if o.DNS {
		c.OnDNS = func(q *netstack.DNSQuery) { h.ServeDNS(q) }
	}
	if c.Datagrams != nil {
		d := *c.Datagrams
		d.Allow = func(f netstack.DatagramFlow) bool {
			if f.Inbound {
				return h.AllowDatagram(true, f.Peer, f.Pod)
			}
			return h.AllowDatagram(false, f.Pod, f.Peer)
		}
		if uplink == nil {
			s.way = s.sockets(o, p.Label)
			d.Way = s.way
		}
		c.Datagrams = &d
	}
	c.OnBound = func(resource, source string, evicted bool) { o.Report.Turned(resource, p.Label, source, evicted) }
	var err error
	if s.Stack, err = netstack.New(c); err != nil {
		if errors.Is(err, netstack.ErrAddressTaken) {
			return nil, fmt.Errorf("%w: %w", admin.ErrPodConflict, err)
		}
		return nil, err
	}
	s.ctx, s.end = context.WithCancel(context.Background())
	return s, nil
}

// PublishUDP has anybody reach a UDP port of the workload's at one of the host's, if policy lets him. Run has been
// called.
func (s *Stack) PublishUDP(p usersock.Published) error {
	if s.way == nil {
		return errors.New("no UDP is carried (--no-udp, ZTUN_UDP)")
	}
	return s.way.Publish(p)
}

// sockets is the way of datagrams where there is no uplink: the process's own sockets. Nothing comes by it before the
// stack, which runs by then, has sent something, or published a port.
func (s *Stack) sockets(o *Options, label string) *way {
	w := &way{log: s.log, label: label}
	w.Sockets = usersock.New(usersock.Options{
		Deliver: func(d usersock.Datagram) { s.DeliverDatagram(netstack.Datagram(d)) },
		Fail:    func(f usersock.Failure) { s.DeliverFailure(netstack.DatagramFailure(f)) },
		Turned: func(peer netip.Addr, evicted bool) {
			o.Report.Turned("UDP sockets", label, peer.String(), evicted)
		},
		Descriptor: func(end func()) (release func()) {
			if place := o.Descriptors.Outbound(label, end); place != nil {
				return place.Release
			}
			return nil
		},
		MaxSockets: min(maxSockets, o.Descriptors.forSockets()),
		Panics:     o.Panics,
	})
	return w
}

// maxSockets bounds the UDP and ping sockets of a workload.
const maxSockets = 1024

// way is the process's sockets as netstack wants them.
type way struct {
	*usersock.Sockets
	log    *slog.Logger
	label  string
	noPing sync.Once
}

func (w *way) Send(d netstack.Datagram) error {
	err := w.Sockets.Send(usersock.Datagram(d))
	if err == usersock.ErrNoPing {
		w.noPing.Do(func() { w.log.Warn("a ping cannot leave", "pod", w.label, "error", err) })
	}
	return err
}

// Run starts the stack.
func (s *Stack) Run() {
	s.Go("a pod's stack", func(ctx context.Context) {
		if err := s.Stack.Run(ctx); err != nil && ctx.Err() == nil {
			s.failure.Store(&err)
			s.log.Error("the pod's device failed; `ztun pod del` and `add` the pod again", "pod", s.label, "error", err)
		}
	})
}

// Go runs f until Stop ends its context, which waits for it.
func (s *Stack) Go(what string, f func(ctx context.Context)) {
	s.running.Go(s.panics.Func(what, func() { f(s.ctx) }, nil))
}

// Stop implements Attachment.
func (s *Stack) Stop() (whole bool) {
	// What a panic left locked must not keep the others from ending: after one, nobody is waited for without end.
	var closed sync.WaitGroup
	closed.Go(s.panics.Func("the end of a stack", func() { s.Close() }, nil))
	whole = s.panics.Wait(&closed)
	s.end()
	return s.panics.Wait(&s.running) && whole
}

// Addrs implements Attachment.
func (s *Stack) Addrs() []netip.Addr { return s.addrs }

// Tap implements Attachment.
func (s *Stack) Tap() *tun.Tap { return s.dev }

// Status implements Attachment.
func (s *Stack) Status() Status {
	st := Status{Device: s.dev.Name(), Offload: s.dev.Offload()}
	if err := s.failure.Load(); err != nil {
		st.Err = *err
	}
	return st
}

// Stats implements Attachment.
func (s *Stack) Stats() *netstack.Stats {
	stats := s.Stack.Stats()
	return &stats
}

// DialApp implements proxy.Network: the application sees src as its client.
func (s *Stack) DialApp(ctx context.Context, src, dst netip.AddrPort) (proxy.Conn, error) {
	c, err := s.Stack.DialApp(ctx, src, dst)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// DialPlain implements proxy.Network, by the uplink.
func (s *Stack) DialPlain(ctx context.Context, dst netip.AddrPort) (proxy.Conn, error) {
	c, err := s.Stack.DialPlain(ctx, dst)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// DialUDP implements Ways, by the uplink.
func (s *Stack) DialUDP(ctx context.Context, dst netip.AddrPort) (net.Conn, error) {
	c, err := s.Stack.DialUDP(ctx, dst)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// flow is a netstack flow as the proxy wants it.
type flow struct{ *netstack.Flow }

func (f flow) Accept() (proxy.Conn, error) {
	c, err := f.Flow.Accept()
	if err != nil {
		return nil, err
	}
	return c, nil
}

// outFlow is one that the pod opens.
type outFlow struct{ flow }

// Shortcut has the flow's packets go to another pod's application, if that is behind a TUN of this process, too.
func (f outFlow) Shortcut(ctx context.Context, to proxy.Network, dst netip.AddrPort) (proxy.Shortcut, error) {
	other, ok := to.(interface{ netstack() *netstack.Stack })
	if !ok {
		return nil, nil
	}
	return shortcut(f.Flow.Shortcut(ctx, other.netstack(), dst))
}

// ShortcutPlain has the flow's packets go to the network.
func (f outFlow) ShortcutPlain(ctx context.Context, dst netip.AddrPort) (proxy.Shortcut, error) {
	return shortcut(f.Flow.ShortcutPlain(ctx, dst))
}

// shortcut is what a Shortcut is to a proxy: nothing, where there is none.
func shortcut(s *netstack.Shortcut, err error) (proxy.Shortcut, error) {
	switch {
	case errors.Is(err, netstack.ErrNoShortcut):
		return nil, nil
	case err != nil:
		return nil, err
	}
	return s, nil
}

func (s *Stack) netstack() *netstack.Stack { return s.Stack }
