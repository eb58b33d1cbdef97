package sandwich

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztun/tun"
	"ztun/tun/tuntest/nslab"
)

// Where eth0 stays in the pod and nobody serves S, no TCP gets by: not from the network, and not from the pod, from a
// socket bound to eth0 or one that asks for no route either. Each does before the pod is captured, and after.
func TestRulesHold(t *testing.T) {
	for name, make := range map[string]func(*testing.T, *nslab.NS, *nslab.NS){"bridge": bridgePod, "routed": routedPod} {
		t.Run(name, func(t *testing.T) {
			node, pod := nslab.New(t), nslab.New(t)
			make(t, node, pod)
			listeners := map[string]*net.TCPListener{}
			for addr, ns := range map[string]*nslab.NS{"node": node, "pod": pod} {
				if err := ns.Do(func() error {
					l, err := net.Listen("tcp", "[::]:9000")
					if err == nil {
						listeners[addr] = l.(*net.TCPListener)
					}
					return err
				}); err != nil {
					t.Fatal(err)
				}
				defer listeners[addr].Close()
			}
			witnesses := map[string][2]int{"node": witness(t, node), "pod": witness(t, pod)}
			bound := func(fd int) error { return unix.BindToDevice(fd, "eth0") }
			unrouted := func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DONTROUTE, 1) }
			tries := []struct {
				from     *nslab.NS
				at, to   string
				how      string
				set      func(fd int) error
				bridging bool // only where the node is on the pod's link
			}{
				{node, "pod", "10.92.1.2", "from the network", nil, false},
				{node, "pod", "fd92::2", "from the network", nil, false},
				{pod, "node", "10.92.1.1", "from the pod", nil, false},
				{pod, "node", "fd92::1", "from the pod", nil, false},
				{pod, "node", "10.92.1.1", "bound to eth0", bound, false},
				{pod, "node", "fd92::1", "bound to eth0", bound, false},
				{pod, "node", "10.92.1.1", "without a route", unrouted, true},
			}
			each := func(when string, arrive bool, patience time.Duration) {
				t.Helper()
				for _, c := range tries {
					if c.bridging && name != "bridge" {
						continue
					}
					ctx, cancel := context.WithTimeout(t.Context(), patience)
					d := net.Dialer{Control: func(_, _ string, rc syscall.RawConn) (err error) {
						if c.set != nil {
							err = errors.Join(rc.Control(func(fd uintptr) { err = c.set(int(fd)) }), err)
						}
						return err
					}}
					err := c.from.Do(func() error {
						conn, err := d.DialContext(ctx, "tcp", net.JoinHostPort(c.to, "9000"))
						if err == nil {
							conn.Close()
						}
						return err
					})
					cancel()
					l := listeners[c.at]
					l.SetDeadline(time.Now())
					if arrive {
						l.SetDeadline(time.Now().Add(10 * time.Second))
					}
					got, aerr := l.Accept()
					if aerr == nil {
						got.Close()
					} else if !errors.Is(aerr, os.ErrDeadlineExceeded) {
						t.Fatal(aerr)
					}
					if arrive && (err != nil || aerr != nil) {
						t.Fatalf("%s: %s, to %s: %v, %v", when, c.how, c.to, err, aerr)
					}
					if n := segments(t, witnesses[c.at], 9000); !arrive && (err == nil || aerr == nil || n > 0) {
						t.Errorf("%s: %s, to %s: got by; %d segments", when, c.how, c.to, n)
					}
				}
			}
			each("before", true, 20*time.Second)
			ns := Namespaces{S: sandwich(t), Pod: pod.NS}
			f, err := Read(pod.NS, "eth0")
			if err != nil {
				t.Fatal(err)
			}
			p, err := Rules(f, Config{DNS: true, Native: true})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := Apply(t.Context(), p, ns); err != nil {
				t.Fatal(err)
			}
			for _, w := range witnesses { // the ends of the connections before
				segments(t, w, 9000)
			}
			each("captured", false, 300*time.Millisecond)
			if _, err := Apply(t.Context(), UndoRules(f), ns); err != nil {
				t.Fatal(err)
			}
			each("undone", true, 20*time.Second)
		})
	}
}

// witness are raw sockets that see what a namespace's TCP is given, of both families.
func witness(t *testing.T, ns *nslab.NS) (fds [2]int) {
	t.Helper()
	if err := ns.Do(func() (err error) {
		for i, family := range []int{unix.AF_INET, unix.AF_INET6} {
			fds[i], err = unix.Socket(family, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
			if err != nil {
				return err
			}
			t.Cleanup(func() { unix.Close(fds[i]) })
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return fds
}

// segments counts what a witness has seen for a port since the last time.
func segments(t *testing.T, fds [2]int, port uint16) (n int) {
	t.Helper()
	b := make([]byte, 1<<16)
	for i, fd := range fds {
		for {
			l, err := unix.Read(fd, b)
			if errors.Is(err, unix.EAGAIN) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			p := b[:l]
			if i == 0 { // with its IPv4 header
				p = p[int(p[0]&0xf)*4:]
			}
			if binary.BigEndian.Uint16(p[2:]) == port {
				n++
			}
		}
	}
	return n
}

// Where eth0 stays in the pod, a nameserver's answer comes to netstack, whose question it answers, although a socket of
// the pod's has asked the same from the same port; the pod's other datagrams stay the pod's, and those to a nameserver
// in it that is asked from port 53.
func TestRulesAnswers(t *testing.T) {
	node, pod := nslab.New(t), nslab.New(t)
	bridgePod(t, node, pod)
	node.Settle(t)
	pod.Settle(t)
	ns := Namespaces{S: sandwich(t), Pod: pod.NS}
	f, err := Read(pod.NS, "eth0")
	if err != nil {
		t.Fatal(err)
	}
	p, err := Rules(f, Config{DNS: true, Native: true})
	if err != nil {
		t.Fatal(err)
	}
	up, err := tun.Open(tun.Options{Name: Net, NetNS: ns.S, MTU: f.MTU, Persistent: true, Plain: true})
	if err != nil {
		t.Fatal(err)
	}
	came, ended := make(chan string, 256), make(chan struct{}) // where a datagram came to, and what it says
	go func() {
		defer close(ended)
		for b := make([]byte, tun.MaxPacket); ; {
			n, err := up.ReadPacket(&tun.VNetHdr{}, [][]byte{b})
			if err != nil {
				return
			}
			if _, text, ok := bytes.Cut(b[:n], []byte("datagram ")); ok {
				came <- "netstack: datagram " + string(text)
			}
		}
	}()
	defer func() { up.Close(); <-ended }()
	if _, err := Apply(t.Context(), p, ns); err != nil {
		t.Fatal(err)
	}
	for _, at := range [][2]string{{"10.92.1.1", "10.92.1.2"}, {"fd92::1", "fd92::2"}} {
		for _, c := range [][3]string{{"53", "40000", "netstack"}, {"53", "500", "pod"}, {"5353", "40001", "pod"}} {
			there, here := udpAddr(t, at[0], c[0]), udpAddr(t, at[1], c[1])
			var in, out *net.UDPConn
			if err := errors.Join(
				pod.Do(func() (err error) { in, err = net.DialUDP("udp", here, there); return err }),
				node.Do(func() (err error) { out, err = net.ListenUDP("udp", there); return err })); err != nil {
				t.Fatal(err)
			}
			read := make(chan struct{})
			go func() {
				defer close(read)
				b := make([]byte, 100)
				for n, err := in.Read(b); !errors.Is(err, net.ErrClosed); n, err = in.Read(b) {
					if err == nil {
						came <- "pod: " + string(b[:n])
					}
				}
			}()
			text, got := fmt.Sprintf("datagram %v to %v", there, here), ""
			for end := time.Now().Add(20 * time.Second); !strings.HasSuffix(got, text) && time.Now().Before(end); {
				if _, err := out.WriteTo([]byte(text), here); err != nil {
					t.Fatal(err)
				}
				select {
				case got = <-came:
				case <-time.After(time.Second): // the first ones may be lost while addresses are asked for
				}
			}
			in.Close()
			out.Close()
			<-read
			if want := c[2] + ": " + text; got != want {
				t.Errorf("%q came, not %q", got, want)
			}
		}
	}
}

func udpAddr(t *testing.T, host, port string) *net.UDPAddr {
	t.Helper()
	a, err := net.ResolveUDPAddr("udp", net.JoinHostPort(host, port))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// A pod that rules cannot capture is refused: what it has beside eth0 would be captured, too, or lead past them.
func TestRulesRefuse(t *testing.T) {
	for what, plant := range map[string][]string{
		"a second device": {"link", "add", "net1", "up", "type", "veth", "peer", "name", "net2"},
		"a foreign rule":  {"rule", "add", "pref", "7", "lookup", "main"},
	} {
		node, pod := nslab.New(t), nslab.New(t)
		bridgePod(t, node, pod)
		pod.IP(t, plant...)
		f, err := Read(pod.NS, "eth0")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Rules(f, Config{}); !errors.Is(err, ErrUnfit) {
			t.Errorf("%s: %v", what, err)
		}
	}
}
