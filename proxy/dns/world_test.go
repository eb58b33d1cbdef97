package dns

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/dns"
	"go.uber.org/goleak"

	"ztun/proxy/state"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// vips parses "network/ip" words.
func vips(words string) (out []state.NetworkAddress) {
	for _, w := range strings.Fields(words) {
		network, ip, _ := strings.Cut(w, "/")
		out = append(out, state.NetworkAddress{Network: network, Addr: netip.MustParseAddr(ip)})
	}
	return out
}

func addrs(words string) (out []netip.Addr) {
	for _, w := range strings.Fields(words) {
		out = append(out, netip.MustParseAddr(w))
	}
	return out
}

func service(host, ns, addresses string) *state.Service {
	name, _, _ := strings.Cut(host, ".")
	return &state.Service{Name: name, Namespace: ns, Hostname: host, VIPs: vips(addresses)}
}

func pod(name, ns, network, addresses string, hosts ...string) *state.Workload {
	w := &state.Workload{UID: "c//Pod/" + ns + "/" + name, Name: name, Namespace: ns, ServiceAccount: "default",
		Network:   network,
		Addresses: addrs(addresses), Capacity: 1, CanonicalName: name, CanonicalRevision: "v1"}
	for _, h := range hosts {
		w.Services = append(w.Services, state.WorkloadService{Service: state.ServiceKey{Namespace: ns, Hostname: h}})
	}
	return w
}

func build(things ...any) *state.View {
	b := state.NewBuilder("")
	for _, x := range things {
		switch x := x.(type) {
		case *state.Workload:
			b.InsertWorkload(x)
		case *state.Service:
			b.InsertService(x)
		}
	}
	return b.Build()
}

var blueClient = pod("client", "blue", "n1", "10.1.0.9 2001:db8::9")

// vectors is the world of spec 5.7.
func vectors() []any {
	secret := service("secret.green.svc.cluster.local", "green", "n1/10.96.0.66")
	secret.Visibility = state.NamespaceOnly
	return []any{
		blueClient,
		service("cart.blue.svc.cluster.local", "blue", "n1/10.96.0.10"),
		service("pay.green.svc.cluster.local", "green", "n1/10.96.0.20"),
		service("api.acme.test", "blue", "n1/203.0.113.5"),
		service("*.acme.test", "blue", "n1/203.0.113.6"),
		service("hl.blue.svc.cluster.local", "blue", ""),
		service("far.blue.svc.cluster.local", "blue", "n2/10.97.0.1"),
		service("nat.acme.org", "blue", ""),
		secret,
		pod("p0", "blue", "n1", "10.1.0.4 2001:db8::4", "hl.blue.svc.cluster.local"),
		pod("p1", "blue", "n1", "10.1.0.5", "hl.blue.svc.cluster.local"),
	}
}

// ask makes the query of "[type] name".
func ask(question string) *dns.Msg {
	typ, name, _ := strings.Cut(question, " ")
	m := new(dns.Msg)
	m.SetQuestion(dns.Fqdn(name), dns.StringToType[typ])
	return m
}

// render is a reply on one line: flags, rcode, the records of answer and
// authority (an SOA without its fields), OPT.
func render(m *dns.Msg) string {
	var f []string
	for _, x := range []struct {
		on   bool
		name string
	}{{m.Response, "qr"}, {m.Authoritative, "aa"}, {m.Truncated, "tc"}, {m.RecursionDesired, "rd"},
		{m.RecursionAvailable, "ra"}, {m.AuthenticatedData, "ad"}, {m.CheckingDisabled, "cd"}} {
		if x.on {
			f = append(f, x.name)
		}
	}
	out := []string{rcodeName(m.Rcode) + " " + strings.Join(f, " ")}
	for _, rr := range slices.Concat(m.Answer, m.Ns) {
		if soa, ok := rr.(*dns.SOA); ok {
			out = append(out, fmt.Sprintf("%s %d SOA minimum %d", soa.Hdr.Name, soa.Hdr.Ttl, soa.Minttl))
			continue
		}
		out = append(out, strings.ReplaceAll(strings.ReplaceAll(rr.String(), "\tIN\t", " "), "\t", " "))
	}
	return strings.Join(out, "; ")
}

// knowledge publishes Views.
type knowledge struct {
	mu      sync.Mutex
	view    *state.View
	changed chan struct{}
}

func know(v *state.View) *knowledge { return &knowledge{view: v, changed: make(chan struct{})} }

func (k *knowledge) View() *state.View {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.view
}

func (k *knowledge) Changed() <-chan struct{} {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.changed
}

func (k *knowledge) publish(v *state.View) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.view = v
	close(k.changed)
	k.changed = make(chan struct{})
}

// upstream is a network of nameservers: answer says what comes back to a message.
type upstream struct {
	answer func(protocol string, dst netip.AddrPort, raw []byte) [][]byte
	dead   func(protocol string, dst netip.AddrPort) error // nil: none is

	mu    sync.Mutex
	dials []string
	live  int
}

func (u *upstream) DialUDP(_ context.Context, dst netip.AddrPort) (net.Conn, error) {
	return u.dial("udp", dst, func(c net.Conn) ([]byte, error) {
		b := make([]byte, maxPacket)
		n, err := c.Read(b)
		return b[:n], err
	}, func(c net.Conn, b []byte) error { _, err := c.Write(b); return err })
}

func (u *upstream) DialTCP(_ context.Context, dst netip.AddrPort) (net.Conn, error) {
	return u.dial("tcp", dst, func(c net.Conn) ([]byte, error) { return readMessage(c) }, writeMessage)
}

func (u *upstream) dial(protocol string, dst netip.AddrPort, read func(net.Conn) ([]byte, error),
	write func(net.Conn, []byte) error) (net.Conn, error) {
	u.mu.Lock()
	u.dials = append(u.dials, protocol+" "+dst.String())
	u.mu.Unlock()
	if u.dead != nil {
		if err := u.dead(protocol, dst); err != nil {
			return nil, err
		}
	}
	near, far := net.Pipe()
	u.count(1)
	go func() {
		defer u.count(-1)
		defer far.Close()
		for {
			raw, err := read(far)
			if err != nil {
				return
			}
			if u.answer == nil {
				continue
			}
			for _, m := range u.answer(protocol, dst, raw) {
				if m == nil { // the server hangs up
					return
				}
				if write(far, m) != nil {
					return
				}
			}
		}
	}()
	return near, nil
}

func (u *upstream) count(n int) {
	u.mu.Lock()
	u.live += n
	u.mu.Unlock()
}

func (u *upstream) dialled() []string {
	u.mu.Lock()
	defer u.mu.Unlock()
	return slices.Clone(u.dials)
}

// echo answers each query with one A record of the server's address, as a
// recursive server does.
func echo(_ string, dst netip.AddrPort, raw []byte) [][]byte {
	q := new(dns.Msg)
	if q.Unpack(raw) != nil {
		return nil
	}
	m := new(dns.Msg).SetReply(q)
	m.RecursionAvailable, m.AuthenticatedData = true, true
	if len(q.Question) == 1 {
		m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET,
			Ttl: 7}, A: net.IPv4(192, 0, 2, 1)}}
	}
	return [][]byte{mustPack(m)}
}

func mustPack(m *dns.Msg) []byte {
	b, err := m.Pack()
	if err != nil {
		panic(err)
	}
	return b
}

func mustUnpack(t testing.TB, raw []byte) *dns.Msg {
	t.Helper()
	m := new(dns.Msg)
	if err := m.Unpack(raw); err != nil {
		t.Fatalf("%x: %v", raw, err)
	}
	return m
}

// start makes a Server that is shut down with the test.
func start(t testing.TB, cfg Config) *Server {
	t.Helper()
	if cfg.Knowledge == nil {
		cfg.Knowledge = know(build(vectors()...))
	}
	if cfg.Client == (state.WorkloadInfo{}) {
		cfg.Client = blueClient.Info()
	}
	if cfg.Upstream == nil {
		cfg.Upstream = &upstream{answer: echo}
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Run(context.Background()) }()
	t.Cleanup(func() {
		if err := s.Shutdown(context.Background()); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return s
}

// samples is the part of samples/workloads.yaml that DNS is about.
func samples() []any {
	a := pod("a", "default", "", "10.91.1.2")
	b := service("b.default.svc.cluster.local", "default", "/10.96.0.10")
	plain := service("plain.default.svc.cluster.local", "default", "/10.96.0.11")
	empty := service("empty.default.svc.cluster.local", "default", "/10.96.0.12")
	for _, s := range []*state.Service{b, plain, empty} {
		s.Canonical = true
	}
	return []any{a, b, plain, empty, pod("b", "default", "", "10.91.2.2", b.Hostname), pod("c", "other", "", "10.91.2.99")}
}
