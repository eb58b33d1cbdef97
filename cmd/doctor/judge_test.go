package doctor

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"maps"
	"math/big"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"ztun/tun/sandwich"
	"ztun/tun/steer"
)

var now = time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)

// issue makes a certificate valid from and to, hours from now, and the root that signed it.
func issue(t *testing.T, from, to time.Duration) (leaf, root *x509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	make := func(tmpl, parent *x509.Certificate) *x509.Certificate {
		der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"},
		NotBefore: now.Add(-1000 * time.Hour), NotAfter: now.Add(1000 * time.Hour), IsCA: true, BasicConstraintsValid: true}
	root = make(tmpl, tmpl)
	return make(&x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: now.Add(from), NotAfter: now.Add(to)}, root),
		root
}

// healthy is a node on which everything is as it should be, and much of what is allowed is there.
func healthy(t *testing.T) Facts {
	leaf, root := issue(t, -time.Hour, 23*time.Hour)
	return Facts{
		Now: now,
		Host: Host{
			Kernel: "6.1.0-13-amd64", NodeTUN: "ztun-node", TUNFlags: iffVNetHdr | 0x1001, Conntrack: [2]int{100, 65536},
			Sysctls: map[string]string{
				"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1", "net/ipv4/conf/all/rp_filter": "2",
				"net/ipv4/conf/ztun-node/rp_filter": "0",
				"net/ipv4/ip_local_port_range":      "32768\t60999", "net/ipv6/conf/eth0/accept_ra": "0",
			},
			Seen: steer.Seen{
				Links: []steer.SeenLink{{Name: "eth0", Up: true, MTU: 1500, Default: true},
					{Name: "ztun-node", TUN: true, Up: true, MTU: 65535}},
				Rules: []steer.SeenRule{{Pref: 0, Table: 255, Text: "local"}, {Ours: true, Pref: 10, Table: 15008},
					{Pref: 32766, Table: 254}},
				Pods: []netip.Addr{netip.MustParseAddr("10.1.0.2")},
			},
			Filters: []string{"iptables-save: -A INPUT -p tcp -m tcp --dport 22 -j ACCEPT",
				"iptables-save: -A POSTROUTING -s 10.9.0.0/16 -o eth0 -j MASQUERADE", "nft: tcp dport 8080 drop"},
		},
		Control: []Upstream{{Variable: "XDS_ADDRESS", Address: "istiod:15012",
			Token: Token{Path: "/token", Expires: now.Add(time.Hour)}}},
		Certs: []Cert{{Identity: "spiffe://cluster.local/ns/default/sa/a", State: "Available",
			Chain: []*x509.Certificate{leaf}, Roots: []*x509.Certificate{root}, Domain: "cluster.local"}},
		Peers: []Peer{{Node: "n2", Addr: netip.MustParseAddrPort("10.1.1.2:15008"), MTU: 1500}},
		Pods:  []Pod{{Name: "default/a", State: "Up", Ref: "/var/run/netns/a"}},
	}
}

func TestHealthyIsSilent(t *testing.T) {
	for _, f := range []Facts{healthy(t), {}} { // and nothing seen is nothing wrong
		if got := Judge(f); len(got) != 0 {
			t.Errorf("%+v", got)
		}
	}
}

// TestPlantedFaults: each fault alone is found, once, and named with what mends it.
func TestPlantedFaults(t *testing.T) {
	sysctl := func(path, value string) func(*Facts) {
		return func(f *Facts) { f.Host.Sysctls = maps.Clone(f.Host.Sysctls); f.Host.Sysctls[path] = value }
	}
	filter := func(line string) func(*Facts) {
		return func(f *Facts) { f.Host.Filters = append(f.Host.Filters, line) }
	}
	cert := func(from, to time.Duration) func(*Facts) {
		return func(f *Facts) {
			leaf, root := issue(t, from, to)
			f.Certs[0].Chain, f.Certs[0].Roots = []*x509.Certificate{leaf}, []*x509.Certificate{root}
		}
	}
	podPlan := steer.PodPlan(steer.PodConfig{Name: "default/a", Addrs: []netip.Addr{netip.MustParseAddr("10.1.0.2")},
		TUN: "ztun0", NodeTUN: "ztun-node"})
	nodePlan := steer.NodePlan(steer.NodeConfig{TUN: "ztun-node", IPv6: true})
	pick := func(p steer.Plan, part string) []steer.Step {
		i := slices.IndexFunc(p.Steps, func(s steer.Step) bool { return strings.Contains(s.Do.String(), part) })
		if i < 0 {
			t.Fatalf("no step with %q in\n%s", part, p)
		}
		return p.Steps[i : i+1]
	}
	between, err := sandwich.New(sandwich.Facts{Dev: "eth0", MAC: "0a:58:0a:01:00:02", MTU: 1500,
		Addrs: []sandwich.Addr{{Dev: "eth0", Prefix: netip.MustParsePrefix("10.1.0.2/24")}}}, sandwich.Config{Native: true})
	if err != nil {
		t.Fatal(err)
	}
	lacks := func(part string) func(*Facts) {
		return func(f *Facts) {
			f.Pods[0].Between = "ztun-4-7"
			for _, s := range between.Steps {
				if strings.Contains(s.Do.String(), part) {
					f.Pods[0].Lacks = append(f.Pods[0].Lacks, s)
					return
				}
			}
			t.Fatalf("no step with %q in\n%s", part, between)
		}
	}
	type fault struct {
		name       string
		plant      func(*Facts)
		area       string
		what, mend string // parts of the finding's
	}
	faults := []fault{
		{"old kernel", func(f *Facts) { f.Host.Kernel = "4.9.0-19" }, "host", "kernel is too old", "uname"},
		{"no tun", func(f *Facts) { f.Host.TUN = "no such device" }, "host", "TUN devices cannot be made", "modprobe tun"},
		{"slow node device", func(f *Facts) { f.Host.TUNFlags = 0x1001 }, "host", "ztun-node is without offloads", "offload"},
		{"taken port", func(f *Facts) { f.Host.Taken = []uint16{15008} }, "host", "port 15008 is taken", "ss -ltnp"},
		{"conntrack full", func(f *Facts) {
			f.Host.Conntrack = [2]int{65000, 65536}
		}, "host", "65000 of 65536", "nf_conntrack_max=262144"},
		{"no forwarding", sysctl("net/ipv4/ip_forward", "0"), "host", "IPv4 forwarding is off",
			"sysctl -w net.ipv4.ip_forward=1"},
		{"no IPv6 forwarding", sysctl("net/ipv6/conf/all/forwarding", "0"), "host", "IPv6 forwarding is off",
			"sysctl -w net.ipv6.conf.all.forwarding=1"},
		{"strict rp_filter", sysctl("net/ipv4/conf/all/rp_filter", "1"), "host", "strict reverse path filtering",
			"sysctl -w net.ipv4.conf.ztun-node.rp_filter=2"},
		{"local ports", sysctl("net/ipv4/ip_local_port_range", "1024\t65535"), "host", "overlap with the mesh's",
			"sysctl -w net.ipv4.ip_local_port_range='1024 60999'"},
		{"accept_ra", sysctl("net/ipv6/conf/eth0/accept_ra", "1"), "host", "device eth0 takes router advertisements",
			"accept_ra=2"},
		{"rule gone", func(f *Facts) {
			f.Host.Missing = pick(nodePlan, "pref 10")
		}, "host", "plan is not in force", "ip rule add pref 10"},
		{"foreign rule", func(f *Facts) {
			f.Host.Seen.Rules = append(f.Host.Seen.Rules, steer.SeenRule{Pref: 5, Table: 100, Text: "from all lookup 100"})
		}, "host", "from all lookup 100", "ip rule del pref 5"},
		{"foreign IPv6 rule", func(f *Facts) {
			f.Host.Seen.Rules = append(f.Host.Seen.Rules, steer.SeenRule{V6: true, Pref: 5, Table: 100})
		}, "host", "in the way", "ip -6 rule del pref 5"},
		{"dropped port", filter("iptables-save: -A INPUT -p tcp -m tcp --dport 15008 -j DROP"), "host",
			"refuses a port of the mesh", "iptables -S"},
		{"dropped port, nft", filter("nft: tcp dport 15008 reject with tcp reset"), "host", "refuses a port of the mesh",
			"nft -a list ruleset"},
		{"redirected port", filter("ip6tables-save: -A PREROUTING -p tcp -m tcp --dport 15008 -j REDIRECT --to-ports 9999"),
			"host", "a rule about a port of the mesh", "ip6tables -S"},
		{"istio's redirection", filter("iptables-save: -A ISTIO_OUTPUT -p tcp -j REDIRECT --to-ports 15001"), "host",
			"Istio's redirection", "iptables -S"},
		{"istio-cni's SNAT",
			filter("iptables-save: -A ISTIO_POSTRT -m owner --socket-exists -p tcp -m set --match-set istio-inpod-probes-v4 " +
				"dst -j SNAT --to-source 169.254.7.127"), "host", "istio-cni has a rule", "iptables -S"},
		{"masqueraded pod", filter("iptables-save: -A POSTROUTING -s 10.1.0.2/32 -j MASQUERADE"), "host",
			"source address of a captured pod is rewritten", "iptables -S"},
		{"dropped device", filter("iptables-save: -A FORWARD -i ztun-node -j DROP"), "host", "goes by ztun's device",
			"iptables -S"},
		{"no daemon", func(f *Facts) { f.Daemon.Error = "no control socket" }, "host", "does not answer", "ztun proxy"},
		{"not ready", func(f *Facts) { f.Daemon.Ready = "pending: certificates" }, "host", "pending: certificates", "15021"},
		{"no roots", func(f *Facts) {
			f.Control[0].Roots = "no such file"
		}, "control plane", "no roots for istiod:15012", "XDS_ROOT_CA"},
		{"no token", func(f *Facts) {
			f.Control[0].Token.Error = "no such file"
		}, "control plane", "token cannot be read", "ls -l /token"},
		{"token ended", func(f *Facts) {
			f.Control[0].Token.Expires = now.Add(-time.Minute)
		}, "control plane", "has ended at 2026-11-28T11:59:00Z", "ls -l /token"},
		{"control plane away", func(f *Facts) {
			f.Control[0].Error = "connection refused"
		}, "control plane", "cannot be reached: connection refused", "nc -vz istiod 15012"},
		{"foreign control plane", func(f *Facts) {
			f.Control[0].Error = "x509: certificate signed by unknown authority"
		}, "control plane", "is refused", "openssl s_client"},
		{"clock behind", func(f *Facts) {
			f.Control[0].Error = "x509: certificate has expired or is not yet valid: current time A is before B"
		}, "control plane", "clocks differ", "timedatectl"},
		{"control plane's certificate ended", func(f *Facts) {
			f.Control[0].Error = "x509: certificate has expired or is not yet valid: current time A is after B"
		}, "control plane", "is refused", "openssl s_client"},
		{"no certificate", func(f *Facts) {
			f.Certs[0].State, f.Certs[0].Chain = "Unavailable: denied", nil
		}, "certificates", "has no certificate: denied", "config_dump"},
		{"certificate ended", cert(-25*time.Hour, -time.Hour), "certificates", "has ended", "config_dump"},
		{"certificate of the future", cert(time.Hour, 25*time.Hour), "certificates", "valid only from", "timedatectl"},
		{"certificate not renewed", cert(-23*time.Hour, time.Hour), "certificates", "has not been renewed", "config_dump"},
		{"another root", func(f *Facts) {
			_, root := issue(t, 0, 0)
			f.Certs[0].Roots = []*x509.Certificate{root}
		}, "certificates", "does not lead to the roots", "config_dump"},
		{"another trust domain", func(f *Facts) {
			f.Certs[0].Domain = "example.org"
		}, "certificates", "not of the trust domain example.org", "trust_domain"},
		{"peer away", func(f *Facts) {
			f.Peers[0].Error = "i/o timeout"
		}, "peers", "node n2 cannot be reached at 10.1.1.2:15008", "nc -vz 10.1.1.2 15008"},
		{"small MTU", func(f *Facts) { f.Peers[0].MTU = 600 }, "peers", "600 bytes", "tracepath"},
		{"pod failed", func(f *Facts) {
			f.Pods[0].State, f.Pods[0].Error = "Failed", "no namespace"
		}, "pods", "is Failed: no namespace", "ztun pod list"},
		{"pod gone", func(f *Facts) {
			f.Pods[0].NetNS = "no such file"
		}, "pods", "cannot be opened", "ztun pod del --namespace default --name a"},
		{"pod's device down", func(f *Facts) {
			f.Pods[0].Missing = pick(podPlan, "link set ztun0")
		}, "pods", "ztun0", "nsenter --net=/var/run/netns/a ip link set ztun0 up"},
		{"pod's default route gone", func(f *Facts) {
			f.Pods[0].Missing = pick(podPlan, "default")
		}, "pods", "default dev ztun0", "nsenter --net=/var/run/netns/a ip route"},
		{"route to the pod gone", func(f *Facts) {
			f.Pods[0].Missing = pick(podPlan, "10.1.0.2/32 dev ztun-node")
		}, "pods", "in the node's namespace", "ip route"},
		{"a rule of a steered pod", lacks("pref 20"), "pods", "in ztun-4-7",
			"nsenter --net=/var/run/netns/ztun-4-7 sh -c 'ip rule add pref 20 to 10.1.0.2 iif eth0 ipproto tcp lookup 15006'"},
		{"a foreign rule of a steered pod", lacks("rule del"), "pods", "whatever is not in this plan", "ztun pod del"},
		{"a steered pod's route", lacks("src 10.1.0.2"), "pods", "in the pod's namespace",
			"nsenter --net=/var/run/netns/a sh -c 'ip route add default via 169.254.1.1"},
		{"a steered pod's namespace", func(f *Facts) { f.Pods[0].Between, f.Pods[0].Lost = "ztun-4-7", true }, "pods",
			"ztun-4-7 between it and the network is gone", "ztun pod del --namespace default --name a, and add it again"},
		{"no DNS", func(f *Facts) { f.Pods[0].DNS = "i/o timeout" }, "pods", "no answer to a DNS query", "dig"},
		{"slow pod", func(f *Facts) {
			f.Pods[0].Slow = "the kernel refuses TCPv4 super-packets"
		}, "pods", "without offloads: the kernel refuses", "uname"},
	}
	if len(faults) < 20 {
		t.Fatalf("%d faults", len(faults))
	}
	for _, p := range faults {
		t.Run(p.name, func(t *testing.T) {
			f := healthy(t)
			p.plant(&f)
			got := Judge(f)
			if len(got) != 1 {
				t.Fatalf("%d findings: %+v", len(got), got)
			}
			if g := got[0]; g.Area != p.area || !strings.Contains(g.What, p.what) || !strings.Contains(g.Mend, p.mend) ||
				g.Why == "" {
				t.Errorf("%+v", g)
			}
		})
	}
}

// TestOnPurpose: what the configuration asks for is no fault.
func TestOnPurpose(t *testing.T) {
	f := healthy(t)
	f.Host.PlainTUN, f.Host.TUNFlags, f.Pods[0].Slow = true, 0x1001, "asked for"
	if got := Judge(f); len(got) != 0 {
		t.Errorf("%+v", got)
	}
}

// Where istio-cni's rules capture the pods they are no fault, but what refuses the mesh's port is.
func TestRedirectedFilters(t *testing.T) {
	f := healthy(t)
	f.Host.Redirected = true
	f.Host.Filters = append(f.Host.Filters, "iptables-save: -A PREROUTING -p tcp -j ISTIO_PRERT",
		"iptables-save: -A ISTIO_POSTRT -m owner --socket-exists -p tcp -j SNAT --to-source 169.254.7.127")
	if got := Judge(f); len(got) != 0 {
		t.Errorf("of a healthy node: %+v", got)
	}
	f.Host.Filters = append(f.Host.Filters, "iptables-save: -A INPUT -p tcp -m tcp --dport 15008 -j DROP")
	if got := Judge(f); len(got) != 1 || !strings.Contains(got[0].What, "refuses a port of the mesh") {
		t.Errorf("with the mesh's port refused: %+v", got)
	}
}
