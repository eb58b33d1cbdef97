package connpath

import (
	"context"
	"io"
	"log/slog"
	mrand "math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"ztun/admin/ca"
	"ztun/admin/xds"
	"ztun/admin/zlog"
	"ztun/cmd/attach"
	"ztun/proxy"
	"ztun/proxy/fair"
	"ztun/proxy/rescue"
	"ztun/proxy/state"
	"ztun/tun/tuntest"
)

// The two pods of docs/samples/workloads.yaml.
var (
	addrA = netip.MustParseAddr("10.91.1.2")
	addrB = netip.MustParseAddr("10.91.2.2")
)

// knowledge is a View that never changes.
type knowledge struct{ view *state.View }

func (k knowledge) View() *state.View        { return k.view }
func (k knowledge) Changed() <-chan struct{} { return nil }

// handler is what a daemon's pod does with what comes to it.
type handler struct{ p **proxy.Proxy }

func (h handler) ServeOutbound(f proxy.Flow)                            { (*h.p).ServeOutbound(f) }
func (h handler) ServePassthrough(f proxy.Flow)                         { (*h.p).ServePassthrough(f) }
func (h handler) ServeProbe(f proxy.Flow)                               { (*h.p).ServePassthrough(f) }
func (h handler) ServeMesh(c net.Conn, at netip.AddrPort)               { (*h.p).ServeMesh(c, at) }
func (handler) ServeDNS(attach.Query)                                   {}
func (handler) AllowDatagram(bool, netip.AddrPort, netip.AddrPort) bool { return false }

// ways are a stack's, but that the mesh is a listener on loopback.
type ways struct {
	*attach.Stack
	mesh string
}

func (w ways) DialMesh(context.Context, netip.AddrPort) (net.Conn, error) {
	return net.Dial("tcp", w.mesh)
}

// addressed is a mesh connection with the addresses that it would have on the wire, and still a socket to hbone.
type addressed struct{ *net.TCPConn }

func (addressed) LocalAddr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.AddrPortFrom(addrB, 15008))
}
func (addressed) RemoteAddr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.AddrPortFrom(addrA, 48000))
}

// world is pod a, whose client calls pod b's server, and what lies between them.
type world struct{ client, server *kernel }

func newWorld(t testing.TB) *world {
	t.Helper()
	data, err := os.ReadFile("../../../docs/samples/workloads.yaml")
	if err != nil {
		t.Fatal(err)
	}
	local, err := xds.ParseLocal(data)
	if err != nil {
		t.Fatal(err)
	}
	certs := ca.NewManager(ca.ManagerOptions{Signer: ca.NewFake(), TTL: time.Hour})
	log := zlog.New(zlog.Options{Writer: io.Discard})
	panics := rescue.New(log.Logger("panics"))
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	work.Go(func() { certs.Run(ctx) })
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var kernels [2]*kernel
	var proxies [2]*proxy.Proxy
	var stacks [2]*attach.Stack
	var far [2]*tuntest.Device
	for i, addr := range []netip.Addr{addrA, addrB} {
		name := []string{"a", "b"}[i]
		near, there := tuntest.Pair(tuntest.Options{Offload: true, Queue: 1024})
		far[i] = there
		kernels[i] = &kernel{dev: there, self: addr, open: map[uint16]*conn{}, out: make([]byte, 128),
			done: make(chan struct{}, 1024)}
		o := &attach.Options{Logger: log.Logger, Panics: panics, Report: fair.NewReport(slog.New(slog.DiscardHandler))}
		pod := attach.Pod{Label: "default/" + name}
		pod.IPs = []netip.Addr{addr}
		if stacks[i], err = attach.NewStack(o, pod, 1500, near, nil, handler{&proxies[i]}); err != nil {
			t.Fatal(err)
		}
		proxies[i] = proxy.New(proxy.Options{
			Info:    state.WorkloadInfo{Name: name, Namespace: "default", ServiceAccount: name},
			Network: ways{stacks[i], ln.Addr().String()}, Knowledge: knowledge{local.View("")}, Certs: certs,
			Resolver: net.DefaultResolver, Metrics: proxy.NewMetrics(), Access: log.Logger("access"),
			Log: slog.New(slog.DiscardHandler), Random: mrand.Uint64N, Panics: panics,
			Config: proxy.Config{ResponseBaggage: true, PoolMaxStreams: 100, PoolUnused: time.Minute,
				Remember: 1000},
		})
	}
	client := kernels[0]
	client.dst, client.call = netip.AddrPortFrom(addrB, 8080), true
	work.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			work.Go(func() { proxies[1].ServeMesh(addressed{c.(*net.TCPConn)}, netip.AddrPort{}) })
		}
	})
	for i := range kernels {
		stacks[i].Run()
		work.Go(func() { kernels[i].run(t) })
	}
	t.Cleanup(func() {
		for i := range proxies {
			proxies[i].Close()
			stacks[i].Stop()
			far[i].Close()
		}
		ln.Close()
		cancel()
		work.Wait()
		panics.Close()
		log.Close(context.Background())
	})
	return &world{client: client, server: kernels[1]}
}
