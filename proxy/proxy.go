package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"runtime/pprof"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"ztun/proxy/brief"
	"ztun/proxy/fair"
	"ztun/proxy/grow"
	"ztun/proxy/hbone"
	"ztun/proxy/identity"
	"ztun/proxy/rbac"
	"ztun/proxy/rescue"
	"ztun/proxy/route"
	"ztun/proxy/state"
)

// Bounds in time (spec 1 and 14.10: the connect timeout is ztunnel's, the others are what it lacks).
const (
	connectTimeout   = 10 * time.Second
	handshakeTimeout = 10 * time.Second
	responseTimeout  = connectTimeout + 2*time.Second // the far side may use its whole connect timeout
	workloadWait     = 5 * time.Second
)

// Config is what one proxy takes from the environment.
type Config struct {
	NetworkName     string // NETWORK
	ResponseBaggage bool   // ENABLE_RESPONSE_BAGGAGE
	TLS             identity.Params
	HBONE           hbone.Config
	PoolMaxStreams  int           // POOL_MAX_STREAMS_PER_CONNECTION
	PoolUnused      time.Duration // POOL_UNUSED_RELEASE_TIMEOUT
	SOCKS5          bool          // UNSTABLE_ENABLE_SOCKS5: its port is then illegal, too
	// TLS handshakes under way on 15008 per pod; the greediest source loses one. SOCKS5's as well
	MaxMeshHandshake int
	// LocalhostAppTunnel (LOCALHOST_APP_TUNNEL, ztunnel's default is true): application tunnels with PROXY
	// protocol are dialled on the pod's loopback, else at the pod's address, as the client.
	LocalhostAppTunnel bool
	SendReason         bool // ZTUN_SEND_REASON
	Remember           int  // ZTUN_FLOWS: ended connections that are remembered, and as many that were turned down
	PolicyInfoLogging  bool // AUTHZ_POLICY_INFO_LOGGING: what policy decides is logged at INFO, not DEBUG
}

// Options is what a Proxy is made of.
type Options struct {
	Info      state.WorkloadInfo
	Network   Network
	Knowledge Knowledge
	Certs     Certificates
	Resolver  Resolver // of the daemon's own namespace; package resolve has one with a cache
	// Names resolves for SOCKS5 clients as the pod's DNS proxy would: names of the mesh, and all others. nil:
	// SOCKS5 takes addresses only (as ztunnel without its DNS proxy).
	Names func(ctx context.Context, host string) ([]netip.Addr, error)
	// Demand asks the control plane for a key ("network/ip" or "namespace/hostname") and returns when it is
	// answered, or ctx ends; a View with the answer is published by then. An error says that it is not known whether there
	// is such a thing. nil: on-demand look-ups are off.
	Demand      func(ctx context.Context, key string) error
	OnDemandDNS *OnDemandDNS        // of all pods; nil: not counted
	Policies    *UnknownPolicies    // of all pods; nil: the proxy's own
	Panics      *rescue.Panics      // catches those of the proxy's goroutines; nil: nobody does
	Report      *fair.Report        // of what bounds turn away; nil: nobody is told
	Handshakes  *fair.Turns[Crypto] // of all pods: leave to compute handshakes; nil: whenever they like
	// Local finds the proxy of a pod of this process by its address; nil: there is none there. Connections to it are
	// relayed in memory. Without Local all take the wire.
	Local   func(netip.Addr) *Proxy
	Metrics *Metrics
	Access  *slog.Logger // target "access"
	Log     *slog.Logger
	Config  Config
	Random  func(n uint64) uint64 // uniform in [0, n)
}

// Crypto is whose handshake it is: a pod, and who calls it. The pod's own calls have no source.
type Crypto struct {
	Pod    state.WorkloadInfo
	Source netip.Addr
}

// turn is leave to compute for one handshake.
type turn struct {
	turns *fair.Turns[Crypto]
	of    Crypto
}

func (t turn) Take() { t.turns.Take(t.of) }
func (t turn) Give() { t.turns.Give() }

// turn is what a handshake with source computes by.
func (p *Proxy) turn(source netip.Addr) hbone.Turn {
	if p.o.Handshakes == nil {
		return nil
	}
	return turn{p.o.Handshakes, Crypto{p.o.Info, source}}
}

// Proxy is one pod's data plane.
type Proxy struct {
	o    Options
	pool *hbone.Pool

	ctx   context.Context // ends when connections are cut
	stop  context.CancelFunc
	brief *brief.Set // those of connections in the making, which end with ctx

	mu       sync.Mutex
	draining bool
	recheck  *time.Timer // nil: none is due
	sweep    *time.Timer // the next one for idle connections; nil: none is due
	mesh     map[*hbone.ServerConn]struct{}
	work     sync.WaitGroup
	workers  grow.Workers // those of connections; whoever is idle at a sweep ends

	movers sync.Pool // of *mover

	sweeping  atomic.Bool // a sweep is due or under way
	restAfter time.Duration

	table      table
	history    history
	unlabelled labels // of what was turned down before it was known
	bounds     *bounds
	ailing     ailing
	asks       datagramAsks
	retried    atomic.Uint64      // connections that went to another endpoint than the first
	foreign    atomic.Uint64      // requests whose tunnel's source address is not its peer's
	tunnels    hbone.Stats        // of both directions
	labels     [3]context.Context // pprof labels by direction
	illegal    []uint16           // ports that no connection may be steered to
	said       atomic.Pointer[said]

	policyLogger *slog.Logger
}

// New makes the data plane of one pod; nothing runs until flows arrive.
func New(o Options) *Proxy {
	if o.Config.MaxMeshHandshake == 0 {
		o.Config.MaxMeshHandshake = maxHandshakes
	}
	o.Config.HBONE.Panics = o.Panics
	p := &Proxy{o: o, mesh: map[*hbone.ServerConn]struct{}{}, illegal: route.IllegalPorts(o.Config.SOCKS5),
		restAfter: restAfter}
	p.bounds = newBounds(&o)
	p.history = history{newRing(o.Config.Remember), newRing(o.Config.Remember)}
	p.o.Config.HBONE.Stats, p.o.Config.HBONE.Calmed = &p.tunnels, p.bounds.calmed
	if p.o.Policies == nil {
		p.o.Policies = NewUnknownPolicies(false, o.Log)
	}
	p.policyLogger = newPolicyLogger(&o)
	p.o.Config.HBONE.Go, p.workers.OnIdle = p.workers.Go, p.sweepSoon
	p.ctx, p.stop = context.WithCancel(context.Background())
	p.brief = brief.New(p.ctx, o.Panics)
	pod := o.Info.Namespace + "/" + o.Info.Name
	for dir, name := range directions {
		p.labels[dir] = pprof.WithLabels(context.Background(), pprof.Labels("role", "worker", "pod", pod, "dir", name))
	}
	p.pool = hbone.NewPool(hbone.PoolOptions{
		Dial: p.dialTunnel, MaxStreams: o.Config.PoolMaxStreams, Unused: o.Config.PoolUnused, Config: p.o.Config.HBONE,
	})
	return p
}

// localWorkload is the record of the pod that we serve, waited for if it has not arrived yet.
func (p *Proxy) localWorkload(ctx context.Context) (*state.View, *state.Workload, error) {
	// The channel is taken before the View, so that a publication in between is seen.
	changed := p.o.Knowledge.Changed()
	view := p.o.Knowledge.View()
	if w := view.WorkloadByInfo(p.o.Info); w != nil {
		return view, w, nil
	}
	timer := time.NewTimer(workloadWait)
	defer timer.Stop()
	for {
		select {
		case <-changed:
		case <-timer.C:
			i, why := p.o.Info, kindUnknownWorkload
			if view.Empty() {
				why = kindNothingKnown
			}
			return nil, nil, fail(why, fmt.Errorf("%s.%s (%s)", i.ServiceAccount, i.Namespace, i.Name))
		case <-ctx.Done():
			return nil, nil, fail(kindDrain, nil)
		}
		changed = p.o.Knowledge.Changed()
		view = p.o.Knowledge.View()
		if w := view.WorkloadByInfo(p.o.Info); w != nil {
			return view, w, nil
		}
	}
}

// dialTunnel opens one tunnel to a peer's HBONE port: certificate, TCP from the pod's address, TLS.
func (p *Proxy) dialTunnel(ctx context.Context, key hbone.Key) (hbone.Dialled, error) {
	cert, err := p.o.Certs.Certificate(ctx, key.Source)
	if err != nil {
		return hbone.Dialled{}, fail(kindIdentity, err)
	}
	var want []identity.ID
	if key.Dest != "" {
		for _, s := range strings.Split(key.Dest, ",") {
			if id, err := identity.Parse(s); err == nil {
				want = append(want, id)
			}
		}
	}
	begin := time.Now()
	d, err := p.dialPeer(ctx, key.Addr, cert, want)
	if err != nil && errors.Is(err, syscall.ECONNRESET) && time.Since(begin) > silentFor && ctx.Err() == nil {
		d, err = p.dialPeer(ctx, key.Addr, cert, want)
	}
	return d, err
}

// silentFor is how long a peer has said nothing, before it reset a handshake, whose process has ended in between: what
// is sent again, after 200 ms and more, finds the next one, which knows nothing of the connection. That one may have a
// connection of its own; nobody is to lose his to a tunnel that was under way when a peer was killed. Whoever refuses a
// tunnel does so at once.
const silentFor = 150 * time.Millisecond

// dialPeer connects to a peer and has both sides prove who they are.
func (p *Proxy) dialPeer(ctx context.Context, addr netip.AddrPort, cert *identity.Certificate, want []identity.ID) (
	hbone.Dialled, error) {
	dctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	raw, err := p.o.Network.DialMesh(dctx, addr)
	if err != nil {
		if timedOut(err) {
			return hbone.Dialled{}, fail(kindNetworkPolicy, err)
		}
		return hbone.Dialled{}, fail(kindIO, err)
	}
	hctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	conn, cs, err := hbone.Client(hctx, raw, identity.ClientTLS(cert, want, p.o.Config.TLS), p.turn(netip.Addr{}))
	if err != nil {
		raw.Close()
		return hbone.Dialled{}, fail(kindTLS, err)
	}
	return hbone.Dialled{Conn: conn, Opened: func(t *hbone.ClientConn) func() { return p.opened(t, proof{cert, cs}) }}, nil
}

// Recheck cuts the inbound connections that policy no longer allows. The admin loop's publication of
// changed policies is followed by a call of it (spec 7.7); workloads are looked up afresh, so that a
// policy newly attached to the workload counts as well.
func (p *Proxy) Recheck() {
	view := p.o.Knowledge.View()
	local := view.WorkloadByInfo(p.o.Info)
	if local == nil {
		return
	}
	policies := view.PoliciesFor(local)
	for _, c := range p.table.snapshot() {
		on := c.where()
		if !on.inbound || on.exempt {
			continue
		}
		v := rbac.Evaluate(policies, on.policy)
		// A policy that is listed but not loaded (yet) may still allow the connection, since workloads and policies do
		// not arrive together. It is no reason to cut one that was allowed.
		if !v.Allowed && len(v.Missing) > 0 {
			if left := p.o.Policies.patience(v.Missing, local.UID); left > 0 {
				p.recheckIn(left)
				continue
			}
		}
		if !v.Allowed {
			p.o.Log.Info("connection is no longer allowed, closing it", "src", on.src, "dst", on.actualDst, "policy", v.Policy)
			c.sever(fail(kindPolicyChange, nil))
		}
	}
}

// recheckIn re-checks after d, when nobody waits for a missing policy any longer.
func (p *Proxy) recheckIn(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.recheck != nil || p.draining {
		return
	}
	p.work.Add(1)
	p.recheck = time.AfterFunc(d, p.o.Panics.Func("a re-check of policies", func() {
		defer p.work.Done()
		p.mu.Lock()
		p.recheck = nil
		draining := p.draining
		p.mu.Unlock()
		if !draining {
			p.Recheck()
		}
	}, nil))
}

// Stats are figures of one pod's data plane.
type Stats struct {
	Pool hbone.PoolStats
	// SourceRewritten counts requests over tunnels whose source address is not their peer's.
	SourceRewritten uint64
	Retried         uint64 // attempts at another endpoint of a service, because one could not be reached
	Tunnels         hbone.Counts
	Overloaded      uint64 // connections and requests that lost their place, or got none, at a bound of the proxy
}

// Stats returns the figures of this moment.
func (p *Proxy) Stats() Stats {
	return Stats{Pool: p.pool.Stats(), Tunnels: p.tunnels.Counts(), Overloaded: p.bounds.turned.Load(),
		Retried: p.retried.Load(), SourceRewritten: p.foreign.Load()}
}

// OlderThan reports whether a connection has been there for longer than age.
func (p *Proxy) OlderThan(age time.Duration) bool {
	before := time.Now().Add(-age)
	return p.table.any(func(c *connection) bool { return c.where().start.Before(before) })
}

// Shutdown drains: nothing new is taken, mesh peers are told so (GOAWAY), and connections may finish
// until ctx ends; what is left then is cut and recorded with ztunnel's drain text.
func (p *Proxy) Shutdown(ctx context.Context) {
	p.mu.Lock()
	p.draining = true
	mesh := make([]*hbone.ServerConn, 0, len(p.mesh))
	for s := range p.mesh {
		mesh = append(mesh, s)
	}
	p.mu.Unlock()
	for _, s := range mesh {
		s.GoAway()
	}
	select {
	case <-p.table.empty():
	case <-ctx.Done():
		if n := len(p.table.snapshot()); n > 0 { // a pod that is let go has no time at all
			p.o.Log.Warn("drain duration expired with pending connections, forcefully shutting down", "connections", n)
		}
		p.table.severAll(fail(kindDrain, nil)) // before their tunnels go: the reason is ours
	}
	// And what is no connection yet, such as a request that waits for the pod's record.
	defer context.AfterFunc(ctx, p.o.Panics.Func("the end of a drain", p.stop, nil))()
	// A connection leaves the table when its last bytes and its end are queued, not when they are sent; and
	// a peer that has not read our GOAWAY yet may have opened one more. Both end with their tunnel.
	var flushed sync.WaitGroup
	for _, s := range mesh {
		flushed.Go(p.o.Panics.Func("draining a tunnel", func() { s.Shutdown(ctx) }, nil))
	}
	flushed.Go(p.o.Panics.Func("draining the pool", func() { p.pool.Shutdown(ctx) }, nil))
	flushed.Wait()
	p.Close()
}

// Close cuts everything and waits for it to end.
func (p *Proxy) Close() {
	p.mu.Lock()
	p.draining = true
	mesh := make([]*hbone.ServerConn, 0, len(p.mesh))
	for s := range p.mesh {
		mesh = append(mesh, s)
	}
	if p.recheck != nil && p.recheck.Stop() {
		p.recheck = nil
		p.work.Done()
	}
	if p.sweep != nil && p.sweep.Stop() {
		p.sweep = nil
		p.work.Done()
	}
	p.mu.Unlock()
	p.table.severAll(fail(kindDrain, nil))
	p.stop()
	for _, s := range mesh {
		s.Close()
	}
	p.pool.Close()
	done := p.o.Panics.Wait(&p.work)
	p.workers.Close()
	if !done || !p.o.Panics.Wait(&p.workers.Work) {
		p.o.Log.Warn("connections are left that wait for what a panic left undone", "pod", p.o.Info.Namespace+"/"+
			p.o.Info.Name)
	}
	p.bounds.close()
}

// canonical turns an IPv4-mapped IPv6 address into the IPv4 address that it stands for (spec 1).
func canonical(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap().WithZone(""), a.Port())
}

func addrPort(a net.Addr) netip.AddrPort {
	if t, ok := a.(*net.TCPAddr); ok {
		return canonical(t.AddrPort())
	}
	return netip.AddrPort{}
}
