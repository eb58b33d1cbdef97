package isolated

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ztun/admin"
	"ztun/cmd/attach"
	"ztun/tun"
	"ztun/tun/steer"
	"ztun/tun/tuntest/nslab"
)

// Between two lives of the daemon nobody who calls a pod is refused, and a life that has come to nothing leaves it so.
// The last pod's end takes the device along.
func TestBetweenLives(t *testing.T) {
	node, ns := nslab.New(t), nslab.New(t)
	devices := func(n *Node, want string) {
		t.Helper()
		if err := n.Close(); err != nil {
			t.Error(err)
		}
		var have []string
		for _, dev := range []string{"ztun-node", steer.LiveTUN} {
			if strings.Contains(node.IP(t, "link"), dev) {
				have = append(have, dev)
			}
		}
		if got := strings.Join(have, " "); got != want {
			t.Errorf("devices %q, want %q", got, want)
		}
	}
	silent := func(to ...string) {
		t.Helper()
		for _, to := range to {
			err := node.Do(func() error {
				c, err := net.DialTimeout("tcp", to, 100*time.Millisecond)
				if err == nil {
					c.Close()
				}
				return err
			})
			var ne net.Error
			if !errors.As(err, &ne) || !ne.Timeout() {
				t.Errorf("%s: %v", to, err)
			}
		}
	}

	devices(openNodeIn(t, node), "")

	n := openNodeIn(t, node)
	ip := netip.MustParseAddr
	at, err := n.Attach(t.Context(), attach.Pod{PodSpec: admin.PodSpec{NetNS: ns.Path(),
		IPs: []netip.Addr{ip("10.91.1.2"), ip("fd91:0:0:1::2")}}}, nobody{})
	if err != nil {
		t.Fatal(err)
	}
	if err := at.Capture(t.Context()); err != nil {
		t.Fatal(err)
	}
	node.IP(t, "addr", "add", "10.91.1.1/32", "dev", "lo")
	node.IP(t, "addr", "add", "fd91:0:0:1::1/128", "dev", "lo")
	at.Silence()
	n.Leave()
	at.Stop()
	all := []string{"10.91.1.2:9000", "10.91.1.2:15008", "[fd91:0:0:1::2]:9000", "[fd91:0:0:1::2]:15008"}
	silent(all...)
	devices(n, "ztun-node")
	silent(all...)

	n = openNodeIn(t, node) // which never comes to the pod
	silent(all...)
	devices(n, "ztun-node")
	silent(all...)

	n = openNodeIn(t, node)
	if err := n.Sweep(nil); err != nil {
		t.Error(err)
	}
	devices(n, "")
}

// The node's device of a daemon whose record is lost is found, and taken away.
func TestUndoWithoutRecord(t *testing.T) {
	node := nslab.New(t)
	dev, err := tun.Open(tun.Options{Name: DefaultTUN, NetNS: node.NS, Persistent: true})
	if err != nil {
		t.Fatal(err)
	}
	dev.Close()
	none := filepath.Join(t.TempDir(), "host.json")
	left := func() (l Left) {
		t.Helper()
		if err := node.Do(func() (err error) { l, err = Look(nil, none); return err }); err != nil {
			t.Fatal(err)
		}
		return l
	}
	if l := left(); !slices.Equal(l.Devices, []string{DefaultTUN}) {
		t.Errorf("left: %+v", l)
	}
	if err := node.Do(func() error { return Undo(nil, none) }); err != nil {
		t.Error(err)
	}
	if l := left(); !l.Empty() {
		t.Errorf("left behind: %+v", l)
	}
}

// greeter serves a pod's mesh port.
type greeter struct{ attach.Handler }

func (greeter) ServeMesh(conn net.Conn, _ netip.AddrPort) {
	conn.Write([]byte{'x'})
	conn.Close()
}

// Who calls a pod's mesh port while the pod is being captured is served: those who have waited for the daemon come in
// just that moment.
func TestCalledWhileCaptured(t *testing.T) {
	node := nslab.New(t)
	node.IP(t, "addr", "add", "10.91.1.1/32", "dev", "lo")
	n := openNodeIn(t, node)
	served := atomic.Int64{}
	for range 5 {
		ns := nslab.New(t)
		at, err := n.Attach(t.Context(), attach.Pod{PodSpec: admin.PodSpec{NetNS: ns.Path(),
			IPs: []netip.Addr{netip.MustParseAddr("10.91.1.2")}}}, greeter{})
		if err != nil {
			t.Fatal(err)
		}
		var calls sync.WaitGroup
		var stop atomic.Bool
		for range 4 {
			calls.Go(func() {
				for !stop.Load() {
					err := node.Do(func() error {
						c, err := net.DialTimeout("tcp", "10.91.1.2:15008", 5*time.Millisecond)
						if err != nil {
							return nil // no answer yet
						}
						defer c.Close()
						c.SetDeadline(time.Now().Add(20 * time.Second))
						if _, err = io.ReadFull(c, make([]byte, 1)); err == nil {
							served.Add(1)
						}
						return err
					})
					if err != nil {
						t.Error(err)
					}
				}
			})
		}
		time.Sleep(5 * time.Millisecond)
		if err := at.Capture(t.Context()); err != nil {
			t.Error(err)
		}
		time.Sleep(5 * time.Millisecond)
		stop.Store(true)
		calls.Wait()
		if err := at.Remove(); err != nil {
			t.Error(err)
		}
	}
	if served.Load() == 0 {
		t.Error("nobody was served")
	}
}
