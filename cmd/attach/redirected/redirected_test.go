package redirected_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztun/admin"
	"ztun/admin/fdstore"
	"ztun/cmd/attach"
	"ztun/cmd/attach/redirected"
	"ztun/proxy"
	"ztun/proxy/fair"
	"ztun/proxy/refusal"
	"ztun/proxy/rescue"
	"ztun/test/lab"
	"ztun/tun/netns"
	"ztun/tun/tuntest/nslab"
)

const patience = 20 * time.Second

// world is a pod as a CNI and istio-cni leave it, and a peer at the other end of its eth0.
type world struct {
	pod, peer *nslab.NS
}

func newWorld(t *testing.T) world {
	t.Helper()
	w := world{nslab.New(t), nslab.New(t)}
	w.pod.IP(t, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", w.peer.Name)
	for i, ns := range []*nslab.NS{w.pod, w.peer} {
		ns.IP(t, "link", "set", "eth0", "up")
		ns.IP(t, "addr", "add", fmt.Sprintf("10.7.0.%d/24", i+1), "dev", "eth0")
		ns.IP(t, "addr", "add", fmt.Sprintf("fd07::%d/64", i+1), "dev", "eth0", "nodad")
	}
	for _, c := range lab.IstioRules(true) {
		args := append([]string{"netns", "exec", w.pod.Name}, c...)
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", c, err, out)
		}
	}
	return w
}

func kindOf(t *testing.T) *redirected.Kind { return kindWith(t, nil) }

func kindWith(t *testing.T, store *fdstore.Store) *redirected.Kind {
	t.Helper()
	report := fair.NewReport(slog.New(slog.DiscardHandler))
	return redirected.New(attach.Options{IPv6: true, Socket: netns.SocketOptions{Mark: 0x539, ReusePort: true},
		Store:       store,
		Descriptors: attach.NewDescriptors(4096, report), Report: report, Panics: rescue.New(slog.New(slog.DiscardHandler)),
		Logger: func(string) *slog.Logger { return slog.New(slog.DiscardHandler) }}, false)
}

// relay is a Handler that carries what it gets on, as a proxy does that knows of no mesh.
type relay struct {
	name string
	att  attach.Attachment

	mu   sync.Mutex
	seen []string
}

func (r *relay) say(format string, a ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen = append(r.seen, fmt.Sprintf(format, a...))
}

func (r *relay) said() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := strings.Join(r.seen, ", ")
	r.seen = nil
	return s
}

func (r *relay) ServeOutbound(f proxy.Flow) {
	r.say("out %s>%s", f.Src().Addr(), f.Dst())
	up, err := r.att.DialPlain(context.Background(), f.Dst())
	r.carry(f, up, err)
}

func (r *relay) ServeProbe(f proxy.Flow) { r.ServePassthrough(f) }

func (r *relay) ServePassthrough(f proxy.Flow) {
	r.say("in %s>%s", f.Src().Addr(), f.Dst())
	up, err := r.att.DialApp(context.Background(), f.Src(), f.Dst())
	r.carry(f, up, err)
}

func (r *relay) carry(f proxy.Flow, up proxy.Conn, err error) {
	if err != nil {
		f.Refuse(refusal.HostUnreachable)
		return
	}
	defer up.Close()
	down, err := f.Accept()
	if err != nil {
		return
	}
	defer down.Close()
	go func() {
		io.Copy(up, down)
		up.CloseWrite()
	}()
	if _, err := io.Copy(down, up); err != nil {
		attach.Reset(down.(*net.TCPConn)) // as a proxy carries a reset on
	}
}

func (r *relay) ServeMesh(conn net.Conn, _ netip.AddrPort) {
	defer conn.Close()
	r.say("mesh")
	fmt.Fprintf(conn, "mesh of %s at %s for %s", r.name, conn.LocalAddr(), conn.RemoteAddr().(*net.TCPAddr).IP)
}

func (r *relay) ServeDNS(attach.Query)                                   {}
func (r *relay) AllowDatagram(bool, netip.AddrPort, netip.AddrPort) bool { return false }

// attachTo attaches the pod's namespace as a descriptor, as a node agent gives it.
func attachTo(t *testing.T, k *redirected.Kind, ns *nslab.NS, name string) (*relay, error) {
	t.Helper()
	f, err := os.Open("/var/run/netns/" + ns.Name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	spec := attach.Pod{PodSpec: admin.PodSpec{UID: name, Name: name, Namespace: "n"}, Label: "n/" + name, File: f}
	if err := k.Locate(&spec); err != nil {
		t.Fatal(err)
	}
	r := &relay{name: name}
	if r.att, err = k.Attach(t.Context(), spec, r); err != nil {
		return nil, err
	}
	t.Cleanup(func() { r.att.Remove() })
	if err := r.att.Capture(t.Context()); err != nil {
		t.Fatal(err)
	}
	return r, nil
}

// serve is an application: it says who calls, and to which of its addresses.
func serve(t *testing.T, ns *nslab.NS, port int) {
	t.Helper()
	var l net.Listener
	if err := ns.Do(func() (err error) {
		l, err = net.Listen("tcp", fmt.Sprintf("[::]:%d", port))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprintf(c, "%s", c.RemoteAddr().(*net.TCPAddr).IP)
			c.Close()
		}
	}()
}

// call connects and reads all that there is.
func call(t *testing.T, ns *nslab.NS, dst string) (string, error) {
	t.Helper()
	var c net.Conn
	if err := ns.Do(func() (err error) {
		c, err = net.DialTimeout("tcp", dst, patience)
		return err
	}); err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	b, err := io.ReadAll(c)
	return string(b), err
}

// Under istio-cni's own rules, in both families: what the application opens and what the network opens come with the
// destination that was meant, the application sees its client's own address and the network the pod's; 15008 comes as
// it is; and nothing goes round in circles.
func TestRedirected(t *testing.T) {
	w := newWorld(t)
	serve(t, w.peer, 80)
	serve(t, w.pod, 80)
	before := descriptors(t)
	r, err := attachTo(t, kindOf(t), w.pod, "a")
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(r.att.Addrs()); got != "[10.7.0.1 fd07::1]" {
		t.Errorf("its addresses are %s", got)
	}
	for _, c := range []struct {
		from      *nslab.NS
		dst, want string
		said      string
	}{
		{w.pod, "10.7.0.2:80", "10.7.0.1", "out 10.7.0.1>10.7.0.2:80"},
		{w.pod, "[fd07::2]:80", "fd07::1", "out fd07::1>[fd07::2]:80"},
		{w.peer, "10.7.0.1:80", "10.7.0.2", "in 10.7.0.2>10.7.0.1:80"},
		{w.peer, "[fd07::1]:80", "fd07::2", "in fd07::2>[fd07::1]:80"},
		{w.peer, "10.7.0.1:15008", "mesh of a at 10.7.0.1:15008 for 10.7.0.2", "mesh"},
		{w.peer, "[fd07::1]:15008", "mesh of a at [fd07::1]:15008 for fd07::2", "mesh"},
		{w.pod, "10.7.0.1:80", "10.7.0.1", ""}, // itself: the rules leave that alone
		{w.pod, "127.0.0.1:80", "127.0.0.1", ""},
		{w.peer, "10.7.0.1:15001", "", "in 10.7.0.2>10.7.0.1:15001"}, // what a proxy refuses by the port
	} {
		got, err := call(t, c.from, c.dst)
		if c.want != "" && (err != nil || got != c.want) || c.want == "" && err == nil {
			t.Errorf("%s: %q, %v, want %q", c.dst, got, err, c.want)
		}
		if s := r.said(); s != c.said {
			t.Errorf("%s: %q, want %q", c.dst, s, c.said)
		}
	}
	// Straight to a listener, whichever address it is called by: one reset, no circle.
	for _, dst := range []string{"10.7.0.1:15001", "[fd07::1]:15001", "127.0.0.1:15001", "[::1]:15006", "10.7.0.1:15006"} {
		if got, err := call(t, w.pod, dst); !errors.Is(err, syscall.ECONNRESET) || r.said() != "" {
			t.Errorf("%s: %q, %v", dst, got, err)
		}
	}
	// Nobody there: the kernel has accepted, so it is a reset.
	if got, err := call(t, w.pod, "10.7.0.2:81"); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a port without listener: %q, %v", got, err)
	}
	if err := r.att.Remove(); err != nil {
		t.Error(err)
	}
	if got, err := call(t, w.pod, "10.7.0.2:80"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("with the pod detached: %q, %v", got, err)
	}
	leftNone(t, before)
}

// descriptors is how many are open, but for the pipes that Go keeps to splice with.
func descriptors(t *testing.T) (n int) {
	t.Helper()
	const dir = "/proc/self/fd/"
	all, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		if to, err := os.Readlink(dir + f.Name()); err == nil && !strings.HasPrefix(to, "pipe:") {
			n++
		}
	}
	return n
}

// leftNone waits until no more descriptors are open than before: connections are closed by goroutines of their own.
func leftNone(t *testing.T, before int) {
	t.Helper()
	for end := time.Now().Add(patience); descriptors(t) > before; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Errorf("%d descriptors are open, %d were", descriptors(t), before)
			return
		}
	}
}

// Questions to any nameserver come to the pod's own listener at 15053, and what is asked upstream passes the rules.
func TestNames(t *testing.T) {
	w := newWorld(t)
	r, err := attachTo(t, kindOf(t), w.pod, "a")
	if err != nil {
		t.Fatal(err)
	}
	var upstream net.PacketConn
	if err := w.peer.Do(func() (err error) {
		upstream, err = net.ListenPacket("udp", "[::]:53")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer upstream.Close()
	answer := func(c net.PacketConn, with string) {
		b := make([]byte, 100)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			c.WriteTo([]byte(with+string(b[:n])), from)
		}
	}
	go answer(upstream, "upstream ")
	for _, at := range []string{"127.0.0.1:15053", "[::1]:15053"} {
		c, err := r.att.ListenPacket("udp", at)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		go answer(c, "proxy ")
	}
	ask := func(c net.Conn, err error) string {
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		c.Write([]byte("question"))
		b := make([]byte, 100)
		n, err := c.Read(b)
		if err != nil {
			t.Error(err)
		}
		return string(b[:n])
	}
	for _, dst := range []string{"10.7.0.2:53", "[fd07::2]:53"} {
		var c net.Conn
		err := w.pod.Do(func() (err error) {
			c, err = net.Dial("udp", dst)
			return err
		})
		if got := ask(c, err); got != "proxy question" {
			t.Errorf("the application at %s: %q", dst, got)
		}
		if got := ask(r.att.DialUDP(t.Context(), netip.MustParseAddrPort(dst))); got != "upstream question" {
			t.Errorf("the proxy at %s: %q", dst, got)
		}
	}
}

// Two daemons in one namespace, as while one is replaced by another: both are served, and when one begins to leave
// every connection finds the other, though the first has not let go of the pod yet.
func TestTwoAtOnce(t *testing.T) { replaced(t, kindOf(t)) }

// replaced has a kind, once it is used, leave a pod to another one.
func replaced(t *testing.T, old *redirected.Kind) {
	t.Helper()
	w := newWorld(t)
	serve(t, w.peer, 80)
	next := kindOf(t)
	a, err := attachTo(t, old, w.pod, "old")
	if err != nil {
		t.Fatal(err)
	}
	b, err := attachTo(t, next, w.pod, "next")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 200 {
		if i == 100 {
			old.Leave()
			a.said()
		}
		if got, err := call(t, w.pod, "10.7.0.2:80"); err != nil || got != "10.7.0.1" {
			t.Fatalf("call %d: %q, %v", i, got, err)
		}
	}
	if s := a.said(); s != "" {
		t.Errorf("who has left still serves: %s", s)
	}
	if b.said() == "" {
		t.Error("the new one has served nobody")
	}
	if _, err := attachTo(t, old, w.pod, "late"); !errors.Is(err, admin.ErrPodUnavailable) {
		t.Errorf("attached while leaving: %v", err)
	}
}

// A port that the application has taken: the error says which, it may be tried again, and nothing is left behind.
func TestPortTaken(t *testing.T) {
	w := newWorld(t)
	before := descriptors(t)
	var l net.Listener
	if err := w.pod.Do(func() (err error) {
		l, err = net.Listen("tcp", ":15001")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	k := kindOf(t)
	_, err := attachTo(t, k, w.pod, "a")
	if !errors.Is(err, admin.ErrPodUnavailable) || !errors.Is(err, unix.EADDRINUSE) ||
		!strings.Contains(err.Error(), "15001") {
		t.Errorf("attached: %v", err)
	}
	l.Close()
	leftNone(t, before)
	if _, err := attachTo(t, k, w.pod, "a"); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}
