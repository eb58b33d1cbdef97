package isolated

import (
	"errors"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztun/admin"
	"ztun/cmd/attach"
	"ztun/tun/tuntest/nslab"
)

// established makes an established connection out of nothing in the calling thread's namespace, as a killed daemon
// leaves it: nobody has the other end.
func established(local, remote netip.AddrPort) (*os.File, error) {
	family, level := unix.AF_INET, func(a netip.AddrPort) unix.Sockaddr {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	if local.Addr().Is6() {
		family, level = unix.AF_INET6, func(a netip.AddrPort) unix.Sockaddr {
			return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
		}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_REPAIR, 1), unix.Bind(fd, level(local)),
		unix.Connect(fd, level(remote)),
		unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_REPAIR, unix.TCP_REPAIR_OFF_NO_WP))
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "tcp"), nil
}

// Connections that a killed daemon left to the pod's kernel, and whose application only waits, end with a reset;
// those within the pod go on.
func TestOrphansAreReset(t *testing.T) {
	ns, n := nslab.New(t), openNode(t)
	spec := attach.Pod{PodSpec: admin.PodSpec{
		NetNS: ns.Path(), IPs: []netip.Addr{netip.MustParseAddr("10.91.1.2"), netip.MustParseAddr("fd91:0:0:1::2")},
	}}
	at, err := n.Attach(t.Context(), spec, nobody{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := at.Remove(); err != nil {
			t.Error(err)
		}
	}()
	if err := at.Capture(t.Context()); err != nil {
		t.Fatal(err)
	}
	p := at.(*pod)
	a := netip.MustParseAddrPort
	var idle []*os.File
	var inside *os.File
	if err := ns.Do(func() error {
		for _, c := range []struct{ Local, Remote netip.AddrPort }{
			{a("10.91.1.2:40000"), a("192.0.2.1:80")}, {a("10.91.1.2:8080"), a("10.91.2.2:55555")},
			{a("[fd91:0:0:1::2]:40000"), a("[2001:db8::1]:80")},
		} {
			f, err := established(c.Local, c.Remote)
			if err != nil {
				return err
			}
			idle = append(idle, f)
		}
		inside, err = established(a("10.91.1.2:40001"), a("10.91.1.2:40002"))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer inside.Close()
	found, err := attach.Orphans(p.ns, spec.IPs)
	if err != nil || len(found) != 3 {
		t.Fatalf("found %v, %v", found, err)
	}
	p.EndOrphans(t.Context(), p.ns, found)
	for i, f := range idle {
		f.SetReadDeadline(time.Now().Add(20 * time.Second))
		if n, err := f.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("connection %d (%v): %d, %v, want a reset", i, found, n, err)
		}
		f.Close()
	}
	inside.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if _, err := inside.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a connection within the pod: %v", err)
	}
}
