package e2e

import (
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztun/test/lab"
)

// pastPorts are the application's: one of many, one within the mesh's own range, DNS.
var pastPorts = []uint16{9100, 61234, 53}

// strictBut are policies under which nobody without identity may call, nor the pod b with its.
func strictBut(b *lab.Pod) []lab.Policy {
	deny := func(name string, match map[string]any) lab.Policy {
		return lab.Policy{Name: name, Namespace: "default", Scope: "Namespace", Action: "Deny",
			Rules: [][][]map[string]any{{{match}}}}
	}
	return []lab.Policy{
		deny("istio_converted_static_strict", map[string]any{"notPrincipals": []any{map[string]any{"Presence": []any{}}}}),
		deny("not-b", map[string]any{"principals": []any{map[string]any{"Exact": "cluster.local/ns/" + b.Namespace + "/sa/" +
			b.ServiceAccount}}}),
	}
}

// arrivals is a witness in a namespace: TCP segments for pastPorts that its kernel has delivered, behind all
// rules, reassembled and without extension headers, as its TCP gets them.
type arrivals struct {
	files []*os.File
	done  sync.WaitGroup

	mu   sync.Mutex
	seen []arrival
}

// arrival is a segment; src is only told of IPv4.
type arrival struct {
	seq   uint32
	port  uint16
	flags byte
	src   netip.Addr
}

// opens says that a server may take it for the begin of a connection.
func (a arrival) opens() bool {
	const fin = 1
	return a.flags&(tcpSYN|tcpACK|tcpRST|fin) == tcpSYN
}

func watchArrivals(t testing.TB, ns *lab.NS) *arrivals {
	t.Helper()
	w := &arrivals{}
	must(t, ns.Do(func() error {
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP)
			if err != nil {
				return err
			}
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20)
			if family == unix.AF_INET6 {
				// Only what has a good checksum is told; of IPv4 see read.
				if err := unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_CHECKSUM, 16); err != nil {
					return err
				}
			}
			f := os.NewFile(uintptr(fd), "raw")
			w.files = append(w.files, f)
			w.done.Go(func() { w.read(f, family == unix.AF_INET) })
		}
		return nil
	}))
	t.Cleanup(w.close)
	return w
}

func (w *arrivals) close() {
	for _, f := range w.files {
		f.Close()
	}
	w.done.Wait()
}

func (w *arrivals) read(f *os.File, v4 bool) {
	b := make([]byte, 1<<16)
	for {
		n, err := f.Read(b)
		if err != nil {
			return
		}
		p, a := b[:n], arrival{}
		if v4 {
			a.src = netip.AddrFrom4([4]byte(p[12:]))
			dst := netip.AddrFrom4([4]byte(p[16:]))
			p = p[int(p[0]&0xf)*4:]
			if checksum(append(pseudo(a.src, dst, unix.IPPROTO_TCP, len(p)), p...)) != 0 {
				continue // TCP drops it
			}
		}
		if len(p) < 14 || !slices.Contains(pastPorts, binary.BigEndian.Uint16(p[2:])) {
			continue
		}
		a.port, a.seq, a.flags = binary.BigEndian.Uint16(p[2:]), binary.BigEndian.Uint32(p[4:]), p[13]
		w.mu.Lock()
		w.seen = append(w.seen, a)
		w.mu.Unlock()
	}
}

// take returns what has come since the last time.
func (w *arrivals) take() []arrival {
	w.mu.Lock()
	defer w.mu.Unlock()
	seen := w.seen
	w.seen = nil
	return seen
}

// link is where packets are put on a wire: a device, and the next hop's address.
type link struct {
	ns  *lab.NS
	dev string
	mac net.HardwareAddr
}

// ipJSON is what `ip -j` says in a namespace.
func (m *mesh) ipJSON(ns *lab.NS, v any, args ...string) {
	m.t.Helper()
	out, err := m.Run(m.ctx, ns, append([]string{"ip", "-j"}, args...)...)
	must(m.t, err)
	must(m.t, json.Unmarshal([]byte(out), v))
}

// linkTo is the way that a namespace's TCP takes to an address.
func (m *mesh) linkTo(ns *lab.NS, to netip.Addr) link {
	m.t.Helper()
	var routes []struct{ Dev, Gateway string }
	m.ipJSON(ns, &routes, "route", "get", to.String(), "ipproto", "tcp")
	return m.linkBy(ns, routes[0].Dev, cmp.Or(routes[0].Gateway, to.String()), to)
}

// linkBy is the way by a device and a next hop, which a ping of to makes known.
func (m *mesh) linkBy(ns *lab.NS, dev, hop string, to netip.Addr) link {
	m.t.Helper()
	l := link{ns: ns, dev: dev}
	eventually(m.t, 20*time.Second, func() error {
		// Nobody listens there: the kernel asks for the neighbour, and that is all.
		_, _ = m.Run(m.ctx, ns, "ping", "-c1", "-W1", to.String())
		var neighs []struct{ Dst, Lladdr string }
		m.ipJSON(ns, &neighs, "neigh", "show", "dev", l.dev)
		for _, n := range neighs {
			if n.Dst == hop && n.Lladdr != "" {
				mac, err := net.ParseMAC(n.Lladdr)
				l.mac = mac
				return err
			}
		}
		return fmt.Errorf("no neighbour %s on %s: %v", hop, l.dev, neighs)
	})
	return l
}

// put sends all packets of a battery, past whatever rules the sender's kernel has.
func (m *mesh) put(l link, all []crafted) {
	m.t.Helper()
	must(m.t, l.ns.Do(func() error {
		dev, err := net.InterfaceByName(l.dev)
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for i, c := range all {
			for _, p := range c.parts {
				to := &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_IP), Ifindex: dev.Index, Halen: 6}
				if p[0]>>4 == 6 {
					to.Protocol = htons(unix.ETH_P_IPV6)
				}
				copy(to.Addr[:], l.mac)
				if err := unix.Sendto(fd, p, 0, to); err != nil {
					return fmt.Errorf("%s: %d bytes: %w", c.kind, len(p), err)
				}
			}
			if i%64 == 63 { // no queue on the way is to overflow
				time.Sleep(2 * time.Millisecond)
			}
		}
		return nil
	}))
}

func htons(n uint16) uint16 { return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, n)) }

// arrivedOf tells how many of a battery have arrived, by kind.
func arrivedOf(all []crafted, seen []arrival) map[string]int {
	kinds, count := map[uint32]string{}, map[string]int{}
	for _, c := range all {
		kinds[c.seq] = c.kind
	}
	for _, a := range seen {
		kind := kinds[a.seq]
		if kind == "" {
			kind = "not of the battery"
		}
		count[kind]++
	}
	return count
}

// past is the attack on both ways of attaching pods that have an eth0.
type past struct {
	*mesh
	t       *testing.T
	witness map[*lab.Pod]*arrivals
	sent    int
	// allowed says that an arrival is one that the way cannot prevent.
	allowed func(arrival) bool
	let     int // how many of these there were
}

// spoofed are the addresses in whose names the pod is called: the node's, gateways', the kubelet's as istio-cni has it,
// its own, a peer's, the loopback's.
func (p *past) spoofed(to *lab.Pod, v4 bool) []netip.Addr {
	n := to.Node
	if v4 {
		return []netip.Addr{n.Addr4, n.PodNet4.Addr().Next(), netip.MustParseAddr("169.254.1.1"), probe4, to.V4(), p.a.V4(),
			p.c.V4(), p.b.V4(), netip.MustParseAddr("127.0.0.1")}
	}
	return []netip.Addr{n.Addr6, n.PodNet6.Addr().Next(), netip.MustParseAddr("fe80::ecee"), probe6, to.V6(), p.a.V6(),
		p.c.V6(), p.b.V6(), netip.MustParseAddr("fe80::1"), netip.IPv6Loopback()}
}

var (
	probe4 = netip.MustParseAddr("169.254.7.127")
	probe6 = netip.MustParseAddr("fd16:9254:7127:1337:ffff:ffff:ffff:ffff")
)

// control proves that the battery is well made: in a host that nobody captures all kinds arrive that a kernel takes.
func (p *past) control() {
	p.t.Helper()
	w := watchArrivals(p.t, p.h1.NS)
	for _, v4 := range []bool{true, false} {
		to := pick(p.h1.IPs, v4)
		l := p.linkTo(p.N1.NS, to)
		all := battery(to, pick(p.h2.IPs, v4), p.spoofed(p.a, v4), pastPorts)
		want := []string{"source port", "flags", "fragments", map[bool]string{true: "IP options",
			false: "extension headers"}[v4]}
		p.put(l, all)
		var got map[string]int
		var seen []arrival
		eventually(p.t, 20*time.Second, func() error {
			seen = append(seen, w.take()...)
			got = arrivedOf(all, seen)
			for _, kind := range want {
				if got[kind] == 0 {
					return fmt.Errorf("none of %q has arrived where nobody is captured: %v", kind, got)
				}
			}
			return nil
		})
		p.t.Logf("where nobody is captured, of %d to %s: %v", len(all), to, got)
	}
}

// from sends the battery to a pod by a link.
func (p *past) from(who string, l func(to netip.Addr) link, source []netip.Addr, to *lab.Pod) {
	p.t.Helper()
	for _, v4 := range []bool{true, false} {
		all := battery(pick(to.IPs, v4), pick(source, v4), p.spoofed(to, v4), pastPorts)
		p.put(l(pick(to.IPs, v4)), all)
		p.sent += len(all)
		p.fence()
		p.judge(fmt.Sprintf("%s, to %s", who, pick(to.IPs, v4)), all)
	}
}

// fence has something legal go the same way: what was sent before has been looked at then.
func (p *past) fence() {
	p.t.Helper()
	p.meet("beside the attack", 60*time.Second, func(from *lab.NS, to netip.Addr) error {
		return takeByte(p.ctx, from, netip.AddrPortFrom(to, 9001))
	})
}

func (p *past) judge(who string, all []crafted) {
	p.t.Helper()
	for _, w := range p.witness {
		seen := slices.DeleteFunc(w.take(), func(a arrival) bool {
			if p.allowed(a) {
				p.let++
				return true
			}
			return false
		})
		if len(seen) > 0 {
			p.t.Errorf("%s: %d have arrived: %v, such as %+v", who, len(seen), arrivedOf(all, seen), seen[0])
		}
	}
}

// sockets has clients with sockets of their own try: from ports of the rules, bound to the device, to the ports of the
// application. None may get a byte across.
func (p *past) sockets(who string, ns *lab.NS, dev string, to *lab.Pod) {
	p.t.Helper()
	var wg sync.WaitGroup
	for _, a := range to.IPs {
		for _, dport := range pastPorts {
			for _, sport := range []uint16{15008, 15006, 15001, 15053, 53, 443, 61001, 65533, 0} {
				p.sent++
				wg.Go(func() {
					ctx, cancel := context.WithTimeout(p.ctx, 3*time.Second)
					defer cancel()
					at := netip.AddrPortFrom(a, dport)
					if err := echoBound(ctx, ns, dev, sport, at); err == nil {
						p.t.Errorf("%s: from port %d to %s: a byte came back", who, sport, at)
					}
				})
			}
		}
	}
	wg.Wait()
	p.fence()
	p.judge(who+", sockets", nil)
}

// echoBound sends a byte by a socket that is bound to a device and a port, and waits until it comes back.
func echoBound(ctx context.Context, ns *lab.NS, dev string, port uint16, to netip.AddrPort) error {
	var c net.Conn
	err := ns.Do(func() (err error) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{Port: int(port)}, Control: func(_, _ string, rc syscall.RawConn) error {
			var inner error
			err := rc.Control(func(fd uintptr) {
				_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
				inner = unix.BindToDevice(int(fd), dev)
			})
			if err == nil {
				err = inner
			}
			return err
		}}
		c, err = d.DialContext(ctx, "tcp", to.String())
		return err
	})
	if err != nil {
		return err
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	c.SetDeadline(deadline)
	if _, err := c.Write([]byte("x")); err != nil {
		return err
	}
	_, err = c.Read(make([]byte, 1))
	return err
}

// attack has everybody try: who sits on the pod's own wire, a client of the pod network, a neighbour with root in a pod
// (on the same node and on another), another node, and clients with sockets.
func (p *past) attack() {
	p.t.Helper()
	for _, to := range []*lab.Pod{p.a, p.c} {
		p.witness[to] = watchArrivals(p.t, to.NS)
		for _, port := range pastPorts {
			p.echoServer(to.NS, fmt.Sprintf("[::]:%d", port))
		}
	}
	straight := func(ns *lab.NS) func(to netip.Addr) link {
		return func(to netip.Addr) link { return p.linkTo(ns, to) }
	}
	gateway := func(ns *lab.NS) func(to netip.Addr) link { // that of what is far away
		return func(to netip.Addr) link { return p.linkTo(ns, pick(p.h2.IPs, to.Is4())) }
	}
	p.from("on the pod's wire", straight(p.N1.NS), p.h1.IPs, p.a)
	p.from("a client of the pod network", gateway(p.h1.NS), p.h1.IPs, p.a)
	p.from("a neighbour", gateway(p.b.NS), p.b.IPs, p.a)
	p.from("a pod of another node", gateway(p.b.NS), p.b.IPs, p.c)
	p.from("on the pod's wire", straight(p.N2.NS), p.h2.IPs, p.c)
	p.from("another node", straight(p.N2.NS), []netip.Addr{p.N2.Addr4, p.N2.Addr6}, p.a)
	p.sockets("a client of the pod network", p.h1.NS, "eth0", p.a)
	p.sockets("another node", p.N2.NS, "eth0", p.a)
	p.sockets("a neighbour", p.b.NS, "eth0", p.a)
}

// masqueraded has a client call the pod by a port of its node that is sent on in the node's name, as kube-proxy and
// hostPorts do it: the node has no socket of it.
func (p *past) masqueraded() {
	p.t.Helper()
	for _, rule := range []string{fmt.Sprintf("PREROUTING -p tcp --dport 30080 -j DNAT --to-destination %s:%d", p.a.V4(),
		pastPorts[0]), fmt.Sprintf("POSTROUTING -p tcp --dport %d -j MASQUERADE", pastPorts[0])} {
		_, err := p.Run(p.ctx, p.N1.NS, append([]string{"iptables", "-w", "10", "-t", "nat", "-A"},
			strings.Fields(rule)...)...)
		must(p.t, err)
	}
	for _, from := range []*lab.NS{p.h1.NS, p.h2.NS, p.N2.NS} {
		ctx, cancel := context.WithTimeout(p.ctx, 3*time.Second)
		if err := takeByte(ctx, from, netip.AddrPortFrom(p.N1.Addr4, 30080)); err == nil {
			p.t.Errorf("%s: a port of the node's led to a strict pod", from.Name)
		}
		cancel()
		p.sent++
	}
	p.fence()
	p.judge("by a port of the node", nil)
}

// inNameOf sends SYNs that look like those of a connection which a socket of the node has, or had until a moment ago:
// they are nobody's probe. The witness is told by another sequence number.
func (p *past) inNameOf(what string, c net.Conn) {
	p.t.Helper()
	from, to := c.LocalAddr().(*net.TCPAddr).AddrPort(), c.RemoteAddr().(*net.TCPAddr).AddrPort()
	allowed := p.allowed
	p.allowed = func(a arrival) bool { return !a.opens() } // the connection itself may still have something to say
	var all []crafted
	for i := range uint32(20) {
		seq := pastMark<<16 | 0xf000 | i
		all = append(all, crafted{what, seq, [][]byte{tcpPacket(from, to, seq, 0, tcpSYN)}})
	}
	p.put(p.linkTo(p.N1.NS, to.Addr()), all)
	p.sent += len(all)
	p.fence()
	p.judge(what, all)
	p.allowed = allowed
}

// arrived forgets what a witness has seen of a connection that is legal, and fails if that is nothing.
func (p *past) arrived(c net.Conn) {
	p.t.Helper()
	n := 0
	for _, w := range p.witness {
		n += len(w.take())
	}
	if n == 0 {
		p.t.Errorf("the witness has not seen %s", c.LocalAddr())
	}
}

// TestPastSteered: nobody reaches a strict pod's application past ztun, nor gets out of a pod past it, whatever he
// sends; and the exemption of the node's own sockets serves nobody else.
func TestPastSteered(t *testing.T) { pastSteered(t, "steered") }

// TestPastRules: the same where eth0 stays in the pod, but for what docs/steered.md says no rule can hold.
func TestPastRules(t *testing.T) { pastSteered(t, "rules") }

func pastSteered(t *testing.T, way string) {
	needTool(t, "iptables")
	m := newMesh(t, meshOptions{noStart: true})
	p := &past{mesh: m, t: t, witness: map[*lab.Pod]*arrivals{}, allowed: func(arrival) bool { return false }}
	m.cni(m.a, true)
	m.cni(m.b, false)
	m.cni(m.c, false)
	f := m.DefaultWorld()
	f.Policies = strictBut(m.b)
	must(t, m.WriteWorld(f))
	p.control()
	m.start(m.N1, map[string]string{"ZTUN_STEERING": way})
	m.start(m.N2, map[string]string{"ZTUN_STEERING": way, "ZTUN_STEERED_NATIVE": "false"})
	for _, pod := range []*lab.Pod{m.a, m.b, m.c} {
		m.serve(pod.NS)
		m.between(pod)
		must(t, m.Attach(m.ctx, pod))
	}
	p.fence()
	wire, err := m.Capture(m.N1.NS, "eth0", lab.CaptureOptions{Immediate: true})
	must(t, err)
	eth0, err := m.Capture(m.a.NS, "eth0", lab.CaptureOptions{Immediate: true})
	must(t, err)
	p.attack()
	if way == "rules" {
		p.back()
	}
	p.linkLocal()
	for _, got := range stop(t, wire) {
		if got.Seq>>16 == pastMark && slices.Contains(m.c.IPs, got.Dst.Addr()) { // to c sends b alone
			t.Errorf("a pod's packet is on the wire as it was: %v to %v", got.Src, got.Dst)
		}
	}
	read := stop(t, eth0).Where(func(got lab.Packet) bool {
		return got.Seq>>16 == pastMark && slices.Contains(m.a.IPs, got.Dst.Addr())
	})
	if way == "steered" && len(read) > 0 {
		t.Errorf("a process in the pod that reads its eth0 sees %d packets, such as %v", len(read), read[0])
	}
	p.inside()
	if way == "rules" {
		p.weaker(len(read))
	}
	p.masqueraded()
	for _, to := range m.a.IPs {
		c, err := m.N1.NS.Dial(m.ctx, "tcp", netip.AddrPortFrom(to, pastPorts[0]).String())
		must(t, err)
		must(t, bounce(c)) // a probe
		p.fence()
		p.arrived(c)
		p.inNameOf("a connection that the node has", c)
		c.Close() // and the node's kernel remembers it for a minute
		eventually(t, 20*time.Second, func() error { return inState(m.N1.NS, c, tcpTimeWait) })
		p.inNameOf("a connection that the node had", c)
	}
	t.Logf("%d attempts", p.sent)
	for _, pod := range []*lab.Pod{m.a, m.b, m.c} {
		must(t, m.Detach(m.ctx, pod))
	}
}

const tcpTimeWait = 6 // include/net/tcp_states.h

// inState says why a connection of a namespace is not in a state.
func inState(ns *lab.NS, c net.Conn, state int) error {
	for _, name := range []string{"tcp", "tcp6"} {
		b, err := ns.ReadFile("/proc/net/" + name)
		if err != nil {
			return err
		}
		local, remote := c.LocalAddr().(*net.TCPAddr).Port, c.RemoteAddr().(*net.TCPAddr).Port
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if strings.HasSuffix(f[1], fmt.Sprintf(":%04X", local)) && strings.HasSuffix(f[2], fmt.Sprintf(":%04X", remote)) {
				if f[3] == fmt.Sprintf("%02X", state) {
					return nil
				}
				return fmt.Errorf("%s is in state %s", c.LocalAddr(), f[3])
			}
		}
	}
	return fmt.Errorf("%s is gone", c.LocalAddr())
}

// TestPastRedirected: the same under istio-cni's rules, which are not ours: what they let through in the name of the
// kubelet's address arrives, and is the one thing that does. (A segment that opens nothing may arrive: the kernel's
// table of connections does not know what to do with it, nor does TCP.)
func TestPastRedirected(t *testing.T) {
	r := newRedirected(t)
	m := r.mesh
	p := &past{mesh: m, t: t, witness: map[*lab.Pod]*arrivals{}}
	f := m.DefaultWorld()
	f.Policies = strictBut(m.b)
	must(t, m.WriteWorld(f))
	p.control()
	for _, n := range r.Nodes() {
		r.begin(n)
	}
	r.snapshot(r.N1, r.a, r.b)
	r.snapshot(r.N2, r.c)
	for _, n := range r.Nodes() {
		must(t, n.Daemon.WaitReady(r.ctx, 60*time.Second))
	}
	for _, pod := range []*lab.Pod{r.a, r.b, r.c} {
		r.serve(pod.NS)
	}
	p.fence()
	probes := map[uint32]bool{}
	p.allowed = func(a arrival) bool {
		return !a.opens() || a.src == probe4 || !a.src.IsValid() && probes[a.seq]
	}
	for _, v4 := range []bool{true, false} {
		for _, c := range battery(pick(m.a.IPs, v4), pick(m.h1.IPs, v4), p.spoofed(m.a, v4), pastPorts) {
			if src := c.parts[0]; !v4 && c.kind == "source port" && netip.AddrFrom16([16]byte(src[8:])) == probe6 {
				probes[c.seq] = true
			}
		}
	}
	p.attack()
	p.masqueraded()
	t.Logf("%d attempts; %d segments arrived by the rules' leave", p.sent, p.let)
}
