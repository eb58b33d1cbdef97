package nslab

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"ztun/tun/netns"
)

// NeedRoot fails the test loudly unless it runs as root; with ZTUN_TEST_NOROOT=1 it skips it instead.
func NeedRoot(tb testing.TB) {
	tb.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("ZTUN_TEST_NOROOT") == "1" {
		tb.Skip("SKIPPED: needs root, and ZTUN_TEST_NOROOT=1 is set")
	}
	tb.Fatal("\n*** this test makes network namespaces and TUN devices and NEEDS ROOT; run it as root, or set " +
		"ZTUN_TEST_NOROOT=1 to skip it ***")
}

// NS is a namespace of the lab.
type NS struct {
	*netns.NS
	Name string
}

// New makes a namespace known to `ip netns`, under a name of its own, that exists until the test ends. Its lo is up.
func New(tb testing.TB) *NS {
	tb.Helper()
	NeedRoot(tb)
	var b [4]byte
	rand.Read(b[:])
	name := fmt.Sprintf("zttun-%d-%s", os.Getpid(), hex.EncodeToString(b[:]))
	IP(tb, "netns", "add", name)
	tb.Cleanup(func() {
		if out, err := exec.Command("ip", "netns", "del", name).CombinedOutput(); err != nil &&
			!strings.Contains(string(out), "No such file") {
			tb.Errorf("ip netns del %s: %v: %s", name, err, out)
		}
	})
	ns, err := netns.OpenName(name)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { ns.Close() })
	// No duplicate address detection on devices to come: it takes seconds, and changes what State shows meanwhile.
	if err := ns.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0)
	}); err != nil {
		tb.Fatal(err)
	}
	n := &NS{NS: ns, Name: name}
	n.IP(tb, "link", "set", "lo", "up")
	return n
}

// IP runs ip(8) inside the namespace and returns what it prints.
func (n *NS) IP(tb testing.TB, args ...string) string {
	tb.Helper()
	return IP(tb, append([]string{"-n", n.Name}, args...)...)
}

// Settle waits until the namespace's IPv6 addresses are usable: the kernel hears late that a link is up, and makes the
// route to an address of its own when it gets to it.
func (n *NS) Settle(tb testing.TB) {
	tb.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		unusable := n.unusable(tb)
		if len(unusable) == 0 {
			return
		}
		if time.Now().After(end) {
			tb.Fatalf("%s: addresses do not become usable: %v", n.Name, unusable)
		}
	}
}

// unusable are IPv6 addresses, of links with a carrier, that are tentative or have no route yet.
func (n *NS) unusable(tb testing.TB) (out []string) {
	tb.Helper()
	var links []struct {
		Flags []string
		Addrs []struct {
			Family, Local string
			Tentative     bool
		} `json:"addr_info"`
	}
	var routes []struct{ Type, Dst string }
	for args, to := range map[string]any{"-j addr": &links, "-j -6 route show table local": &routes} {
		if text := n.IP(tb, strings.Fields(args)...); strings.TrimSpace(text) != "" {
			if err := json.Unmarshal([]byte(text), to); err != nil {
				tb.Fatalf("ip %s: %v: %s", args, err, text)
			}
		}
	}
	own := map[string]bool{}
	for _, r := range routes {
		own[r.Dst] = own[r.Dst] || r.Type == "local"
	}
	for _, l := range links {
		for _, a := range l.Addrs {
			if slices.Contains(l.Flags, "LOWER_UP") && a.Family == "inet6" && (a.Tentative || !own[a.Local]) {
				out = append(out, a.Local)
			}
		}
	}
	return out
}

// State is what ip(8) shows of the namespace's rules, routes, links and addresses, to be compared before and after.
func (n *NS) State(tb testing.TB) string {
	tb.Helper()
	n.Settle(tb)
	var b strings.Builder
	for _, args := range [][]string{
		{"rule"}, {"-6", "rule"}, {"route", "show", "table", "all"}, {"-6", "route", "show", "table", "all"}, {"link"},
		{"addr"},
	} {
		fmt.Fprintf(&b, "# ip %s\n%s", strings.Join(args, " "), n.IP(tb, args...))
	}
	// How a veth's peer is called (link-netns NAME, link-netnsid N) depends on who has asked for it before.
	return regexp.MustCompile(` link-netns(id)? \S+`).ReplaceAllString(b.String(), "")
}

// Join connects two namespaces by a veth pair; the ends are named dev and up, without addresses.
func Join(tb testing.TB, a, b *NS, dev string) {
	tb.Helper()
	IP(tb, "link", "add", dev, "netns", a.Name, "type", "veth", "peer", "name", dev, "netns", b.Name)
	a.IP(tb, "link", "set", dev, "up")
	b.IP(tb, "link", "set", dev, "up")
}

// IP runs ip(8) and returns what it prints.
func IP(tb testing.TB, args ...string) string {
	tb.Helper()
	cmd := exec.Command("ip", args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output() // ip(8) has remarks on its error output about peers of veths, now and then
	if err != nil {
		tb.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, stderr.String())
	}
	return string(out)
}
