package lab

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// NS is a named network namespace (/var/run/netns/Name).
type NS struct {
	Name string
	f    *os.File
}

// Path is the file that names the namespace, as `ztun pod add --netns` takes it.
func (n *NS) Path() string { return "/var/run/netns/" + n.Name }

func openNS(name string) (*NS, error) {
	f, err := os.Open("/var/run/netns/" + name)
	if err != nil {
		return nil, err
	}
	return &NS{Name: name, f: f}, nil
}

// Do runs fn on a locked thread inside the namespace. Goroutines that fn starts are not inside it; sockets that fn
// makes stay inside it for ever.
func (n *NS) Do(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		// A goroutine of its own: if the thread cannot be brought back it is thrown away with the goroutine, and the
		// caller's thread was never touched.
		done <- n.enter(fn)
	}()
	return <-done
}

func (n *NS) enter(fn func() error) (err error) {
	runtime.LockOSThread()
	back, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer back.Close()
	if err := unix.Setns(int(n.f.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter namespace %s: %w", n.Name, err)
	}
	defer func() {
		if unix.Setns(int(back.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
	}()
	return fn()
}

// Dial connects from inside the namespace. address must hold an IP address, not a name.
func (n *NS) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return n.DialFrom(ctx, netip.Addr{}, network, address)
}

// DialFrom is Dial with a chosen source address (zero: the kernel's choice).
func (n *NS) DialFrom(ctx context.Context, src netip.Addr, network, address string) (net.Conn, error) {
	var c net.Conn
	err := n.Do(func() (err error) {
		d := net.Dialer{}
		if src.IsValid() {
			d.LocalAddr = &net.TCPAddr{IP: src.AsSlice()}
		}
		c, err = d.DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// Listen listens for TCP inside the namespace.
func (n *NS) Listen(network, address string) (net.Listener, error) {
	var l net.Listener
	err := n.Do(func() (err error) {
		l, err = net.Listen(network, address)
		return err
	})
	return l, err
}

// HTTP returns a client whose connections start inside the namespace; no connection is kept.
func (n *NS) HTTP(timeout time.Duration) *http.Client {
	return &http.Client{Timeout: timeout, Transport: &http.Transport{DialContext: n.Dial, DisableKeepAlives: true}}
}

// Sysctl writes a value under /proc/sys inside the namespace; key with slashes, such as "net/ipv4/ip_forward".
func (n *NS) Sysctl(key, value string) error {
	return n.Do(func() error { return os.WriteFile("/proc/sys/"+key, []byte(value), 0o644) })
}

// ReadFile reads a file of /proc as seen from inside the namespace; "/proc/net" is taken as the calling thread's.
func (n *NS) ReadFile(path string) ([]byte, error) {
	const procNet = "/proc/net/"
	if len(path) > len(procNet) && path[:len(procNet)] == procNet {
		path = "/proc/thread-self/net/" + path[len(procNet):]
	}
	var b []byte
	err := n.Do(func() (err error) {
		b, err = os.ReadFile(path)
		return err
	})
	return b, err
}

// NSOf is the network namespace of a process; Close lets go of it.
func NSOf(pid int) (*NS, error) {
	name := fmt.Sprintf("/proc/%d/ns/net", pid)
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	return &NS{Name: name, f: f}, nil
}

// Close lets go of a namespace that NSOf has opened.
func (n *NS) Close() error { return n.f.Close() }
