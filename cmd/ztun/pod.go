package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"ztun/admin"
	"ztun/netstack"
	"ztun/proxy"
	"ztun/proxy/dns"
	"ztun/proxy/fair"
	"ztun/proxy/rescue"
	"ztun/proxy/state"
	"ztun/tun"
	"ztun/tun/netns"
	"ztun/tun/steer"
)

// podTUN is the name of the TUN device in a pod's namespace.
const podTUN = "ztun0"

// pod is what one attached pod consists of.
type pod struct {
	spec   admin.PodSpec
	memory *fair.Budget // of what lies here for its connections
	ns     *netns.NS    // the pod's
	node   *netns.NS    // the daemon's
	panics *rescue.Panics
	dev    tun.Device
	stack  *netstack.Stack
	proxy  *proxy.Proxy
	dns    *dns.Server    // nil: DNS capture is off
	socks  []net.Listener // SOCKS5; none unless it is on
	steer  steer.PodConfig
	plan   steer.Plan
	fds    *place // what the pod itself takes of the daemon's descriptors
	log    *slog.Logger

	// built is closed when what flows and queries go to stands, or never will (proxy is nil then): the node's TUN may bring
	// packets as soon as there is a stack, by the routes that a killed daemon has left.
	built    chan struct{}
	stopRun  context.CancelFunc
	stopping atomic.Bool
	running  sync.WaitGroup
	once     sync.Once
	failure  atomic.Pointer[error] // why the device carries nothing any more
}

// lookup resolves a name for the pod, as its DNS proxy does; nil: nobody does.
type lookup func(ctx context.Context, host string) ([]netip.Addr, error)

// podParts is what the composition root lends to every pod.
type podParts struct {
	c      *Config
	log    *slog.Logger
	uplink *netstack.Uplink
	proxy  func(spec admin.PodSpec, n proxy.Network, names lookup, memory *fair.Budget) *proxy.Proxy
	sock   netns.SocketOptions
	fds    *descriptors
	node   *netns.NS
	report *fair.Report
	memory *memory // nil: without bound
	panics *rescue.Panics

	know        dns.Knowledge
	nameservers []netip.AddrPort // of the daemon's resolv.conf
	search      []string         // search domains of the pods beside the cluster's own
	dnsMetrics  *dns.Metrics
	dnsLog      *slog.Logger
}

// newPod attaches a pod. What it has made is unmade when a later step fails.
func newPod(ctx context.Context, parts *podParts, spec admin.PodSpec, sc steer.PodConfig) (_ *pod, err error) {
	p := &pod{memory: parts.memory.forPod(), spec: spec, steer: sc, plan: steer.PodPlan(sc), log: parts.log, node: parts.node, panics: parts.panics, built: make(chan struct{})}
	var undo []func()
	defer func() {
		close(p.built)
		if err != nil {
			for i := len(undo) - 1; i >= 0; i-- {
				undo[i]()
			}
		}
	}()
	if p.fds = parts.fds.forPod(refOf(spec)); p.fds == nil {
		return nil, fmt.Errorf("%w: %w", admin.ErrPodUnavailable, errNoDescriptor)
	}
	undo = append(undo, p.fds.release)
	if p.ns, err = netns.Open(spec.NetNS); err != nil {
		return nil, namespaceError(err)
	}
	undo = append(undo, func() { p.ns.Close() })
	if p.ns.Same(parts.node) {
		return nil, fmt.Errorf("%w: %s is the daemon's own network namespace, not a pod's", admin.ErrPodInvalid, spec.NetNS)
	}
	// Kept by path: a pid or a name may mean something else after a restart.
	p.spec.NetNS = p.ns.Path()
	if p.dev, err = tun.Open(tun.Options{
		Name: podTUN, NetNS: p.ns, MTU: sc.MTU, Persistent: true, Plain: parts.c.TUNPlain,
	}); err != nil {
		return nil, err
	}
	// By name and not by handle: closing the stack closes the device, and a persistent one stays.
	undo = append(undo, func() {
		p.dev.Close()
		if err := tun.Remove(p.ns, podTUN); err != nil {
			p.log.Warn("a device may be left in the pod's namespace", "pod", refOf(spec).String(), "device", podTUN, "error", err)
		}
	})
	ref := refOf(spec).String()
	config := netstack.Config{
		Addrs: spec.IPs, MTU: sc.MTU, App: p.dev, Uplink: parts.uplink, Panics: parts.panics, Logger: parts.log,
		Memory:      p.memory,
		MaxInFlight: parts.c.MaxInFlight, MaxInFlightPerDst: parts.c.MaxInFlightPerDestination,
		KeepaliveOff: !parts.c.KeepaliveEnabled, UserTimeout: parts.c.userTimeout(),
		KeepaliveIdle: parts.c.KeepaliveTime, KeepaliveInterval: parts.c.KeepaliveInterval, KeepaliveCount: int(parts.c.KeepaliveRetries),
		OnFlow: p.serve, DNSRate: parts.c.DNSRate,
		OnBound: func(resource, source string, evicted bool) {
			parts.report.Turned(resource, ref, source, evicted)
		},
	}
	if parts.c.DNSProxy {
		config.OnDNS = p.query
	}
	if p.stack, err = netstack.New(config); err != nil {
		if errors.Is(err, netstack.ErrAddressTaken) {
			return nil, fmt.Errorf("%w: %w", admin.ErrPodConflict, err)
		}
		return nil, err
	}
	undo = append(undo, func() { p.stack.Close() })
	// What stands in the way is found before the first change: the kernel keeps 127.0.0.1 on a loopback that was up once.
	if err = steer.Check(p.plan, steer.Namespaces{Node: parts.node, Pod: p.ns}); err != nil {
		return nil, err
	}
	loDown, err := steer.LoopbackUp(p.ns)
	if err != nil {
		return nil, fmt.Errorf("the loopback device of %s: %w", p.ns, err)
	}
	undo = append(undo, func() {
		if err := loDown(); err != nil {
			p.log.Warn("the loopback device of the pod's namespace is left up", "pod", refOf(spec).String(), "error", err)
		}
	})
	undo = append(undo, func() { p.closeLoopback(ended()); p.running.Wait() }) // after all else that ends what runs
	var names lookup
	if parts.c.DNSProxy {
		if err = p.serveNames(parts); err != nil {
			return nil, err
		}
		names = p.dns.Lookup
	}
	p.proxy = parts.proxy(spec, &podNetwork{stack: p.stack, addrs: spec.IPs, ns: p.ns, sock: parts.sock, ref: refOf(spec), fds: parts.fds}, names, p.memory)
	undo = append(undo, p.proxy.Close)
	if parts.c.SOCKS5 {
		if err = p.serveSOCKS(parts); err != nil {
			return nil, err
		}
	}

	// Listed before the stack runs: what it is going to know is not among them.
	left, err := orphans(p.ns, spec.IPs)
	if err != nil {
		p.log.Warn("the pod's connections of an earlier run cannot be listed", "pod", refOf(spec).String(), "error", err)
	}
	run, stop := context.WithCancel(context.Background())
	p.stopRun = stop
	p.running.Go(parts.panics.Func("a pod's stack", func() {
		if err := p.stack.Run(run); err != nil && run.Err() == nil {
			p.failure.Store(&err)
			p.log.Error("the pod's device failed; `ztun pod del` and `add` the pod again", "pod", refOf(spec).String(), "error", err)
		}
	}, nil))
	undo = append(undo, stop)
	// The pod's own routes come last in the plan: nothing leaves it before all else stands.
	if err = steer.Apply(ctx, p.plan, steer.Namespaces{Node: parts.node, Pod: p.ns}); err != nil {
		return nil, err
	}
	if len(left) > 0 {
		p.running.Go(parts.panics.Func("a pod's connections of an earlier run", func() { p.endOrphans(run, left) }, nil))
	}
	return p, nil
}

// serve is where a flow leaves netstack.
func (p *pod) serve(f *netstack.Flow) {
	<-p.built
	if p.proxy == nil {
		f.Refuse(netstack.Silent) // the client's next SYN may find the pod attached
		return
	}
	if f.Inbound() {
		p.proxy.ServePassthrough(podFlow{f})
		return
	}
	if p.dns != nil && f.Dst().Port() == dnsPort {
		// The DNS proxy answers for every nameserver, so the handshake is its own.
		if c, err := f.Accept(); err == nil {
			p.dns.ServeConn(c, f.Dst())
		}
		return
	}
	p.proxy.ServeOutbound(podFlow{f})
}

// dnsPort is captured when DNS capture is on.
const dnsPort = 53

// ended is a context that has ended.
func ended() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

func (p *pod) info() state.WorkloadInfo {
	return state.WorkloadInfo{Name: p.spec.Name, Namespace: p.spec.Namespace, ServiceAccount: p.spec.ServiceAccount}
}

// saved is the pod as the state file has it: which namespace it is, not only by what name.
func (p *pod) saved() savedPod {
	s := savedPod{PodSpec: p.spec}
	s.Dev, s.Ino = p.ns.ID()
	return s
}

// stop drains until ctx ends and ends the pod's goroutines; device and routes stay.
func (p *pod) stop(ctx context.Context) {
	p.once.Do(func() {
		p.stopping.Store(true)
		drained := make(chan struct{})
		var draining sync.WaitGroup
		draining.Go(p.panics.Func("the drain of a pod", func() {
			defer close(drained)
			var wg sync.WaitGroup // at the same time: a query that nobody answers must not keep the connections from draining
			wg.Go(p.panics.Func("the end of a pod's servers", func() { p.closeLoopback(ctx) }, nil))
			p.proxy.Shutdown(ctx)
			wg.Wait()
		}, nil))
		select {
		case <-drained:
			// What was copied in full may still wait in the stack for its reader.
			if err := p.stack.Settle(ctx); err != nil {
				p.log.Warn("data that was still on its way to or from the application is cut off", "pod", refOf(p.spec).String())
			}
		case <-ctx.Done():
			// Cut by now. Whoever waits for an application's answer to a handshake is freed by closing the stack.
			select {
			case <-drained:
			case <-time.After(cutGrace):
			}
		}
		// What a panic left locked must not keep the others from ending: after one, nobody is waited for without end.
		var closed sync.WaitGroup
		closed.Go(p.panics.Func("the end of a stack", func() { p.stack.Close() }, nil))
		whole := p.panics.Wait(&closed)
		whole = p.panics.Wait(&draining) && whole
		p.stopRun()
		if whole = p.panics.Wait(&p.running) && whole; !whole {
			p.log.Error("goroutines of the pod are left that wait for what a panic left undone", "pod", refOf(p.spec).String())
		}
	})
}

// cutGrace is how long connections that were cut at the deadline may take to say so to their ends.
const cutGrace = 200 * time.Millisecond

// remove stops the pod and takes every trace of it away.
func (p *pod) remove(ctx context.Context) error {
	p.stop(ctx)
	err := errors.Join(
		steer.Undo(p.plan, steer.Namespaces{Node: p.node, Pod: p.ns}),
		tun.Remove(p.ns, podTUN),
	)
	p.ns.Close()
	p.fds.release()
	return err
}

func (p *pod) status() admin.PodStatus {
	o := p.dev.Offload()
	s := admin.PodStatus{
		PodSpec: p.spec, State: "Up", Device: p.dev.Name(),
		Offload: admin.PodOffload{VNetHdr: o.VNetHdr, CSum: o.CSum, TSO4: o.TSO4, TSO6: o.TSO6, USO: o.USO, Why: o.Why},
	}
	if p.stopping.Load() {
		s.State = "Stopping"
	}
	if err := p.failure.Load(); err != nil {
		s.State, s.Error = "Failed", (*err).Error()
	}
	for _, c := range p.proxy.Connections() {
		if c.Inbound {
			s.Connections.Inbound++
		} else {
			s.Connections.Outbound++
		}
	}
	return s
}
