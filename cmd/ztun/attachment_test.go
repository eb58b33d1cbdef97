package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"ztun/admin"
	"ztun/admin/ca"
	"ztun/admin/xds"
	"ztun/admin/zlog"
	"ztun/cmd/attach"
	"ztun/cmd/attach/attachtest"
	"ztun/proxy"
	"ztun/proxy/fair"
	"ztun/proxy/rescue"
	"ztun/proxy/resolve"
	"ztun/proxy/state"
)

// memoryDaemon is the daemon's own pod manager and proxies over the attachment that is in memory.
type memoryDaemon struct {
	*daemon
	net  *attachtest.Network
	pods *podManager
}

func newMemoryDaemon(t *testing.T, vars ...string) *memoryDaemon {
	t.Helper()
	filter, err := zlog.ParseFilter("off")
	if err != nil {
		t.Fatal(err)
	}
	log := zlog.New(zlog.Options{Writer: io.Discard, Control: zlog.NewControl(filter)})
	c := load(t, append([]string{"ISTIO_META_DNS_CAPTURE", "false"}, vars...)...)
	c.State.Dir = t.TempDir()
	d := &daemon{c: c, log: log, logger: log.Logger("ztun"), report: fair.NewReport(log.Logger("bounds")),
		panics:     rescue.New(log.Logger("ztun")),
		certs:      ca.NewManager(ca.ManagerOptions{Signer: ca.NewFake(), TTL: time.Hour}),
		handshakes: fair.NewTurns[proxy.Crypto](1, time.Millisecond, time.Millisecond),
		metrics:    proxy.NewMetrics(), policies: proxy.NewUnknownPolicies(false, log.Logger("proxy")),
		onDemandDNS: proxy.NewOnDemandDNS(),
		resolve:     resolve.New(resolve.Options{})}
	d.know = newKnowledge(func() *state.View { return d.loop.View() })
	d.loop = admin.NewLoop(admin.LoopOptions{Published: d.know.published})
	m := &memoryDaemon{daemon: d, net: attachtest.NewNetwork()}
	d.kind = m.net.Kind(attach.Options{MTU: 1500, IPv6: true, Stack: c.stack(), Report: d.report, Panics: d.panics,
		Logger: log.Logger})
	m.pods = newPodManager(c, d.kind, d, d.panics, log.Logger("pods"))
	d.pods = m.pods
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	work.Go(func() { d.certs.Run(ctx) })
	work.Go(func() { d.loop.Run(ctx) })
	work.Go(func() { d.know.follow(ctx, d.newState) })
	if err := d.kind.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		given := agentPods{m.pods, func() {}, func() {}}
		for _, uid := range given.Known() {
			if err := given.Detach(uid); err != nil {
				t.Error(err)
			}
		}
		for _, p := range m.pods.all() {
			if err := m.pods.Delete(context.Background(), p.spec.Namespace, p.spec.Name); err != nil {
				t.Error(err)
			}
		}
		d.kind.Close()
		cancel()
		work.Wait()
		log.Close(context.Background())
	})
	return m
}

// knows has the control side know two workloads of the mesh, one and two, a third outside, and the policies.
func (m *memoryDaemon) knows(t *testing.T, policies string) {
	t.Helper()
	l, err := xds.ParseLocal([]byte(`
workloads:
- {uid: one, name: one, namespace: n, serviceAccount: sa-one, trustDomain: td, workloadIps: [10.1.0.1], protocol: HBONE, services: {}}
- {uid: two, name: two, namespace: n, serviceAccount: sa-two, trustDomain: td, workloadIps: [10.1.0.2], protocol: HBONE, services: {}}
- {uid: three, name: three, namespace: n, serviceAccount: sa-three, trustDomain: td, workloadIps: [10.1.0.3], protocol: TCP, services: {}}
` + policies))
	if err != nil {
		t.Fatal(err)
	}
	if err := m.loop.Do(t.Context(), func() { m.loop.Publish(l.View("")) }); err != nil {
		t.Fatal(err)
	}
}

func specOf(name string, ips ...netip.Addr) admin.PodSpec {
	return admin.PodSpec{Name: name, Namespace: "n", ServiceAccount: "sa-" + name, NetNS: "host-" + name, IPs: ips}
}

// echo answers with what the application sees of its client, then with what it gets.
func echo(c net.Conn) {
	defer c.Close()
	fmt.Fprintf(c, "%s\n", c.RemoteAddr().(*net.TCPAddr).IP)
	io.Copy(c, c)
}

// ask says hello and returns all that comes back.
func ask(t *testing.T, from *attachtest.Host, dst string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	c, err := from.Dial(ctx, netip.MustParseAddrPort(dst))
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.WriteString(c, "hello"); err != nil {
		return "", err
	}
	if err := c.CloseWrite(); err != nil {
		return "", err
	}
	b, err := io.ReadAll(c)
	return string(b), err
}

// A whole connection through the daemon's own pod manager, by an attachment without devices, namespaces and root:
// over HBONE from one pod to the other, as the client's own address; refused by a policy, truthfully; and plaintext
// to what is not in the mesh. With and without the wire between the two pods it is the same.
func TestAttachmentInMemory(t *testing.T) {
	t.Run("by the wire", func(t *testing.T) { attachmentInMemory(t, "false", "true", 1, 1) })
	t.Run("relayed", func(t *testing.T) { attachmentInMemory(t, "true", "false", 0, 0) })
	t.Run("by a shortcut", func(t *testing.T) { attachmentInMemory(t, "true", "true", 0, 3) })
}

func attachmentInMemory(t *testing.T, relay, shortcut string, want, passed uint64) {
	m := newMemoryDaemon(t, "ZTUN_LOCAL_RELAY", relay, "ZTUN_SHORTCUTS", shortcut)
	addr := netip.MustParseAddr
	one, two, outside := m.net.Host("host-one", addr("10.1.0.1")), m.net.Host("host-two", addr("10.1.0.2")),
		m.net.Host("host-three", addr("10.1.0.3"))
	two.Listen(80, echo)
	outside.Listen(80, echo)
	m.knows(t, "")
	// Addresses are given, or read where the pod lives.
	for _, s := range []admin.PodSpec{specOf("one", addr("10.1.0.1")), specOf("two"), specOf("three")} {
		if err := m.pods.Add(t.Context(), s); err != nil {
			t.Fatal(err)
		}
	}
	got, err := ask(t, one, "10.1.0.2:80")
	if err != nil || got != "10.1.0.1\nhello" {
		t.Errorf("over HBONE: %q, %v", got, err)
	}
	tunnels := func() (n uint64) {
		for _, p := range m.pods.all() {
			n += p.proxy.Stats().Pool.Dials
		}
		return n
	}
	if tunnels() != want {
		t.Errorf("%d tunnels were made", tunnels())
	}
	if got, err := ask(t, one, "10.1.0.2:81"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("where nobody listens: %q, %v", got, err)
	}
	if got, err := ask(t, one, "10.1.0.3:80"); err != nil || got != "10.1.0.1\nhello" || tunnels() != want {
		t.Errorf("in plaintext: %q, %v, %d tunnels", got, err, tunnels())
	}
	// A connection that stands, and is cut by the policy.
	c, err := one.Dial(t.Context(), netip.MustParseAddrPort("10.1.0.2:80"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	m.knows(t, `
policies:
- {name: nobody, namespace: n, scope: Namespace, action: Deny, dryRun: false, rules: [[[{namespaces: [{Exact: n}]}]]]}
`)
	c.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.Copy(io.Discard, c); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection that was there: %v", err)
	}
	if got, err := ask(t, one, "10.1.0.2:80"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("denied by policy: %q, %v", got, err)
	}
	if n := len(m.pods.List()); n != 3 {
		t.Errorf("%d pods", n)
	}
	for _, p := range m.pods.all() {
		if n := p.att.Stats().ShortcutsBegun; p.spec.Name == "one" && n != passed {
			t.Errorf("%d connections went by a shortcut, not %d", n, passed)
		}
	}
	if tunnels() != want {
		t.Errorf("%d tunnels in the end", tunnels())
	}
	// A pod on its way out, or gone, is none to relay to.
	if m.pods.proxyAt(addr("10.1.0.2")) == nil || m.pods.proxyAt(addr("10.1.0.9")) != nil {
		t.Error("pods are not found by their addresses")
	}
	m.pods.pods["n/two"].stopping.Store(true)
	if m.pods.proxyAt(addr("10.1.0.2")) != nil {
		t.Error("a pod that is stopping is relayed to")
	}
	if err := m.pods.Delete(t.Context(), "n", "two"); err != nil {
		t.Fatal(err)
	}
	if _, ok := m.pods.at.Load(addr("10.1.0.2")); ok {
		t.Error("a pod that is gone is found by its address")
	}
}

// What /config_dump has of a pod's connections: in plaintext and over HBONE what the application called, inbound who
// came and what was reached, once however many streams a tunnel has.
func TestConnectionsInTheDump(t *testing.T) {
	m := newMemoryDaemon(t, "ZTUN_LOCAL_RELAY", "false")
	addr, at := netip.MustParseAddr, netip.MustParseAddrPort
	one, two, outside := m.net.Host("host-one", addr("10.1.0.1")), m.net.Host("host-two", addr("10.1.0.2")),
		m.net.Host("host-three", addr("10.1.0.3"))
	two.Listen(80, echo)
	outside.Listen(80, echo)
	m.knows(t, "")
	for _, s := range []admin.PodSpec{specOf("one"), specOf("two"), specOf("three")} {
		if err := m.pods.Add(t.Context(), s); err != nil {
			t.Fatal(err)
		}
	}
	for _, dst := range []string{"10.1.0.2:80", "10.1.0.2:80", "10.1.0.3:80"} {
		c, err := one.Dial(t.Context(), at(dst))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetReadDeadline(time.Now().Add(20 * time.Second))
		if _, err := c.Read(make([]byte, 1)); err != nil { // it stands at both ends
			t.Fatal(err)
		}
	}
	dumps := map[string]admin.PodDump{}
	for _, f := range m.podDumps() {
		d := f()
		dumps[d.Name] = d
	}
	unnamed := func(in []admin.ConnectionDump) (out []admin.ConnectionDump) {
		for _, c := range in {
			if c.Src.Addr() != addr("10.1.0.1") || c.Src.Port() == 0 {
				t.Errorf("source %v", c.Src)
			}
			c.Src = netip.AddrPort{}
			out = append(out, c)
		}
		slices.SortFunc(out, func(a, b admin.ConnectionDump) int { return a.ActualDst.Compare(b.ActualDst) })
		return out
	}
	mesh := admin.ConnectionDump{OriginalDst: at("10.1.0.2:80"), ActualDst: at("10.1.0.2:15008"), Protocol: "HBONE"}
	if got, want := unnamed(dumps["one"].Outbound), []admin.ConnectionDump{mesh, mesh,
		{OriginalDst: at("10.1.0.3:80"), ActualDst: at("10.1.0.3:80"), Protocol: "TCP"}}; !slices.Equal(got, want) {
		t.Errorf("outbound %+v", got)
	}
	if got, want := unnamed(dumps["two"].Inbound), []admin.ConnectionDump{{ActualDst: at("10.1.0.2:80"),
		Protocol: "HBONE"}}; !slices.Equal(got, want) {
		t.Errorf("inbound %+v", got)
	}
	if got, want := unnamed(dumps["three"].Inbound), []admin.ConnectionDump{{ActualDst: at("10.1.0.3:80"),
		Protocol: "TCP"}}; !slices.Equal(got, want) {
		t.Errorf("inbound in plaintext %+v", got)
	}
	for _, p := range m.pods.all() {
		in, out := p.proxy.Open()
		if want := map[string][2]int{"one": {0, 3}, "two": {2, 0}, "three": {1, 0}}[p.spec.Name]; [2]int{in, out} != want {
			t.Errorf("%s: %d inbound, %d outbound", p.spec.Name, in, out)
		}
	}
	if len(dumps["one"].Inbound) != 0 || len(dumps["two"].Outbound) != 0 {
		t.Errorf("%+v", dumps)
	}
}

// A pod is known by its uid: two of one name are there at once, each under a label of its own, and neither the
// address nor the namespace of the other can be had.
func TestPodsAreKnownByUID(t *testing.T) {
	m := newMemoryDaemon(t)
	addr := netip.MustParseAddr
	m.net.Host("host-one", addr("10.1.0.1"))
	later := m.net.Host("later", addr("10.1.0.9"))
	m.net.Host("third", addr("10.1.0.8"))
	m.knows(t, "")
	first := specOf("one")
	first.UID = "uid-1"
	if err := m.pods.Add(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	second := first
	second.UID, second.NetNS = "uid-2", "later"
	for _, wrong := range []struct {
		change func(*admin.PodSpec)
		say    string
	}{
		{func(s *admin.PodSpec) { s.UID = "uid-1" }, "attached already"},
		{func(s *admin.PodSpec) { s.NetNS, s.IPs = "host-one", []netip.Addr{addr("10.1.0.7")} }, "belongs to pod n/one"},
		{func(s *admin.PodSpec) { s.IPs = []netip.Addr{addr("10.1.0.1")} }, "10.1.0.1 is in use by pod n/one"},
	} {
		s := second
		wrong.change(&s)
		if err := m.pods.Add(t.Context(), s); !errors.Is(err, admin.ErrPodConflict) ||
			!strings.Contains(err.Error(), wrong.say) {
			t.Errorf("%v, want a conflict that says %q", err, wrong.say)
		}
	}
	if err := m.pods.Add(t.Context(), second); err != nil {
		t.Fatal(err)
	}
	var labels []string
	for _, p := range m.pods.all() {
		labels = append(labels, p.label)
	}
	slices.Sort(labels)
	if want := []string{"n/one", "n/one@uid-2"}; !slices.Equal(labels, want) {
		t.Errorf("labels %q, want %q", labels, want)
	}
	// By name it cannot be said which is meant.
	if err := m.pods.Delete(t.Context(), "n", "one"); !errors.Is(err, admin.ErrPodConflict) ||
		!strings.Contains(err.Error(), "uid-1, uid-2") {
		t.Errorf("delete by name: %v", err)
	}
	// By its uid it can. What of the other is asked for meanwhile is still there.
	if err := m.pods.DeleteUID(t.Context(), "uid-9"); !errors.Is(err, admin.ErrPodNotFound) {
		t.Errorf("delete of another uid: %v", err)
	}
	if err := m.pods.DeleteUID(t.Context(), "uid-1"); err != nil {
		t.Fatal(err)
	}
	if all := m.pods.List(); len(all) != 1 || all[0].UID != "uid-2" {
		t.Errorf("after the delete of uid-1: %+v", all)
	}
	// Its addresses are those of its namespace, where none are given.
	first.IPs = nil
	if err := m.pods.Add(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	if p := m.pods.pods["uid-1"]; p == nil || !slices.Equal(p.spec.IPs, []netip.Addr{addr("10.1.0.1")}) {
		t.Errorf("%+v", p)
	}
	// A namespace that came as a descriptor is not in the list for the next daemon; the others are, with their uid.
	third := specOf("three")
	third.UID, third.NetNS = "uid-3", ""
	file, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	m.net.Host(file.Name(), addr("10.1.0.7"))
	m.pods.op.Lock()
	err = errors.Join(m.pods.attach(t.Context(), attach.Pod{PodSpec: third, File: file}), m.pods.save())
	m.pods.op.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(m.pods.stateFile())
	if err != nil {
		t.Fatal(err)
	}
	saved, err := readSaved(b)
	if err != nil || len(saved) != 2 || saved[0].UID+saved[1].UID != "uid-1uid-2" && saved[0].UID+saved[1].UID !=
		"uid-2uid-1" {
		t.Errorf("saved %s, %v", b, err)
	}
	// The one whose namespace ends is let go of; the other goes on.
	later.Vanish()
	m.pods.dropVanished()
	if all := m.pods.List(); len(all) != 2 || slices.ContainsFunc(all, func(p admin.PodStatus) bool {
		return p.UID == "uid-2"
	}) {
		t.Errorf("after one has vanished: %+v", all)
	}
}
