package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"ztun/test/lab"
	"ztun/test/load"
)

// rootless: UDP and pings of a workload of `ztun run`, which leave by an ordinary user's sockets: his tools, a QUIC
// library, and what a socket in there is told.
func (d *datagrams) rootless(t *testing.T) {
	r := newRootless(t, d.mesh)
	h := d.h1.NS
	tool := func(t *testing.T, flags []string, script string) (string, error) {
		t.Helper()
		return r.run(h, "", asUser(append(flags, "--", "sh", "-c", script+" 2>&1")...)...)
	}
	h2 := func(v4 bool) string { return pick(d.h2.IPs, v4).String() }
	// New namespaces let nobody have ICMP sockets.
	if out, err := tool(t, nil, "ping -n -c 1 -W 5 "+h2(true)); err == nil ||
		!strings.Contains(out+err.Error(), "Packet filtered") || !strings.Contains(err.Error(), "ping_group_range") {
		t.Errorf("a ping that the host does not let leave: %v\n%s", err, out)
	}
	must(t, h.Sysctl("net/ipv4/ping_group_range", "0 2147483647"))
	families(t, func(t *testing.T, v4 bool) {
		node := pick([]netip.Addr{d.N2.Addr4, d.N2.Addr6}, v4).String()
		for _, script := range []string{
			"ping -n -c 3 -i 0.2 -W 10 " + h2(v4),
			"traceroute -p 33434 -n -q 1 -N 1 -w 10 -m 4 " + h2(v4),
			"traceroute -I -n -q 1 -N 1 -w 10 -m 4 " + h2(v4),
		} {
			out, err := tool(t, nil, script)
			want := []string{h2(v4)}
			if strings.HasPrefix(script, "trace") {
				want = append(want, " "+node+" ")
			}
			for _, w := range want {
				if err != nil || !strings.Contains(out[strings.Index(out, "\n")+1:], w) {
					t.Errorf("%s: %v, no %q\n%s", script, err, w, out)
				}
			}
		}
		out, err := tool(t, nil, "ping -n -M do -s 1440 -c 3 -i 0.3 -W 5 "+h2(v4))
		if err == nil || !strings.Contains(out, "1400") {
			t.Errorf("a ping larger than the path: %v\n%s", err, out)
		}
		if out, err = tool(t, []string{"--no-udp"}, "ping -n -c 1 -W 1 "+h2(v4)); err == nil {
			t.Errorf("a ping with --no-udp: %s", out)
		}
	})

	begun := waitFor("\n")
	cmd := r.cmd(r.knowledge(), "", asUser("-p", "18021:7021/udp", "-p", "18022:7022/udp", "--", "sh", "-c",
		"echo begun; exec sleep 600")...)
	cmd.Env = append(cmd.Env, "ZTUN_MAX_UDP_FLOWS=2000")
	log := waitFor("UDP sockets")
	cmd.Stdout, cmd.Stderr = begun, log
	p, err := d.Start(h, cmd)
	must(t, err)
	defer p.Kill()
	select {
	case <-begun.seen:
	case <-p.Done():
		t.Fatalf("%v: %s", p.Err(), log)
	case <-time.After(30 * time.Second):
		t.Fatalf("the workload did not begin in 30 s: %s", log)
	}
	_, command, err := inside(p)
	must(t, err)
	in, err := d.NameNS("user", command)
	must(t, err)

	newNameserver(t, d.h2.NS, d.h2.IPs)
	// UDP both ways; where nobody listens it is an error; what is too large for the path is told, and comes in fragments.
	d.each(t, func(t *testing.T, pick func([]netip.Addr) netip.Addr) {
		at := netip.AddrPortFrom(pick(d.h2.IPs), 7020)
		d.echoUDP(t, d.h2.NS, at)
		c, err := udpFrom(in, at)
		must(t, err)
		defer c.Close()
		for _, n := range []int{1, 1300, 1440, 8000, 40000} {
			text := strings.Repeat("d", n)
			if got, err := sayLarge(c, text); err != nil || got != text {
				t.Errorf("%d bytes: %d came back, %v", n, len(got), err)
			}
		}
		none, err := udpFrom(in, netip.AddrPortFrom(pick(d.h2.IPs), 7999))
		must(t, err)
		defer none.Close()
		if _, err := say(none, "x"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("to a port where nobody listens: %v", err)
		}
		// A strict destination is not reached in the clear.
		wire, err := d.Capture(d.N2.NS, "eth0", lab.CaptureOptions{Filter: "udp port 7100"})
		must(t, err)
		strict, err := udpFrom(in, netip.AddrPortFrom(pick(d.s.IPs), 7100))
		must(t, err)
		defer strict.Close()
		if _, err := say(strict, "x"); !errors.Is(err, syscall.EHOSTUNREACH) && !errors.Is(err, syscall.EACCES) {
			t.Errorf("to a strict port: %v", err)
		}
		if ps := stop(t, wire); len(ps) != 0 {
			t.Errorf("in the clear:\n%s", ps)
		}
		server := netip.AddrPortFrom(pick(d.h2.IPs), 53)
		eventually(t, 20*time.Second, func() error { _, err := ask(in, server, "x.example."); return err })
	})
	if want := "UDP dropped: it would go in the clear"; !strings.Contains(log.String(), want) {
		t.Errorf("no %q in %s", want, log)
	}
	// Published ports: anybody has an answer, from where he has asked, if policy lets him in.
	d.each(t, func(t *testing.T, pick func([]netip.Addr) netip.Addr) {
		own := pick([]netip.Addr{netip.MustParseAddr("10.91.66.4"), netip.MustParseAddr("fd91:0:0:66::4")})
		d.echoUDP(t, in, netip.AddrPortFrom(own, 7021))
		for _, from := range []*lab.NS{d.h2.NS, h} {
			c, err := udpFrom(from, netip.AddrPortFrom(pick(d.h1.IPs), 18021))
			must(t, err)
			defer c.Close()
			for _, n := range []int{1, 1300, 8000} {
				text := strings.Repeat("d", n)
				if got, err := sayLarge(c, text); err != nil || got != text {
					t.Errorf("published: %d bytes: %d came back, %v", n, len(got), err)
				}
			}
		}
		c, err := udpFrom(d.h2.NS, netip.AddrPortFrom(pick(d.h1.IPs), 18022))
		must(t, err)
		defer c.Close()
		eventually(t, 20*time.Second, func() error {
			c.Write([]byte("x"))
			if want := netip.AddrPortFrom(own, 7022).String(); !strings.Contains(log.String(), want) {
				return fmt.Errorf("what policy refuses is not said: no %s in %s", want, log)
			}
			return nil
		})
	})
	// TCP past the same link, by the host's socket: the host is told what the link takes. (HBONE to a pod would not do:
	// the pod's node is an end of the link.)
	d.serve(d.h2.NS)
	d.each(t, func(t *testing.T, pick func([]netip.Addr) netip.Addr) {
		forgetPath(d.mesh, h, d.h2.NS)
		to := pick(d.h2.IPs)
		x := load.Transfer(d.ctx, load.Target{Addr: lab.HostPort(to, 9000), Dial: in.Dial}, 4<<20, 4<<20, 1)
		if !x.OK {
			t.Errorf("%+v", x)
		}
		toldPath(d.mesh, "TCP", h, to)
	})
	d.iperf3From(t, in)
	d.quicBetween(t, []quicPath{{in, d.h2.IPs}, {in, d.a.IPs}, {in, d.s.IPs}})

	// Flows beyond their bound, and mappings beyond theirs, which are the process's descriptors.
	d.manyFlows(t, in)
	for i := range 1500 {
		var c *net.UDPConn
		must(t, in.Do(func() (err error) { c, err = net.ListenUDP("udp4", nil); return err }))
		c.WriteToUDPAddrPort([]byte("x"), netip.AddrPortFrom(d.h2.V4(), uint16(20000+i%100)))
		c.Close()
	}
	select {
	case <-log.seen:
	case <-time.After(20 * time.Second):
		t.Errorf("the bound of mappings is not reported: %s", log)
	}
	files := fmt.Sprintf("/proc/%d/fd/", parent(t, command))
	fds, err := os.ReadDir(files)
	if err != nil || len(fds) > 1024+100 || len(fds) < 100 {
		t.Errorf("the daemon has %d descriptors (%v)", len(fds), err)
	}
	// Many on one host: the user has 128 of these, which his other programs want too.
	for _, fd := range fds {
		if to, _ := os.Readlink(files + fd.Name()); strings.Contains(to, "inotify") {
			t.Errorf("descriptor %s of the daemon is %s", fd.Name(), to)
		}
	}
}

// parent is the parent of a process.
func parent(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	must(t, err)
	f := strings.Fields(string(b)[strings.LastIndex(string(b), ")")+1:])
	n, err := strconv.Atoi(f[1])
	must(t, err)
	return n
}
