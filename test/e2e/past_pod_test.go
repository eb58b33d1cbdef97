package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ztun/test/lab"
)

// linkLocal has those on the pods' own wires call the pods by the addresses that no plan and no policy names.
func (p *past) linkLocal() {
	p.t.Helper()
	for _, to := range []*lab.Pod{p.a, p.c} {
		var devs []struct {
			Addrs []struct {
				Local, Scope string
			} `json:"addr_info"`
		}
		p.ipJSON(to.NS, &devs, "-6", "addr", "show", "dev", "eth0")
		for _, a := range devs[0].Addrs {
			if a.Scope != "link" {
				continue
			}
			at := netip.MustParseAddr(a.Local)
			all := battery(at, netip.MustParseAddr("fe80::ecee"), p.spoofed(to, false), pastPorts)
			p.put(p.linkTo(to.Node.NS, to.V6()), all)
			p.sent += len(all)
			p.fence()
			p.judge("on the pod's wire, to "+a.Local, all)
		}
	}
}

// back has a process with CAP_NET_RAW send by the device in its pod by which ztun takes what the network sends. By the
// other one, which TCP takes, neighbours send anyway.
func (p *past) back() {
	p.t.Helper()
	by := func(to netip.Addr) link {
		return p.linkBy(p.b.NS, "ztun-net", map[bool]string{true: "169.254.1.1", false: "fe80::1"}[to.Is4()], to)
	}
	p.from("a neighbour by its ztun-net", by, p.b.IPs, p.a)
	p.from("a pod of another node by its ztun-net", by, p.b.IPs, p.c)
}

// escape is a way of an ordinary process to get out of its pod: what it asks of the kernel needs no capability.
type escape struct {
	name  string
	proto int // 0: TCP
	kind  int // 0: a stream
	set   func(fd int, v4 bool) error
}

func escapes(pod *lab.Pod) (out []escape) {
	add := func(name string, set func(fd int, v4 bool) error) { out = append(out, escape{name: name, set: set}) }
	devs := map[string]int{}
	_ = pod.NS.Do(func() error {
		all, err := net.Interfaces()
		for _, d := range all {
			devs[d.Name] = d.Index
		}
		return err
	})
	for _, dev := range []string{"eth0", "lo", "ztun-pod", "ztun-net"} {
		index, ok := devs[dev]
		if !ok {
			continue
		}
		add("bound to "+dev, func(fd int, _ bool) error { return unix.BindToDevice(fd, dev) })
		add("unicast by "+dev, func(fd int, v4 bool) error {
			n := int(int32(htonl(uint32(index))))
			if v4 {
				return unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_UNICAST_IF, n)
			}
			return unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_UNICAST_IF, n)
		})
		add("without a route, bound to "+dev, func(fd int, _ bool) error {
			return errors.Join(unix.BindToDevice(fd, dev), unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DONTROUTE, 1))
		})
	}
	add("without a route", func(fd int, _ bool) error {
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DONTROUTE, 1)
	})
	for _, foreign := range []bool{false, true} {
		for _, dev := range []string{"", "eth0"} {
			add(fmt.Sprintf("from an address (foreign: %v), bound to %q", foreign, dev), func(fd int, v4 bool) error {
				at := pick(pod.IPs, v4)
				if foreign {
					at = at.Next().Next().Next()
				}
				level, opt := unix.SOL_IP, unix.IP_FREEBIND
				var sa unix.Sockaddr = &unix.SockaddrInet4{Port: 15008, Addr: to4(at)}
				if !v4 {
					level, opt = unix.SOL_IPV6, unix.IPV6_FREEBIND
					sa = &unix.SockaddrInet6{Port: 15008, Addr: at.As16()}
				}
				err := errors.Join(unix.SetsockoptInt(fd, level, opt, 1),
					unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
				if dev != "" {
					err = errors.Join(err, unix.BindToDevice(fd, dev))
				}
				return errors.Join(err, unix.Bind(fd, sa))
			})
		}
	}
	add("source route", func(fd int, v4 bool) error {
		if !v4 {
			return nil
		}
		return unix.SetsockoptString(fd, unix.SOL_IP, unix.IP_OPTIONS, string([]byte{131, 7, 4, 10, 91, 1, 1, 1}))
	})
	for name, e := range map[string]escape{"MPTCP": {proto: unix.IPPROTO_MPTCP}, "SCTP": {proto: unix.IPPROTO_SCTP},
		"SCTP, one to many": {proto: unix.IPPROTO_SCTP, kind: unix.SOCK_SEQPACKET},
		"DCCP":              {proto: unix.IPPROTO_DCCP, kind: unix.SOCK_DCCP},
		"UDPLITE":           {proto: unix.IPPROTO_UDPLITE, kind: unix.SOCK_DGRAM},
		"L2TP":              {proto: unix.IPPROTO_L2TP, kind: unix.SOCK_DGRAM}} {
		for _, dev := range []string{"", "eth0"} {
			e.name = fmt.Sprintf("%s, bound to %q", name, dev)
			e.set = func(fd int, _ bool) error {
				if dev == "" {
					return nil
				}
				return unix.BindToDevice(fd, dev)
			}
			out = append(out, e)
		}
	}
	return out
}

func to4(a netip.Addr) (b [4]byte) {
	if a.Is4() {
		b = a.As4()
	}
	return b
}

func htonl(n uint32) uint32 { return uint32(htons(uint16(n)))<<16 | uint32(htons(uint16(n>>16))) }

// inside has an ordinary process of a pod try to get out: of what is not UDP, ICMP or HBONE nothing may be on the
// node's wire. It may call who it calls, so that what ztun itself carries arrives.
func (p *past) inside() {
	p.t.Helper()
	wire, err := p.Capture(p.N1.NS, "eth0", lab.CaptureOptions{Immediate: true,
		Filter: "(ip or ip6) and not udp and not icmp and not icmp6 and not tcp port 15008"})
	must(p.t, err)
	var wg sync.WaitGroup
	var mu sync.Mutex
	var unknown []string
	tried := 0
	for _, pod := range []*lab.Pod{p.a, p.b} {
		for _, e := range escapes(pod) {
			for _, v4 := range []bool{true, false} {
				p.sent++
				tried++
				wg.Go(func() {
					if err := e.try(p.ctx, pod.NS, netip.AddrPortFrom(pick(p.c.IPs, v4), pastPorts[0])); errors.Is(err, errNoSocket) {
						mu.Lock()
						defer mu.Unlock()
						unknown = append(unknown, e.name)
					}
				})
			}
		}
	}
	wg.Wait()
	p.fence()
	own := append(slices.Clone(p.a.IPs), p.b.IPs...)
	for _, got := range stop(p.t, wire) {
		if slices.Contains(own, got.Src.Addr()) || slices.Contains(p.c.IPs, got.Dst.Addr()) {
			p.t.Errorf("of a process in a pod on the wire: %v", got)
		}
	}
	slices.Sort(unknown)
	p.t.Logf("%d sockets of ordinary processes; this kernel has none of: %s", tried,
		strings.Join(slices.Compact(unknown), "; "))
	for _, w := range p.witness {
		w.take() // what ztun has carried
	}
}

var errNoSocket = errors.New("the kernel has no such socket")

// try connects and writes, as far as it comes.
func (e escape) try(ctx context.Context, ns *lab.NS, to netip.AddrPort) error {
	return ns.Do(func() error {
		family, kind := unix.AF_INET, e.kind
		var sa unix.Sockaddr = &unix.SockaddrInet4{Port: int(to.Port()), Addr: to4(to.Addr())}
		if to.Addr().Is6() {
			family, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
		}
		if kind == 0 {
			kind = unix.SOCK_STREAM
		}
		fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, e.proto)
		if err != nil {
			return fmt.Errorf("%w: %w", errNoSocket, err)
		}
		defer unix.Close(fd)
		if err := e.set(fd, to.Addr().Is4()); err != nil {
			return err
		}
		if err := unix.Connect(fd, sa); err != nil && err != unix.EINPROGRESS {
			return err
		}
		for range 3 { // time for a SYN, and one more
			_, _ = unix.Write(fd, []byte("out"))
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(500 * time.Millisecond):
			}
		}
		return nil
	})
}

// weaker is what docs/steered.md says does not hold where eth0 stays in the pod, so that who reads it there can rely on
// it: a process with CAP_NET_RAW reads (read packets were) and writes eth0, and one with CAP_NET_ADMIN changes the
// rules until they are put back. Towards others' pods neither gets any further.
func (p *past) weaker(read int) {
	p.t.Helper()
	if read == 0 {
		p.t.Error("a process with CAP_NET_RAW reads nothing on eth0: docs/steered.md says that it does")
	}
	wire, err := p.Capture(p.N1.NS, "eth0", lab.CaptureOptions{Immediate: true})
	must(p.t, err)
	byEth0 := func(to netip.Addr) link {
		var routes []struct{ Gateway string }
		family := map[bool]string{true: "-4", false: "-6"}[to.Is4()]
		p.ipJSON(p.b.NS, &routes, family, "route", "show", "default", "dev", "eth0")
		return p.linkBy(p.b.NS, "eth0", routes[0].Gateway, pick(p.h2.IPs, to.Is4()))
	}
	p.from("a neighbour by its eth0", byEth0, p.b.IPs, p.a)
	p.from("a pod of another node by its eth0", byEth0, p.b.IPs, p.c)
	left := stop(p.t, wire).Where(func(got lab.Packet) bool {
		return got.Seq>>16 == pastMark && slices.Contains(p.c.IPs, got.Dst.Addr())
	})
	if len(left) == 0 {
		p.t.Error("nothing that CAP_NET_RAW writes to eth0 leaves the node: docs/steered.md says that it does")
	}
	for _, family := range []string{"-4", "-6"} {
		_, err := p.Run(p.ctx, p.a.NS, "ip", family, "rule", "add", "pref", "1", "lookup", "local")
		must(p.t, err)
		eventually(p.t, 60*time.Second, func() error {
			var rules []struct{ Priority int }
			p.ipJSON(p.a.NS, &rules, family, "rule")
			for _, r := range rules {
				if r.Priority == 1 {
					return errors.New("a rule that leads past the others is not removed")
				}
			}
			return nil
		})
	}
	p.from("after somebody has changed the rules", func(to netip.Addr) link { return p.linkTo(p.N1.NS, to) }, p.h1.IPs, p.a)
	p.t.Logf("by CAP_NET_RAW in a pod: %d packets read on eth0, %d written there have left the node as they were", read,
		len(left))
}
