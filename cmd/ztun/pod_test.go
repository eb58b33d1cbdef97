package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"ztun/admin"
	"ztun/cmd/attach"
	"ztun/cmd/attach/isolated"
	"ztun/proxy"
	"ztun/proxy/fair"
	"ztun/proxy/state"
	"ztun/tun/tuntest/nslab"
)

// podLab is what the daemon lends to isolated pods, in namespaces of the test's own.
type podLab struct {
	node, pod *nslab.NS
	parts     *podParts
	close     func() // of the kind that is open
	spec      admin.PodSpec
	proxy     func(network proxy.Network) // called when the pod's proxy is made; may be nil
}

// onePod is a control plane that knows the pod and nothing else.
type onePod struct{ view *state.View }

func (k onePod) View() *state.View      { return k.view }
func (onePod) Changed() <-chan struct{} { return nil }

func newPodLab(t *testing.T) *podLab {
	t.Helper()
	l := &podLab{node: nslab.New(t), pod: nslab.New(t)}
	c := load(t, "UNSTABLE_ENABLE_SOCKS5", "true")
	l.spec = admin.PodSpec{Name: "p", Namespace: "default", ServiceAccount: "default", NetNS: l.pod.Path(),
		IPs: []netip.Addr{netip.MustParseAddr("10.91.1.2")}}
	info := state.WorkloadInfo{Name: "p", Namespace: "default", ServiceAccount: "default"}
	b := state.NewBuilder("")
	b.InsertWorkload(&state.Workload{UID: "p", Name: info.Name, Namespace: info.Namespace,
		ServiceAccount: info.ServiceAccount, Addresses: l.spec.IPs})
	know := onePod{b.Build()}
	quiet := slog.New(slog.DiscardHandler)
	l.parts = &podParts{c: c, log: quiet, dnsLog: quiet, know: know,
		proxy: func(spec admin.PodSpec, n proxy.Network, names lookup, _ *fair.Budget) *proxy.Proxy {
			if l.proxy != nil {
				l.proxy(n)
			}
			return proxy.New(proxy.Options{Info: info, Network: n, Knowledge: know, Names: names, Metrics: proxy.NewMetrics(),
				Access: quiet, Log: quiet})
		}}
	l.open(t, 1024)
	t.Cleanup(func() { l.close() })
	return l
}

// open makes the node's side, as a daemon does that may have limit files open; another that was open is closed.
func (l *podLab) open(t *testing.T, limit uint64) *attach.Descriptors {
	t.Helper()
	if l.close != nil {
		l.close()
	}
	fds := attach.NewDescriptors(limit, nil)
	var serving sync.WaitGroup
	kind := isolated.New(attach.Options{
		NetNS: l.node.NS, NodeTUN: l.parts.c.Attach.NodeTUN, MTU: l.parts.c.Attach.MTU, IPv6: true, DNS: true,
		Socket: l.parts.c.meshSocket(), Stack: l.parts.c.stack(),
		Descriptors: fds, Serve: func(_ string, f func() error) { serving.Go(func() { f() }) },
		Logger: func(string) *slog.Logger { return slog.New(slog.DiscardHandler) },
	})
	l.close = func() { kind.Close(); serving.Wait() }
	if err := kind.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	l.parts.kind = kind
	return fds
}

// attach is newPod, which must not take long.
func (l *podLab) attach(t *testing.T) (*pod, error) {
	t.Helper()
	type result struct {
		p   *pod
		err error
	}
	done := make(chan result, 1)
	go func() {
		p, err := newPod(context.Background(), l.parts, attach.Pod{PodSpec: l.spec, Label: "default/p"})
		done <- result{p, err}
	}()
	select {
	case r := <-done:
		return r.p, r.err
	case <-time.After(20 * time.Second):
		t.Fatal("attaching the pod hangs")
		return nil, nil
	}
}

func (l *podLab) detach(t *testing.T, p *pod) {
	t.Helper()
	if err := p.remove(ended()); err != nil {
		t.Error(err)
	}
}

// Whatever step fails, the pod is as it was, and can be attached when the cause is gone.
func TestFailedAttachIsUndone(t *testing.T) {
	l := newPodLab(t)
	hold := func(network, addr string) (release func()) {
		var c interface{ Close() error }
		if err := l.pod.Do(func() (err error) {
			if network == "udp" {
				c, err = net.ListenPacket(network, addr)
			} else {
				c, err = net.Listen(network, addr)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return func() { c.Close() }
	}
	for _, tt := range []struct {
		name     string
		obstruct func() (undo func())
		say      []string
	}{
		{"the DNS proxy's TCP port is taken", func() func() {
			return hold("tcp", "127.0.0.1:15053")
		}, []string{"DNS proxy", "127.0.0.1:15053", "in use", "ISTIO_META_DNS_CAPTURE"}},
		{"the DNS proxy's UDP port is taken", func() func() {
			return hold("udp", "[::1]:15053")
		}, []string{"DNS proxy", "[::1]:15053", "in use"}},
		{"the SOCKS5 port is taken", func() func() {
			return hold("tcp", "127.0.0.1:15080")
		}, []string{"SOCKS5", "127.0.0.1:15080", "in use", "UNSTABLE_ENABLE_SOCKS5"}},
		{"the last step, the pod's routes", func() func() {
			l.pod.IP(t, "link", "add", "v0", "type", "veth", "peer", "name", "v1")
			// What the kernel does by and by is not to come between the two looks: no link-local addresses, and carrier.
			l.pod.IP(t, "link", "set", "v0", "addrgenmode", "none")
			l.pod.IP(t, "link", "set", "v1", "addrgenmode", "none")
			l.pod.IP(t, "addr", "add", "192.0.2.5/24", "dev", "v0")
			l.pod.IP(t, "link", "set", "v0", "up")
			l.pod.IP(t, "link", "set", "v1", "up")
			l.pod.IP(t, "route", "add", "default", "via", "192.0.2.1")
			for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
				state := l.pod.State(t)
				if !strings.Contains(state, "NO-CARRIER") && !strings.Contains(state, "linkdown") &&
					!strings.Contains(state, "state DOWN") {
					break
				}
				if time.Now().After(end) {
					t.Fatal("the devices do not come up:", state)
				}
			}
			return func() { l.pod.IP(t, "link", "del", "v0") }
		}, []string{"v0"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			undo := tt.obstruct()
			before := l.pod.State(t) + l.node.State(t)
			p, err := l.attach(t)
			if err == nil {
				l.detach(t, p)
				t.Fatal("attached all the same")
			}
			for _, s := range tt.say {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("the error does not say %q: %v", s, err)
				}
			}
			if after := l.pod.State(t) + l.node.State(t); after != before {
				t.Errorf("left behind: before\n%s\nafter\n%s", before, after)
			}
			undo()
			p, err = l.attach(t)
			if err != nil {
				t.Fatal("afterwards:", err)
			}
			l.detach(t, p)
		})
	}
}

// A daemon that was killed leaves routes by which packets for the pod arrive while the next one attaches it. They find
// nothing that is half made, and the client gets in once the pod stands.
func TestPacketsDuringAttach(t *testing.T) {
	l := newPodLab(t)
	l.node.IP(t, "addr", "add", "10.91.0.1/32", "dev", "lo")
	p, err := l.attach(t)
	if err != nil {
		t.Fatal(err)
	}
	p.stop(ended()) // device and routes stay
	dialled := make(chan error, 1)
	l.proxy = func(n proxy.Network) {
		stats := n.(attach.Attachment).Stats
		go func() {
			dialled <- l.node.Do(func() error {
				c, err := (&net.Dialer{Timeout: 15 * time.Second}).Dial("tcp", "10.91.1.2:8080")
				if err == nil {
					c.Close()
				}
				return err
			})
		}()
		for end := time.Now().Add(30 * time.Second); stats().Flows == 0; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Error("no packet has come")
				return
			}
		}
		time.Sleep(20 * time.Millisecond) // for whoever would not wait
	}
	if p, err = l.attach(t); err != nil {
		t.Fatal(err)
	}
	defer l.detach(t, p)
	// Nobody listens there.
	if err := <-dialled; !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial: %v", err)
	}
}

// A DNS query that nobody answers keeps neither the pod's connections from draining nor the pod from being removed.
func TestStopDuringQuery(t *testing.T) {
	var took time.Duration
	for range 5 { // the query gives up by itself after 5 s, and a busy machine may be as slow once
		if took = stopDuringQuery(t); took < 3*time.Second {
			return
		}
	}
	t.Errorf("took %v", took)
}

// stopDuringQuery is how long the end of a pod took.
func stopDuringQuery(t *testing.T) time.Duration {
	t.Helper()
	l := newPodLab(t)
	l.node.IP(t, "addr", "add", "10.91.0.1/32", "dev", "lo")
	l.node.IP(t, "route", "add", "blackhole", "192.0.2.53")
	p, err := l.attach(t)
	if err != nil {
		t.Fatal(err)
	}
	var ln net.Listener
	var query net.Conn
	if err := l.pod.Do(func() (err error) {
		if ln, err = net.Listen("tcp", "10.91.1.2:8080"); err != nil {
			return err
		}
		query, err = net.Dial("udp", "192.0.2.53:53")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	defer query.Close()
	dial := func() error {
		return l.node.Do(func() error {
			c, err := (&net.Dialer{Timeout: 5 * time.Second}).Dial("tcp", "10.91.1.2:8080")
			if err == nil {
				c.Close()
			}
			return err
		})
	}
	if err := dial(); err != nil {
		t.Fatal(err)
	}
	query.Write([]byte("\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x07example\x00\x00\x01\x00\x01"))
	eventually(t, "the query", func() bool { return p.att.Stats().DNSInFlight == 1 })

	ctx, cancel := context.WithCancel(t.Context())
	stopped := make(chan struct{})
	go func() { defer close(stopped); p.stop(ctx) }()
	eventually(t, "a refusal", func() bool { return errors.Is(dial(), syscall.ECONNREFUSED) })
	select {
	case <-stopped:
		t.Error("the query was not waited for")
	default:
	}
	cancel()
	start := time.Now()
	l.detach(t, p)
	return time.Since(start)
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not in time: ", what)
		}
	}
}
