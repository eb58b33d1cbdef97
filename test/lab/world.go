package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// Options of a world.
type Options struct {
	Prefix string // of all names; default "zt"
	Bin    string // the ztun binary; needed by the first StartDaemon or Ztun
	MTU    int    // of the veths and, by ZTUN_MTU, of the daemons; default 1500
	Logf   func(format string, args ...any)
}

// World is two nodes and what was attached to them. Its methods may be called from several goroutines, except for
// Close beside others.
type World struct {
	ID  string
	Dir string // logs, captures, world.yaml, ca, state directories; removed by Close
	N1  *Node
	N2  *Node

	opt    Options
	lock   *os.File
	reaper io.WriteCloser
	reapCm *exec.Cmd
	spawn  *spawner

	mu     sync.Mutex
	closed bool
	procs  map[*Process]struct{}
	nss    []*NS
	pods   []*Pod
	hosts  []*Host
}

// Node is a node namespace: device eth0 to the other node, its own addresses, a route to the other's pod subnets.
type Node struct {
	Name    string // n1, n2: NODE_NAME
	Index   int    // 1, 2
	NS      *NS
	Addr4   netip.Addr   // 10.91.0.Index
	Addr6   netip.Addr   // fd91::Index
	PodNet4 netip.Prefix // 10.91.Index.0/24; its .1 is the node's, on lo
	PodNet6 netip.Prefix // fd91:0:0:Index::/64; its ::1 is the node's, on lo
	Daemon  *Daemon      // the last one started

	nextPod, nextHost int
}

// Pod is an isolated pod: a namespace with only lo, until a daemon attaches it.
type Pod struct {
	Name, Namespace, ServiceAccount string
	Node                            *Node
	NS                              *NS
	IPs                             []netip.Addr
	// what the world file says: HBONE, or TCP for a pod that must be reached in plaintext
	Protocol string
	Services map[string]map[uint16]uint16
	MTU      int
}

// Host is an uncaptured machine: a namespace with a veth into its node and a default route over it.
type Host struct {
	Name string
	Node *Node
	NS   *NS
	IPs  []netip.Addr
}

// V4 is the pod's first IPv4 address (zero if none); V6 likewise.
func (p *Pod) V4() netip.Addr  { return pick(p.IPs, true) }
func (p *Pod) V6() netip.Addr  { return pick(p.IPs, false) }
func (h *Host) V4() netip.Addr { return pick(h.IPs, true) }
func (h *Host) V6() netip.Addr { return pick(h.IPs, false) }

func pick(ips []netip.Addr, v4 bool) netip.Addr {
	for _, ip := range ips {
		if ip.Is4() == v4 {
			return ip
		}
	}
	return netip.Addr{}
}

// CanRun tells whether this process may make network namespaces; the error says what is missing.
func CanRun() error {
	if os.Geteuid() != 0 {
		return errors.New("the end-to-end tests make network namespaces and TUN devices and need root (CAP_NET_ADMIN and " +
			"CAP_SYS_ADMIN); set ZTUN_TEST_NOROOT=1 to leave them out on purpose")
	}
	for _, tool := range []string{"ip", "tcpdump"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%s is missing: %w (apt-get install iproute2 tcpdump)", tool, err)
		}
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		return fmt.Errorf("no TUN driver: %w", err)
	}
	return nil
}

// Require fails the test where a world cannot be made, or skips it with ZTUN_TEST_NOROOT=1: never silently.
func Require(t testing.TB) {
	t.Helper()
	if err := CanRun(); err != nil {
		if os.Getenv("ZTUN_TEST_NOROOT") == "1" {
			t.Skipf("ZTUN_TEST_NOROOT=1: %v", err)
		}
		t.Fatal(err)
	}
}

// ForTest makes a world that ends with the test; when the test has failed the daemons' logs are shown.
func ForTest(t testing.TB, o Options) *World {
	t.Helper()
	Require(t)
	if o.Logf == nil {
		o.Logf = t.Logf
	}
	w, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, n := range []*Node{w.N1, w.N2} {
				if n.Daemon != nil {
					t.Logf("log of %s:\n%s", n.Name, tail(n.Daemon.Log(), 12000))
				}
			}
		}
		if err := w.Close(); err != nil {
			t.Errorf("closing the world: %v", err)
		}
	})
	return w
}

// New makes a world with two empty nodes.
func New(o Options) (_ *World, err error) {
	if err := CanRun(); err != nil {
		return nil, err
	}
	if o.Prefix == "" {
		o.Prefix = "zt"
	}
	if o.MTU == 0 {
		o.MTU = 1500
	}
	if o.Logf == nil {
		o.Logf = func(string, ...any) {}
	}
	if err := Scavenge(o.Logf); err != nil {
		o.Logf("lab: scavenging: %v", err)
	}
	w := &World{opt: o, procs: map[*Process]struct{}{}}
	if w.ID, w.Dir, w.lock, err = claim(o.Prefix); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(w.Dir, "netns"), nil, 0o644); err != nil {
		return nil, err
	}
	if w.reaper, w.reapCm, err = startReaper(w.Dir); err != nil {
		return nil, err
	}
	w.spawn = newSpawner()
	defer func() {
		if err != nil {
			err = errors.Join(err, w.Close())
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if w.N1, err = w.newNode(1); err != nil {
		return nil, err
	}
	if w.N2, err = w.newNode(2); err != nil {
		return nil, err
	}
	if err := w.ip(ctx, w.N1.NS, fmt.Sprintf("link add eth0 mtu %d type veth peer name eth0 netns %s", o.MTU,
		w.N2.NS.Name)); err != nil {
		return nil, err
	}
	for i, n := range []*Node{w.N1, w.N2} {
		peer := []*Node{w.N2, w.N1}[i]
		if err := w.ip(ctx, n.NS,
			"link set lo up",
			fmt.Sprintf("link set eth0 mtu %d up", o.MTU),
			fmt.Sprintf("addr add %s/24 dev eth0", n.Addr4),
			fmt.Sprintf("addr add %s/64 dev eth0 nodad", n.Addr6),
			fmt.Sprintf("addr add %s/32 dev lo", n.PodNet4.Addr().Next()),
			fmt.Sprintf("addr add %s/128 dev lo nodad", n.PodNet6.Addr().Next()),
			fmt.Sprintf("route add %s via %s", peer.PodNet4, peer.Addr4),
			fmt.Sprintf("route add %s via %s", peer.PodNet6, peer.Addr6),
			// An address of the own subnet that no pod has: an honest error, and never a way round by the other node.
			fmt.Sprintf("route add unreachable %s metric 9999", n.PodNet4),
			fmt.Sprintf("route add unreachable %s metric 9999", n.PodNet6),
		); err != nil {
			return nil, err
		}
	}
	return w, nil
}

func (w *World) newNode(i int) (*Node, error) {
	n := &Node{
		Name: fmt.Sprintf("n%d", i), Index: i, nextPod: 2, nextHost: 100,
		Addr4: netip.MustParseAddr(fmt.Sprintf("10.91.0.%d", i)), Addr6: netip.MustParseAddr(fmt.Sprintf("fd91::%d", i)),
		PodNet4: netip.MustParsePrefix(fmt.Sprintf("10.91.%d.0/24", i)),
		PodNet6: netip.MustParsePrefix(fmt.Sprintf("fd91:0:0:%d::/64", i)),
	}
	var err error
	if n.NS, err = w.AddNS(n.Name); err != nil {
		return nil, err
	}
	for key, v := range map[string]string{
		"net/ipv4/ip_forward":                 "1", // a node routes between its hosts and the other node with or without ztun
		"net/ipv6/conf/all/forwarding":        "1",
		"net/ipv6/conf/default/accept_dad":    "0",
		"net/ipv6/conf/default/dad_transmits": "0",
	} {
		if err := n.NS.Sysctl(key, v); err != nil {
			return nil, fmt.Errorf("%s: %s: %w", n.Name, key, err)
		}
	}
	return n, nil
}

// AddNS makes an empty namespace that belongs to the world; name is its last part.
func (w *World) AddNS(name string) (*NS, error) { return w.nameNS(name, "add") }

// NameNS makes the namespace of a process, which somebody else has made, the world's.
func (w *World) NameNS(name string, pid int) (*NS, error) {
	return w.nameNS(name, "attach", fmt.Sprint(pid))
}

func (w *World) nameNS(name, how string, more ...string) (*NS, error) {
	full := w.ID + "-" + name
	w.mu.Lock()
	defer w.mu.Unlock()
	// Written first: what is in the list but was never made costs the reaper nothing.
	f, err := os.OpenFile(filepath.Join(w.Dir, "netns"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	_, err = fmt.Fprintln(f, full)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	if out, err := exec.Command("ip", append([]string{"netns", how, full}, more...)...).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("ip netns %s %s: %w: %s", how, full, err, out)
	}
	ns, err := openNS(full)
	if err != nil {
		return nil, err
	}
	w.nss = append(w.nss, ns)
	return ns, nil
}

// RemoveNS removes a namespace early, with all that runs inside it (the pod that vanishes).
func (w *World) RemoveNS(ns *NS) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, have := range w.nss {
		if have == ns {
			w.nss = append(w.nss[:i], w.nss[i+1:]...)
			break
		}
	}
	ns.f.Close()
	return removeNS(ns.Name)
}

// IP runs `ip ARGS` lines inside ns (each line is split at blanks), as one batch.
func (w *World) IP(ctx context.Context, ns *NS, lines ...string) error {
	return w.ip(ctx, ns, lines...)
}

func (w *World) ip(ctx context.Context, ns *NS, lines ...string) error {
	_, err := w.RunCmd(ctx, ns,
		Cmd{Args: []string{"ip", "-batch", "-"}, Stdin: strings.NewReader(strings.Join(lines, "\n") + "\n")})
	if err != nil {
		return fmt.Errorf("in %s: %w\n%s", ns.Name, err, strings.Join(lines, "\n"))
	}
	return nil
}

// AddPod makes a pod's namespace (only lo, and that down, as a fresh one is). Without IPs it takes the next address
// of both families; without Namespace "default", without ServiceAccount its name, without Protocol HBONE. Attach
// gives it to the node's daemon.
func (w *World) AddPod(n *Node, p Pod) (*Pod, error) {
	p.Node = n
	w.mu.Lock()
	if p.Name == "" {
		p.Name = fmt.Sprintf("pod%d%d", n.Index, n.nextPod)
	}
	if p.Namespace == "" {
		p.Namespace = "default"
	}
	if p.ServiceAccount == "" {
		p.ServiceAccount = p.Name
	}
	if p.Protocol == "" {
		p.Protocol = "HBONE"
	}
	if len(p.IPs) == 0 {
		p.IPs = n.addrs(n.nextPod)
		n.nextPod++
	}
	w.mu.Unlock()
	var err error
	if p.NS, err = w.AddNS(p.Name); err != nil {
		return nil, err
	}
	w.mu.Lock()
	w.pods = append(w.pods, &p)
	w.mu.Unlock()
	return &p, nil
}

func (n *Node) addrs(host int) []netip.Addr {
	return []netip.Addr{
		netip.MustParseAddr(fmt.Sprintf("10.91.%d.%d", n.Index, host)),
		netip.MustParseAddr(fmt.Sprintf("fd91:0:0:%d::%d", n.Index, host)),
	}
}

// AddHost makes an uncaptured host on a node; without IPs it takes the next address of both families from .100 on.
func (w *World) AddHost(n *Node, name string, ips ...netip.Addr) (*Host, error) {
	h := &Host{Name: name, Node: n, IPs: ips}
	w.mu.Lock()
	if len(h.IPs) == 0 {
		h.IPs = n.addrs(n.nextHost)
		n.nextHost++
	}
	w.mu.Unlock()
	var err error
	if h.NS, err = w.AddNS(name); err != nil {
		return nil, err
	}
	if err := h.NS.Sysctl("net/ipv6/conf/default/accept_dad", "0"); err != nil {
		return nil, err
	}
	dev := "vh" + name
	if len(dev) > 15 {
		return nil, fmt.Errorf("host name %q is too long for a device name", name)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	gw4 := n.PodNet4.Addr().Next()
	node := []string{fmt.Sprintf("link set %s mtu %d up", dev, w.opt.MTU),
		fmt.Sprintf("addr add fe80::1/64 dev %s nodad", dev)}
	host := []string{"link set lo up", fmt.Sprintf("link set eth0 mtu %d up", w.opt.MTU)}
	for _, ip := range h.IPs {
		node = append(node, fmt.Sprintf("route add %s/%d dev %s", ip, ip.BitLen(), dev))
		add := fmt.Sprintf("addr add %s/%d dev eth0", ip, ip.BitLen())
		if ip.Is6() {
			add += " nodad"
		}
		host = append(host, add)
		if ip.Is4() {
			host = append(host, fmt.Sprintf("route add %s dev eth0", gw4), fmt.Sprintf("route add default via %s src %s",
				gw4, ip))
		} else {
			host = append(host, "route add default via fe80::1 dev eth0")
		}
	}
	if err := w.ip(ctx, n.NS, fmt.Sprintf("link add %s mtu %d type veth peer name eth0 netns %s", dev, w.opt.MTU,
		h.NS.Name)); err != nil {
		return nil, err
	}
	if err := w.ip(ctx, n.NS, node...); err != nil {
		return nil, err
	}
	if err := w.ip(ctx, h.NS, host...); err != nil {
		return nil, err
	}
	w.mu.Lock()
	w.hosts = append(w.hosts, h)
	w.mu.Unlock()
	return h, nil
}

// Nodes lists the two nodes; Pods and Hosts what was added.
func (w *World) Nodes() []*Node { return []*Node{w.N1, w.N2} }
func (w *World) Pods() []*Pod {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]*Pod(nil), w.pods...)
}
func (w *World) Hosts() []*Host {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]*Host(nil), w.hosts...)
}

// Logf writes to the log that Options named.
func (w *World) Logf(format string, args ...any) { w.opt.Logf(format, args...) }

// Path is a file of the world's directory.
func (w *World) Path(name string) string { return filepath.Join(w.Dir, name) }

// Close kills every child, removes every namespace and the directory. It may be called twice.
func (w *World) Close() error {
	w.mu.Lock()
	if w.closed {
		w.mu.Unlock()
		return nil
	}
	w.closed = true
	procs := make([]*Process, 0, len(w.procs))
	for p := range w.procs {
		procs = append(procs, p)
	}
	nss := w.nss
	w.mu.Unlock()
	for _, p := range procs {
		p.killAll()
	}
	var errs []error
	for _, ns := range nss {
		ns.f.Close()
		errs = append(errs, removeNS(ns.Name))
	}
	if w.spawn != nil {
		w.spawn.stop()
	}
	errs = append(errs, os.RemoveAll(w.Dir))
	if w.reaper != nil {
		w.reaper.Close()
		_ = w.reapCm.Wait()
	}
	w.lock.Close()
	return errors.Join(errs...)
}
