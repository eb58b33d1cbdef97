package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztun/test/lab"
	"ztun/test/load"
)

// TestRunElsewhere: without root and without a command, a workload is served in a network namespace that its user has
// made elsewhere, and behind a TUN that somebody hands over, as a descriptor and by a socket: both directions, both
// families, by its identity.
func TestRunElsewhere(t *testing.T) {
	m := newMesh(t, meshOptions{})
	names := []string{"joined", "handed", "sent"}
	f := m.DefaultWorld()
	ips := func(i int) []netip.Addr {
		return []netip.Addr{netip.MustParseAddr(fmt.Sprintf("10.91.66.%d", i+6)),
			netip.MustParseAddr(fmt.Sprintf("fd91:0:0:66::%d", i+6))}
	}
	for i, name := range names {
		w := lab.Workload{UID: "lab//v1/Pod/default/" + name, Name: name, Namespace: "default", ServiceAccount: name,
			TrustDomain: "cluster.local", Protocol: "HBONE", Services: map[string]map[uint16]uint16{}}
		for j, ip := range ips(i) {
			w.WorkloadIPs = append(w.WorkloadIPs, ip.String())
			w.MeshAddresses = append(w.MeshAddresses, netip.AddrPortFrom(m.h1.IPs[j], uint16(15031+i)).String())
		}
		f.Workloads = append(f.Workloads, w)
	}
	f.Policies = []lab.Policy{{Name: "known", Namespace: "default", Scope: "Namespace", Action: "Allow",
		Rules: [][][]map[string]any{{{{"namespaces": []map[string]string{{"Exact": "default"}}}}},
			{{{"destinationPorts": []uint16{7021}}}}}}}
	m.teach(f)
	r := newRootless(t, m)
	as := func(i int, args ...string) []string {
		return append([]string{"--name", names[i], "--service-account", names[i], "--ip",
			ips(i)[0].String() + "," + ips(i)[1].String(), "-p", fmt.Sprintf("%d:7021/udp", 18041+i)}, args...)
	}
	const serves = "serving workload"

	// The user's own namespace, as a rootless container's.
	pid := waitFor("\n")
	p, err := m.Start(m.h1.NS, lab.Cmd{Stdout: pid, Stderr: pid, Args: []string{"setpriv", "--reuid", "65534", "--regid",
		"65534", "--clear-groups", "--bounding-set", "-all", "--inh-caps", "-all", "unshare", "-Urn", "sh", "-c",
		"echo $$; exec sleep 600"}})
	must(t, err)
	t.Cleanup(p.Kill)
	select {
	case <-pid.seen:
	case <-p.Done():
		t.Fatalf("unshare: %v: %s", p.Err(), pid)
	case <-time.After(30 * time.Second):
		t.Fatal("unshare did not begin in 30 s")
	}
	sleeper, err := strconv.Atoi(strings.TrimSpace(pid.String()))
	must(t, err)
	joined, err := m.NameNS(names[0], sleeper)
	must(t, err)
	r.start(m.h1.NS, serves, as(0, "--netns", fmt.Sprintf("/proc/%d/ns/net", sleeper))...)

	handed, err := m.AddNS(names[1])
	must(t, err)
	tun := r.tun(handed, ips(1), unix.IFF_TUN|unix.IFF_NO_PI|unix.IFF_VNET_HDR)
	r.startWith(m.h1.NS, tun, serves, as(1, "--tun-fd", "0")...)
	tun.Close()

	sent, err := m.AddNS(names[2])
	must(t, err)
	path := filepath.Join(r.dir, "tmp", "tun.sock")
	r.send(path, r.tun(sent, ips(2), unix.IFF_TUN|unix.IFF_NO_PI))
	r.start(m.h1.NS, serves, as(2, "--tun-socket", path)...)

	for i, ns := range []*lab.NS{joined, handed, sent} {
		m.serve(ns)
		families(t, func(t *testing.T, v4 bool) {
			for _, x := range []struct {
				from *lab.NS
				to   netip.Addr
				sees netip.Addr
			}{{ns, pick(m.c.IPs, v4), pick(m.h1.IPs, v4)}, {m.a.NS, pick(ips(i), v4), pick(m.a.IPs, v4)}} {
				to := load.Target{Addr: lab.HostPort(x.to, 9000), Dial: x.from.Dial}
				w, err := load.WhoAmI(m.ctx, to)
				if at, perr := netip.ParseAddrPort(w.Peer); err != nil || perr != nil || at.Addr() != x.sees {
					t.Errorf("%s: at %s the application sees %q, want %s (%v)", names[i], x.to, w.Peer, x.sees, err)
				}
				if x := load.Transfer(m.ctx, to, 4<<20, 4<<20, 1); !x.OK {
					t.Errorf("%s: %+v", names[i], x)
				}
			}
			// UDP of its own, and to a published port; the policy asks for mutual TLS at others.
			at := netip.AddrPortFrom(pick(m.h2.IPs, v4), 7021)
			m.echoUDP(t, m.h2.NS, at)
			m.echoUDP(t, ns, netip.AddrPortFrom(pick(ips(i), v4), 7021))
			for _, x := range []struct {
				from *lab.NS
				to   netip.AddrPort
			}{{ns, at}, {m.h2.NS, netip.AddrPortFrom(pick(m.h1.IPs, v4), uint16(18041+i))}} {
				c, err := udpFrom(x.from, x.to)
				must(t, err)
				for _, n := range []int{1, 1200, 8000} {
					text := strings.Repeat("d", n)
					if got, err := sayLarge(c, text); err != nil || got != text {
						t.Errorf("%s: UDP to %s: %d bytes: %d came back, %v", names[i], x.to, n, len(got), err)
					}
				}
				c.Close()
			}
		})
	}

	// What is of no use is said to be so.
	for want, args := range map[string][]string{
		"no such network namespace": {"--netns", "/proc/0/ns/net"},
		"it is the host's own":      {"--netns", "/proc/self/ns/net"},
		"does not make you root":    {"--netns", handed.Path()},
		"--tun-fd 77: bad file":     {"--tun-fd", "77"},
		"none of a TUN interface":   {"--tun-fd", "1"},
		"--tun-socket /nowhere":     {"--tun-socket", "/nowhere"},
		"there is no command":       {"--tun-fd", "0", "--", "true"},
	} {
		if _, err := r.run(m.h1.NS, "", as(0, args...)...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", args, err, want)
		}
	}
}

// tun makes a TUN in a namespace, with addresses and routes, and returns its descriptor.
func (r *rootless) tun(ns *lab.NS, ips []netip.Addr, flags uint16) *os.File {
	r.t.Helper()
	var fd int
	must(r.t, ns.Do(func() (err error) {
		if fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
			return err
		}
		ifr, err := unix.NewIfreq("tun7")
		if err != nil {
			return err
		}
		ifr.SetUint16(flags)
		return unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}))
	must(r.t, r.IP(r.ctx, ns, "link set lo up", "link set tun7 up", "addr add "+ips[0].String()+"/32 dev tun7",
		"addr add "+ips[1].String()+"/128 dev tun7 nodad", "route add default dev tun7", "route add ::/0 dev tun7"))
	return os.NewFile(uintptr(fd), "tun")
}

// send hands a descriptor to who calls first at path.
func (r *rootless) send(path string, f *os.File) {
	r.t.Helper()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	must(r.t, err)
	must(r.t, os.Chmod(path, 0o666))
	done := make(chan struct{})
	r.t.Cleanup(func() { ln.Close(); <-done })
	go func() {
		defer close(done)
		defer f.Close()
		c, err := ln.AcceptUnix()
		if err != nil {
			return
		}
		defer c.Close()
		rc, err := f.SyscallConn()
		if err != nil {
			return
		}
		rc.Control(func(fd uintptr) { c.WriteMsgUnix([]byte{0}, unix.UnixRights(int(fd)), nil) })
	}()
}
