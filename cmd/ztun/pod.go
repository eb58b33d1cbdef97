package main

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"ztun/admin"
	"ztun/cmd/attach"
	"ztun/proxy"
	"ztun/proxy/dns"
	"ztun/proxy/fair"
	"ztun/proxy/refusal"
	"ztun/proxy/rescue"
	"ztun/proxy/state"
)

// pod is what one attached pod consists of: how it is attached, and what serves it.
type pod struct {
	spec   admin.PodSpec
	uid    string
	label  string       // namespace/name; no two attached pods share one
	memory *fair.Budget // of what lies here for its connections
	panics *rescue.Panics
	att    attach.Attachment
	proxy  *proxy.Proxy
	dns    *dns.Server    // nil: DNS capture is off
	socks  []net.Listener // SOCKS5; none unless it is on
	udp    udpMode
	log    *slog.Logger

	// built is closed when what flows and queries go to stands, or never will (proxy is nil then): they may arrive as
	// soon as there is an attachment, by the routes that a killed daemon has left.
	built    chan struct{}
	stopping atomic.Bool
	running  sync.WaitGroup
	drained  sync.Once
	ending   sync.WaitGroup
	once     sync.Once
}

var _ attach.Handler = (*pod)(nil)

// lookup resolves a name for the pod, as its DNS proxy does; nil: nobody does.
type lookup func(ctx context.Context, host string) ([]netip.Addr, error)

// podParts is what the composition root lends to every pod.
type podParts struct {
	c      *Config
	log    *slog.Logger
	kind   attach.Kind
	proxy  func(spec admin.PodSpec, n proxy.Network, names lookup, memory *fair.Budget) *proxy.Proxy
	memory *memory // nil: without bound
	panics *rescue.Panics

	know        dns.Knowledge
	nameservers []netip.AddrPort // of the daemon's resolv.conf
	search      []string         // search domains of the pods beside the cluster's own
	dnsMetrics  *dns.Metrics
	dnsLog      *slog.Logger
}

// newPod attaches a pod. What it has made is unmade when a later step fails.
func newPod(ctx context.Context, parts *podParts, a attach.Pod) (_ *pod, err error) {
	a.Memory = parts.memory.forPod()
	p := &pod{memory: a.Memory, spec: a.PodSpec, uid: a.UID, label: a.Label, udp: parts.c.UDP.Mode, log: parts.log,
		panics: parts.panics, built: make(chan struct{})}
	var undo []func()
	defer func() {
		close(p.built)
		if err != nil {
			for i := len(undo) - 1; i >= 0; i-- {
				undo[i]()
			}
		}
	}()
	if p.att, err = parts.kind.Attach(ctx, a, p); err != nil {
		return nil, err
	}
	undo = append(undo, func() { p.att.Remove() }) // it says itself what it has left; the reason to remove it is told
	// Kept by path: a pid or a name may mean something else after a restart.
	p.spec.NetNS = p.att.Place().Path
	p.spec.IPs = p.att.Addrs()
	undo = append(undo, func() { p.closeLoopback(ended()); p.running.Wait() }) // after all else that ends what runs
	var names lookup
	if parts.c.DNS.Proxy {
		if err = p.serveNames(parts); err != nil {
			return nil, err
		}
		names = p.dns.Lookup
	}
	p.proxy = parts.proxy(p.spec, p.att, names, p.memory)
	undo = append(undo, p.proxy.Close)
	if parts.c.Proxy.SOCKS5 {
		if err = p.serveSOCKS(parts); err != nil {
			return nil, err
		}
	}
	if err = p.att.Capture(ctx); err != nil {
		return nil, err
	}
	return p, nil
}

// ServePassthrough implements attach.Handler.
func (p *pod) ServePassthrough(f proxy.Flow) {
	if p.stands(f) {
		p.proxy.ServePassthrough(f)
	}
}

// ServeProbe implements attach.Handler.
func (p *pod) ServeProbe(f proxy.Flow) {
	if p.stands(f) {
		p.proxy.ServeProbe(f)
	}
}

// ServeOutbound implements attach.Handler.
func (p *pod) ServeOutbound(f proxy.Flow) {
	if !p.stands(f) {
		return
	}
	if p.dns != nil && f.Dst().Port() == dnsPort {
		// The DNS proxy answers for every nameserver, so the handshake is its own.
		if c, err := f.Accept(); err == nil {
			p.dns.ServeConn(c, f.Dst())
		}
		return
	}
	p.proxy.ServeOutbound(f)
}

// stands waits until the pod does. One that never will refuses the flow.
func (p *pod) stands(f proxy.Flow) bool {
	<-p.built
	if p.proxy == nil {
		f.Refuse(refusal.Silent) // the client's next SYN may find the pod attached
	}
	return p.proxy != nil
}

// ServeMesh implements attach.Handler.
func (p *pod) ServeMesh(conn net.Conn, at netip.AddrPort) {
	<-p.built
	if p.proxy == nil {
		conn.Close()
		return
	}
	p.proxy.ServeMesh(conn, at)
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
	place := p.att.Place()
	return savedPod{PodSpec: p.spec, Dev: place.Dev, Ino: place.Ino}
}

// drain takes no new connection and lets those that are there finish until ctx ends; names are answered all the while.
func (p *pod) drain(ctx context.Context) {
	p.drained.Do(func() {
		p.stopping.Store(true)
		closeAll(p.socks, nil)
		if !p.await(ctx, "the drain of a pod", func() { p.proxy.Shutdown(ctx) }) {
			return // cut: whoever waits for an application's answer to a handshake is freed by closing the stack
		}
		// What was copied in full may still wait in the stack for its reader.
		if err := p.att.Settle(ctx); err != nil {
			p.log.Warn("data that was still on its way to or from the application is cut off", "pod", p.label)
		}
	})
}

// await runs f, which is to end soon after ctx, and is left to itself if it does not. False: ctx came first.
func (p *pod) await(ctx context.Context, what string, f func()) bool {
	done := make(chan struct{})
	p.ending.Go(p.panics.Func(what, func() { defer close(done); f() }, nil))
	select {
	case <-done:
		return true
	case <-ctx.Done():
	}
	select {
	case <-done:
	case <-time.After(cutGrace):
	}
	return false
}

// stop drains until ctx ends and ends the pod's goroutines; device and routes stay. What it answers last are names: a
// query that nobody answers must not keep the connections from draining, nor they the names of those that wait.
func (p *pod) stop(ctx context.Context) {
	p.once.Do(func() {
		p.drain(ctx)
		p.await(ctx, "the end of a pod's servers", func() { p.closeLoopback(ctx) })
		// What a panic left locked must not keep the others from ending: after one, nobody is waited for without end.
		whole := p.att.Stop()
		whole = p.panics.Wait(&p.ending) && whole
		if whole = p.panics.Wait(&p.running) && whole; !whole {
			p.log.Error("goroutines of the pod are left that wait for what a panic left undone", "pod", p.label)
		}
	})
}

// cutGrace is how long connections that were cut at the deadline may take to say so to their ends.
const cutGrace = 200 * time.Millisecond

// remove stops the pod and takes every trace of it away.
func (p *pod) remove(ctx context.Context) error {
	p.stop(ctx)
	return p.att.Remove()
}

func (p *pod) status() admin.PodStatus {
	st := p.att.Status()
	o := st.Offload
	s := admin.PodStatus{
		PodSpec: p.spec, State: "Up", Device: st.Device,
		Offload: admin.PodOffload{VNetHdr: o.VNetHdr, CSum: o.CSum, TSO4: o.TSO4, TSO6: o.TSO6, USO: o.USO, Why: o.Why},
	}
	if p.stopping.Load() {
		s.State = "Stopping"
	}
	if st.Err != nil {
		s.State, s.Error = "Failed", st.Err.Error()
	}
	s.Connections.Inbound, s.Connections.Outbound = p.proxy.Open()
	return s
}
