package doctor

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ztun/tun/netns"
	"ztun/tun/sandwich"
	"ztun/tun/steer"
)

// Options say what to look at.
type Options struct {
	NodeTUN    string // "": no device, rule or route of ours is in the node's namespace
	MTU        int    // of the node's device, in bytes
	IPv6       bool
	PlainTUN   bool
	Redirected bool     // pods are captured by istio-cni's rules: none in them is ours either
	Steered    string   // the directory of steered pods' records; "": there are none
	Running    bool     // the daemon runs, in this network namespace
	Ports      []uint16 // that it listens on
	Daemon     Daemon
	Upstreams  []UpstreamOptions
	Certs      []Cert
	Peers      []Peer // Node and Addr
	Pods       []PodOptions
	Nameserver netip.AddrPort // to which a query from each pod is addressed; invalid: none is sent
}

// UpstreamOptions are an Upstream, and how to reach it.
type UpstreamOptions struct {
	Upstream
	Probe func(context.Context) error
}

// PodOptions are a Pod as the daemon knows it.
type PodOptions struct {
	Pod
	Addrs  []netip.Addr
	Device string // its TUN
	MTU    int    // of that, in bytes; 0: not looked at
}

// Bounds of looking: each step waits so long, and so many are under way at once.
const (
	patience = 3 * time.Second
	atOnce   = 16
	maxRules = 4 << 20 // bytes of a packet filter's rules that are read
)

// Collect looks at everything. It returns when all is seen, or when ctx has ended and what was under way has noticed.
func Collect(ctx context.Context, o Options) Facts {
	f := Facts{Now: time.Now(), Daemon: o.Daemon, Certs: o.Certs}
	blind := func(what string, err error) {
		if err != nil {
			f.Blind = append(f.Blind, Blind{what, err.Error()})
		}
	}
	node, err := netns.Current()
	if err != nil {
		blind("the node's network namespace", err)
		return f
	}
	defer node.Close()
	f.Host = host(ctx, o, node, blind)

	f.Control, f.Peers, f.Pods = make([]Upstream, len(o.Upstreams)), slices.Clone(o.Peers), make([]Pod, len(o.Pods))
	var group sync.WaitGroup
	turn := make(chan struct{}, atOnce)
	each := func(n int, look func(i int)) {
		for i := range n {
			group.Go(func() {
				turn <- struct{}{}
				defer func() { <-turn }()
				look(i)
			})
		}
	}
	each(len(o.Upstreams), func(i int) { f.Control[i] = upstream(ctx, o.Upstreams[i]) })
	each(len(o.Peers), func(i int) { f.Peers[i] = peer(ctx, o.Peers[i]) })
	failed := make([]error, len(o.Pods))
	each(len(o.Pods), func(i int) { f.Pods[i], failed[i] = pod(ctx, o, i, node) })
	group.Wait()
	for i, err := range failed {
		blind("pod "+o.Pods[i].Name, err)
	}
	return f
}

func host(ctx context.Context, o Options, node *netns.NS, blind func(string, error)) Host {
	h := Host{NodeTUN: o.NodeTUN, PlainTUN: o.PlainTUN, Redirected: o.Redirected, Sysctls: map[string]string{}}
	if !o.Redirected {
		h.capture(o, node, blind)
	}
	h.Conntrack[0], _ = strconv.Atoi(readLine("/proc/sys/net/netfilter/nf_conntrack_count"))
	h.Conntrack[1], _ = strconv.Atoi(readLine("/proc/sys/net/netfilter/nf_conntrack_max"))
	if !o.Running {
		h.Taken = taken(o.Ports)
	}
	var err error
	h.Filters, err = filters(ctx)
	blind("packet filters", err)
	return h
}

// capture looks at what brings pods' traffic to ztun where its own devices do.
func (h *Host) capture(o Options, node *netns.NS, blind func(string, error)) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err == nil {
		h.Kernel = unix.ByteSliceToString(uts.Release[:])
	}
	if f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0); errors.Is(err, os.ErrPermission) {
		blind("/dev/net/tun", err)
	} else if err != nil {
		h.TUN = err.Error()
	} else {
		f.Close()
	}
	if o.NodeTUN == "" {
		return
	}
	var err error
	if h.Seen, err = steer.Observe(node); err != nil {
		blind("devices, rules and routes", err)
	}
	paths := []string{"net/ipv4/ip_forward", "net/ipv4/conf/all/rp_filter", "net/ipv4/conf/" + o.NodeTUN + "/rp_filter",
		"net/ipv4/ip_local_port_range"}
	if !o.Running { // the daemon turns forwarding on when it starts
		paths = paths[1:]
	}
	if o.IPv6 && o.Running {
		paths = append(paths, "net/ipv6/conf/all/forwarding")
	}
	for _, l := range h.Seen.Links {
		if l.Default {
			paths = append(paths, "net/ipv6/conf/"+l.Name+"/accept_ra")
		}
	}
	for _, p := range paths {
		if b, err := os.ReadFile(filepath.Join("/proc/sys", p)); err == nil {
			h.Sysctls[p] = string(bytes.TrimSpace(b))
		}
	}
	h.TUNFlags, _ = strconv.ParseUint(readLine("/sys/class/net/"+o.NodeTUN+"/tun_flags"), 0, 64)
	if o.Running {
		plan := steer.NodePlan(steer.NodeConfig{TUN: o.NodeTUN, MTU: o.MTU, IPv6: o.IPv6})
		if h.Missing, err = steer.Missing(plan, steer.Namespaces{Node: node}); err != nil {
			blind("the node's plan", err)
		}
	}
}

func readLine(path string) string {
	b, _ := os.ReadFile(path)
	return string(bytes.TrimSpace(b))
}

// taken returns those of the ports that cannot be listened on, because somebody does.
func taken(ports []uint16) (busy []uint16) {
	for _, p := range ports {
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", p))
		if errors.Is(err, unix.EADDRINUSE) {
			busy = append(busy, p)
		}
		if err == nil {
			l.Close()
		}
	}
	return busy
}

// filters reads the rules of packet filters, by the programs that are there. That rules exist which no program here
// can read is an error.
func filters(ctx context.Context) ([]string, error) {
	var lines []string
	var errs []error
	read := false
	for _, c := range [][]string{{"iptables-save"}, {"ip6tables-save"}, {"nft", "list", "ruleset"}} {
		path, err := exec.LookPath(c[0])
		if err != nil {
			continue
		}
		ctx, cancel := context.WithTimeout(ctx, patience)
		cmd := exec.CommandContext(ctx, path, c[1:]...)
		out := &bounded{left: maxRules}
		var stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = out, &stderr
		err = cmd.Run()
		cancel()
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w: %s", c[0], err, strings.TrimSpace(stderr.String())))
			continue
		}
		read = true
		for s := bufio.NewScanner(&out.Buffer); s.Scan(); {
			if line := strings.TrimSpace(s.Text()); line != "" && !strings.HasPrefix(line, "#") {
				lines = append(lines, c[0]+": "+line)
			}
		}
	}
	if !read && len(errs) == 0 && readLine("/proc/net/ip_tables_names")+readLine("/proc/net/ip6_tables_names") != "" {
		errs = append(errs, errors.New("there are iptables rules and no iptables-save to read them with"))
	}
	if read {
		return lines, nil // nft and iptables show the same rules, one of them is enough
	}
	return nil, errors.Join(errs...)
}

// bounded keeps the first bytes of what is written and takes the rest for read.
type bounded struct {
	bytes.Buffer
	left int
}

func (b *bounded) Write(p []byte) (int, error) {
	n := min(len(p), b.left)
	b.left -= n
	b.Buffer.Write(p[:n])
	return len(p), nil
}

func upstream(ctx context.Context, o UpstreamOptions) Upstream {
	u := o.Upstream
	if u.Token.Path != "" {
		b, err := os.ReadFile(u.Token.Path)
		if err != nil {
			u.Token.Error = err.Error()
		}
		u.Token.Expires = expiry(string(bytes.TrimSpace(b)))
	}
	if err := o.Probe(ctx); err != nil {
		u.Error = err.Error()
	}
	return u
}

func peer(ctx context.Context, p Peer) Peer {
	d := net.Dialer{Timeout: patience}
	c, err := d.DialContext(ctx, "tcp", p.Addr.String())
	if err != nil {
		p.Error = err.Error()
		return p
	}
	defer c.Close()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		return p
	}
	_ = raw.Control(func(fd uintptr) {
		level, name := unix.IPPROTO_IP, unix.IP_MTU
		if p.Addr.Addr().Is6() {
			level, name = unix.IPPROTO_IPV6, unix.IPV6_MTU
		}
		p.MTU, _ = unix.GetsockoptInt(int(fd), level, name)
	})
	return p
}

func pod(ctx context.Context, all Options, i int, node *netns.NS) (Pod, error) {
	o, server := all.Pods[i], all.Nameserver
	p := o.Pod
	if p.Ref == "" {
		return p, nil // a node agent has handed over a descriptor, which is the daemon's alone
	}
	ns, err := netns.Open(p.Ref)
	if errors.Is(err, os.ErrPermission) {
		return p, err
	}
	if err != nil {
		p.NetNS = err.Error()
		return p, nil
	}
	defer ns.Close()
	if p.State != "" && p.State != "Up" {
		return p, nil // what is missing is the daemon's to say
	}
	known, err := between(&p, all.Steered, ns)
	if err != nil {
		return p, err
	}
	if !all.Redirected && !known {
		plan := steer.PodPlan(steer.PodConfig{Name: p.Name, Addrs: o.Addrs, TUN: o.Device, NodeTUN: all.NodeTUN, MTU: o.MTU})
		if p.Missing, err = steer.Missing(plan, steer.Namespaces{Node: node, Pod: ns}); err != nil {
			return p, err
		}
	}
	if !server.IsValid() || len(p.Missing)+len(p.Lacks) > 0 {
		return p, nil
	}
	if err := query(ctx, ns, server); errors.Is(err, os.ErrPermission) {
		return p, err
	} else if err != nil {
		p.DNS = err.Error()
	}
	return p, nil
}

// between looks at a pod that has an eth0, by what was written down of it; known: there is such a record.
func between(p *Pod, records string, ns *netns.NS) (known bool, err error) {
	if records == "" {
		return false, nil
	}
	dev, ino := ns.ID()
	r, err := sandwich.Find(records, dev, ino)
	if r == nil || err != nil {
		return false, err
	}
	p.Between = r.Name()
	s, err := netns.OpenName(r.Name())
	if p.Lost = errors.Is(err, netns.ErrNotExist); p.Lost {
		return true, nil
	}
	if err != nil {
		return true, err
	}
	defer s.Close()
	plan, err := r.Plan()
	if err == nil {
		p.Lacks, err = sandwich.Missing(plan, sandwich.Namespaces{S: s, Pod: ns})
	}
	return true, err
}
