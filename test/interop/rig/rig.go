package rig

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"ztun/admin/ca"
	"ztun/proxy"
	"ztun/proxy/hbone"
	"ztun/proxy/identity"
	"ztun/proxy/ports"
	"ztun/proxy/rbac"
	"ztun/proxy/refusal"
	"ztun/proxy/state"
)

// Port is HBONE's.
const Port = ports.HBONE

// DeniedPort of the served pod is closed to everybody by policy: a CONNECT to it is answered with 401.
const DeniedPort = 7777

// Wait is how long anything may take before a test gives up on it: far beyond what a busy machine needs.
const Wait = 60 * time.Second

// Rig is the two pods and the address of a third that the test serves itself. Everything ends with the test.
type Rig struct {
	// Served is the pod that foreign clients reach at Served:15008: service account "served".
	Served netip.Addr
	// Client is the pod whose application Dial speaks for: service account "client".
	Client netip.Addr
	// Peer is the address of a pod whose HBONE port is the test's to serve: service account "peer".
	Peer netip.Addr
	CA   *ca.Local

	t        testing.TB
	log      *lines
	view     *state.View
	certs    *ca.Manager
	served   *proxy.Proxy
	client   *proxy.Proxy
	mesh     *net.TCPListener
	accepted counter // connections to Served:15008
	dialled  counter // connections from Client to other pods' 15008
	work     sync.WaitGroup
	closers  []func()
	once     sync.Once
}

// New starts both pods. more adds to what they know of the mesh; the addresses are there by then.
func New(t testing.TB, more ...func(r *Rig, b *state.Builder)) *Rig {
	t.Helper()
	r := &Rig{t: t, log: new(lines)}
	r.CA = NewCA(t, "cluster.local")
	r.listen()
	r.view = r.world(more)
	r.certs = ca.NewManager(ca.ManagerOptions{Signer: r.CA, TTL: time.Hour})
	ctx, cancel := context.WithCancel(context.Background())
	r.work.Go(func() { r.certs.Run(ctx) })
	r.served, r.client = r.proxy("served", r.Served), r.proxy("client", r.Client)
	r.work.Go(r.accept)
	r.closers = append(r.closers, cancel)
	t.Cleanup(func() {
		r.settle()
		r.Close()
		if t.Failed() {
			t.Logf("log of both proxies:\n%s", r.log)
		}
	})
	return r
}

// listen picks a /24 of 127.0.0.0/8 in which the HBONE ports are free. The peer's may not be: Istio's echo server
// never gives it back.
func (r *Rig) listen() {
	r.t.Helper()
	var last error
	for range 20 {
		x, y := byte(64+rand.IntN(128)), byte(rand.IntN(256))
		r.Served, r.Client, r.Peer = netip.AddrFrom4([4]byte{127, x, y, 2}), netip.AddrFrom4([4]byte{127, x, y, 3}),
			netip.AddrFrom4([4]byte{127, x, y, 4})
		peer, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(netip.AddrPortFrom(r.Peer, Port)))
		if err != nil {
			last = err
			continue
		}
		peer.Close()
		ln, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(netip.AddrPortFrom(r.Served, Port)))
		if err == nil {
			r.mesh = ln
			return
		}
		last = err
	}
	r.t.Fatal(last)
}

// world is what both proxies know.
func (r *Rig) world(more []func(*Rig, *state.Builder)) *state.View {
	b := state.NewBuilder("")
	for name, ip := range map[string]netip.Addr{"served": r.Served, "client": r.Client, "peer": r.Peer} {
		b.InsertWorkload(Workload(name, ip))
	}
	b.InsertPolicy(&rbac.Policy{
		Key: "default/denied-port", Name: "denied-port", Namespace: "default", Scope: rbac.ScopeNamespace, Action: rbac.Deny,
		Rules: []rbac.Rule{{{{DestinationPorts: []uint16{DeniedPort}}}}},
	})
	for _, f := range more {
		f(r, b)
	}
	return b.Build()
}

// Workload is a pod that has HBONE, its account named as itself.
func Workload(name string, ips ...netip.Addr) *state.Workload {
	return &state.Workload{
		UID: "rig//v1/Pod/default/" + name, Name: name, Namespace: "default", ServiceAccount: name,
		TrustDomain:  "cluster.local",
		WorkloadName: name, WorkloadType: "deployment", CanonicalName: name, CanonicalRevision: "v1", ClusterID: "Kubernetes",
		Addresses: ips, Protocol: state.HBONE, Capacity: 1,
	}
}

func (r *Rig) proxy(name string, self netip.Addr) *proxy.Proxy {
	log := slog.New(slog.NewTextHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug})).With("pod", name)
	return proxy.New(proxy.Options{
		Info:    state.WorkloadInfo{Name: name, Namespace: "default", ServiceAccount: name},
		Network: &network{self: self, dialled: &r.dialled}, Knowledge: knowledge{r.view}, Certs: r.certs,
		Resolver: net.DefaultResolver,
		Metrics:  proxy.NewMetrics(), Access: log, Log: log, Random: rand.Uint64N,
		Config: proxy.Config{ResponseBaggage: true, SendReason: true},
	})
}

func (r *Rig) accept() {
	for {
		c, err := r.mesh.AcceptTCP()
		if err != nil {
			return
		}
		r.accepted.add(1)
		r.work.Go(func() { r.served.ServeMesh(c, netip.AddrPort{}) })
	}
}

// settle waits until no connection is left in either pod: what the peers closed must not stay behind in ours.
func (r *Rig) settle() {
	if r.t.Failed() {
		return
	}
	for _, p := range []*proxy.Proxy{r.served, r.client} {
		if !Eventually(func() bool { return len(slices.Collect(p.Live())) == 0 }) {
			r.t.Errorf("connections left after the test: %+v", slices.Collect(p.Live()))
		}
	}
}

// Eventually polls until f holds, for Wait at most.
func Eventually(f func() bool) bool {
	for end := time.Now().Add(Wait); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if f() {
			return true
		}
	}
	return f()
}

// Drain shuts the served pod down gracefully: GOAWAY, and connections may finish until ctx ends.
func (r *Rig) Drain(ctx context.Context) { r.served.Shutdown(ctx) }

// Cut ends the served pod and its connections at once.
func (r *Rig) Cut() { r.served.Close() }

// Connections are those that the served pod carries now.
func (r *Rig) Connections() []proxy.ConnectionInfo { return slices.Collect(r.served.Live()) }

// Accepted is how many TCP connections came to the served pod's HBONE port so far.
func (r *Rig) Accepted() int { return r.accepted.get() }

// Dialled is how many TCP connections the client pod opened to HBONE ports so far.
func (r *Rig) Dialled() int { return r.dialled.get() }

// Log is what both proxies logged so far.
func (r *Rig) Log() string { return r.log.String() }

// Close ends everything; New has it called.
func (r *Rig) Close() {
	r.once.Do(func() {
		r.mesh.Close()
		r.served.Close()
		r.client.Close()
		for _, f := range r.closers {
			f()
		}
		r.work.Wait()
	})
}

// Mesh is where the served pod takes tunnels.
func (r *Rig) Mesh() string { return netip.AddrPortFrom(r.Served, Port).String() }

// Identity issues a certificate for a service account of namespace default, signed by the rig's CA.
func (r *Rig) Identity(account string) *identity.Certificate {
	r.t.Helper()
	return Issue(r.t, r.CA, ID(account))
}

// App runs an application at ip, a port of the kernel's choice, until the test ends; h is called per connection,
// which is closed when h returns.
func (r *Rig) App(ip netip.Addr, h func(*net.TCPConn)) netip.AddrPort {
	r.t.Helper()
	ln, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: ip.AsSlice()})
	if err != nil {
		r.t.Fatal(err)
	}
	var work sync.WaitGroup
	var mu sync.Mutex
	open := map[*net.TCPConn]struct{}{}
	work.Go(func() {
		for {
			c, err := ln.AcceptTCP()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = struct{}{}
			mu.Unlock()
			work.Go(func() {
				defer func() {
					c.Close()
					mu.Lock()
					delete(open, c)
					mu.Unlock()
				}()
				h(c)
			})
		}
	})
	r.t.Cleanup(func() {
		ln.Close()
		mu.Lock()
		for c := range open {
			c.Close()
		}
		mu.Unlock()
		work.Wait()
	})
	return ln.Addr().(*net.TCPAddr).AddrPort()
}

// RefusedError is the verdict on a connection that the client pod's proxy did not accept.
type RefusedError struct{ Refusal refusal.Way }

func (e *RefusedError) Error() string { return fmt.Sprintf("rig: SYN refused (%d)", e.Refusal) }

// Dial opens a connection as the client pod's application does: a SYN to dst is captured and carried by its proxy.
// The error is a *RefusedError if the proxy turned it down.
func (r *Rig) Dial(dst netip.AddrPort) (*net.TCPConn, error) {
	f := &flow{src: netip.AddrPortFrom(r.Client, uint16(20000+rand.IntN(30000))), dst: dst, verdict: make(chan error, 1)}
	r.work.Go(func() { r.client.ServeOutbound(f) })
	select {
	case err := <-f.verdict:
		return f.app, err
	case <-time.After(Wait):
		return nil, errors.New("rig: no verdict on the SYN")
	}
}

// Tunnel opens a tunnel of the client pod's to addr beneath its proxy: hbone's client over mTLS, for identity want.
// It ends with the test.
func (r *Rig) Tunnel(addr string, want string, cfg hbone.Config) (*hbone.ClientConn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), Wait)
	defer cancel()
	raw, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	conn, _, err := hbone.Client(ctx, raw, identity.ClientTLS(r.Identity("client"), []identity.ID{ID(want)},
		identity.Params{}), nil)
	if err != nil {
		return nil, err
	}
	cc, err := hbone.NewClientConn(conn, cfg)
	if err != nil {
		return nil, err
	}
	r.t.Cleanup(func() { cc.Close() })
	return cc, nil
}
