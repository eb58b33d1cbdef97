package doctor

import (
	"cmp"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"ztun/tun/sandwich"
	"ztun/tun/steer"
)

// Finding is something that is wrong.
type Finding struct {
	Area string `json:"area"` // host, control plane, certificates, peers, pods
	What string `json:"what"`
	Why  string `json:"why"`  // why it matters
	Mend string `json:"mend"` // a command where one mends it, else what to look at
}

// Judge says what is wrong, in the order host, control plane, certificates, peers, pods. It is pure.
func Judge(f Facts) []Finding {
	var out []Finding
	add := func(area, mend, why, format string, args ...any) {
		out = append(out, Finding{area, fmt.Sprintf(format, args...), why, mend})
	}
	f.Host.judge(func(mend, why, format string, args ...any) { add("host", mend, why, format, args...) })
	if f.Daemon.Error != "" {
		add("host", "ztun proxy", "nothing is captured, and pods that were captured reach nothing: they fail closed",
			"the daemon does not answer: %s", f.Daemon.Error)
	}
	if f.Daemon.Ready != "" {
		add("host", "curl http://127.0.0.1:15021/healthz/ready?verbose", "the node is not to get pods until it is",
			"the daemon is not ready: %s", f.Daemon.Ready)
	}
	for _, u := range f.Control {
		u.judge(f.Now, func(mend, why, format string, args ...any) { add("control plane", mend, why, format, args...) })
	}
	for _, c := range f.Certs {
		c.judge(f.Now, func(mend, why, format string, args ...any) { add("certificates", mend, why, format, args...) })
	}
	for _, p := range f.Peers {
		if p.Error != "" {
			why := "connections to the pods of that node fail: something between the nodes drops TCP port 15008, or ztun is " +
				"not running there"
			if p.Workload != "" {
				why = fmt.Sprintf("connections to it fail, as its record announces that address (meshAddresses): no `ztun run` "+
					"listens there, or something on the way drops TCP port %d", p.Addr.Port())
			}
			add("peers", fmt.Sprintf("nc -vz %s %d", p.Addr.Addr(), p.Addr.Port()), why,
				"%s cannot be reached at %s: %s", p, p.Addr, p.Error)
		}
		if p.MTU > 0 && p.MTU < smallestMTU {
			add("peers", fmt.Sprintf("tracepath -n %s", p.Addr.Addr()),
				"IPv6 needs 1280 bytes, and small packets cost throughput; a tunnel on the way may be set up wrongly",
				"packets to %s may have %d bytes at most", p, p.MTU)
		}
	}
	for _, p := range f.Pods {
		p.judge(f.Host.PlainTUN, func(mend, why, format string, args ...any) { add("pods", mend, why, format, args...) })
	}
	return out
}

// smallestMTU is IPv6's (RFC 8200, section 5).
const smallestMTU = 1280

type report = func(mend, why, format string, args ...any)

func (h Host) judge(add report) {
	if major, minor, ok := kernel(h.Kernel); ok && (major < 4 || major == 4 && minor < 17) {
		add("uname -r", "rules by protocol and port, which bring the mesh's traffic to ztun, need Linux 4.17",
			"the kernel is too old: Linux %s", h.Kernel)
	}
	if h.TUN != "" {
		add("modprobe tun; mkdir -p /dev/net; mknod /dev/net/tun c 10 200", "pods are captured by TUN devices",
			"TUN devices cannot be made: %s", h.TUN)
	}
	if h.TUNFlags != 0 && h.TUNFlags&iffVNetHdr == 0 && !h.PlainTUN {
		add("journalctl -u ztun | grep -i offload",
			"without offloads each segment is a packet of its own, and throughput a fraction",
			"the device %s is without offloads", h.NodeTUN)
	}
	if len(h.Taken) > 0 {
		for _, p := range h.Taken {
			add(fmt.Sprintf("ss -ltnp 'sport = :%d'", p), "the daemon needs that port and will not start",
				"port %d is taken by another program", p)
		}
	}
	if n, most := h.Conntrack[0], h.Conntrack[1]; most > 0 && n*10 >= most*9 {
		add(fmt.Sprintf("sysctl -w net.netfilter.nf_conntrack_max=%d", most*4),
			"new connections of the node are dropped when it is full", "connection tracking has %d of %d entries", n, most)
	}
	h.sysctls(add)
	for _, s := range h.Missing {
		if s.Where == steer.Node && !strings.HasPrefix(s.Do.String(), "sysctl") {
			add(s.Do.String(), "traffic of captured pods goes elsewhere, or nowhere",
				"the node's plan is not in force: %q is not there", s.Do)
		}
	}
	for _, r := range h.Seen.Rules {
		if !r.Ours && r.Pref > 0 && r.Pref <= steer.PrefSport {
			family := ""
			if r.V6 {
				family = " -6"
			}
			add(fmt.Sprintf("ip%s rule del pref %d", family, r.Pref),
				"it is asked before or among ztun's own (8 to 11), and may take the mesh's traffic away from them",
				"a rule that is not ztun's is in the way: %s", r.Text)
		}
	}
	h.filters(add)
}

// iffVNetHdr is IFF_VNET_HDR of linux/if_tun.h.
const iffVNetHdr = 0x4000

var kernelRE = regexp.MustCompile(`^(\d+)\.(\d+)`)

func kernel(release string) (major, minor int, ok bool) {
	m := kernelRE.FindStringSubmatch(release)
	if m == nil {
		return 0, 0, false
	}
	major, _ = strconv.Atoi(m[1])
	minor, _ = strconv.Atoi(m[2])
	return major, minor, true
}

func (h Host) sysctls(add report) {
	value := func(path string) string { return h.Sysctls[path] }
	if value("net/ipv4/ip_forward") == "0" {
		add("sysctl -w net.ipv4.ip_forward=1", "packets for pods arrive by the node's devices and are forwarded to ztun's",
			"IPv4 forwarding is off")
	}
	if value("net/ipv6/conf/all/forwarding") == "0" {
		add("sysctl -w net.ipv6.conf.all.forwarding=1",
			"packets for pods arrive by the node's devices and are forwarded to ztun's", "IPv6 forwarding is off")
	}
	// The larger of all's and the device's counts.
	if value("net/ipv4/conf/all/rp_filter") == "1" && value("net/ipv4/conf/"+h.NodeTUN+"/rp_filter") != "2" {
		add(fmt.Sprintf("sysctl -w net.ipv4.conf.%s.rp_filter=2", h.NodeTUN),
			"packets of pods whose source is not routed to the device are dropped without a word",
			"strict reverse path filtering is on for all devices, %s included", h.NodeTUN)
	}
	if lo, hi, ok := strings.Cut(strings.Join(strings.Fields(value("net/ipv4/ip_local_port_range")), " "), " "); ok {
		from, err1 := strconv.Atoi(lo)
		to, err2 := strconv.Atoi(hi)
		if err1 == nil && err2 == nil && to >= steer.MeshPortMin && from <= steer.MeshPortMax {
			add(fmt.Sprintf("sysctl -w net.ipv4.ip_local_port_range='%d %d'", min(from, 32768), steer.MeshPortMin-1),
				fmt.Sprintf("ztun's calls to the mesh come from %d to %d: programs of the node that get such a port compete with "+
					"it", steer.MeshPortMin, steer.MeshPortMax),
				"the node's own local ports (%d to %d) overlap with the mesh's", from, to)
		}
	}
	for _, l := range h.Seen.Links {
		if l.Default && value("net/ipv6/conf/all/forwarding") == "1" && value("net/ipv6/conf/"+l.Name+"/accept_ra") == "1" {
			add(fmt.Sprintf("sysctl -w net.ipv6.conf.%s.accept_ra=2", l.Name),
				"with forwarding on, the node's IPv6 default route ends with its lifetime and does not come back",
				"device %s takes router advertisements only while it does not forward", l.Name)
		}
	}
}

var (
	ourPorts   = regexp.MustCompile(`\b(15001|15006|15008|15053)\b`)
	istioSNAT  = regexp.MustCompile(`169\.254\.7\.127|fd16:9254:7127:1337`)
	dropTarget = regexp.MustCompile(`(?i)-j (DROP|REJECT)\b|\b(drop|reject)\b`)
	sourceNAT  = regexp.MustCompile(`(?i)-j (SNAT|MASQUERADE)\b|\b(snat|masquerade)\b`)
	istioRule  = regexp.MustCompile(`\bISTIO_[A-Z]`)
)

// filters looks for rules of packet filters that touch what ztun does. One finding a kind is enough: such rules come
// by the dozen.
func (h Host) filters(add report) {
	seen := map[string]bool{}
	once := func(kind, mend, why, format string, args ...any) {
		if !seen[kind] {
			seen[kind] = true
			add(mend, why, format, args...)
		}
	}
	for _, line := range h.Filters {
		program, rule, _ := strings.Cut(line, ": ")
		mend := strings.Replace(program, "-save", "", 1) + " -S" // iptables -S, ip6tables -S
		if program == "nft" {
			mend = "nft -a list ruleset"
		}
		switch {
		case h.Redirected && (istioSNAT.MatchString(rule) || istioRule.MatchString(rule)):
			// They are what pods are captured by, and probed by.
		case istioSNAT.MatchString(rule):
			once("snat", mend, "istio-cni's rule gives the kubelet's probes another source address: a policy sees it, and "+
				"ztun does not know it as the node's", "istio-cni has a rule for probes: %s", line)
		case istioRule.MatchString(rule):
			once("istio", mend, "iptables redirection of a ztunnel or sidecar takes connections before they come to ztun",
				"rules of Istio's redirection are there: %s", line)
		case ourPorts.MatchString(rule) && dropTarget.MatchString(rule):
			once("drop", mend, "the mesh's connections between nodes do not get through",
				"a packet filter refuses a port of the mesh: %s", line)
		case ourPorts.MatchString(rule):
			once("port", mend, "the mesh's connections may be sent elsewhere",
				"a packet filter has a rule about a port of the mesh: %s", line)
		case sourceNAT.MatchString(rule) && slices.ContainsFunc(h.Seen.Pods, func(a netip.Addr) bool {
			return strings.Contains(rule, a.String())
		}):
			once("nat", mend, "the peer sees the node's address instead of the pod's, and refuses the connection or applies "+
				"the wrong policy", "the source address of a captured pod is rewritten: %s", line)
		case dropTarget.MatchString(rule) && h.NodeTUN != "" && strings.Contains(rule, h.NodeTUN):
			once("device", mend, "packets of captured pods are dropped",
				"a packet filter refuses what goes by ztun's device: %s", line)
		}
	}
}

func (u Upstream) judge(now time.Time, add report) {
	if u.Roots != "" {
		add("ls -l $"+strings.TrimSuffix(u.Variable, "_ADDRESS")+"_ROOT_CA",
			"the control plane cannot be proved, and is not spoken to", "there are no roots for %s (%s): %s", u.Address,
			u.Variable, u.Roots)
	}
	if t := u.Token; t.Path != "" {
		switch {
		case t.Error != "":
			add("ls -l "+t.Path, "the control plane wants to know who asks", "the token cannot be read: %s", t.Error)
		case !t.Expires.IsZero() && !t.Expires.After(now):
			add("ls -l "+t.Path, "the control plane refuses it; the kubelet, or whoever writes it, has stopped renewing it",
				"the token %s has ended at %s", t.Path, t.Expires.UTC().Format(time.RFC3339))
		}
	}
	switch {
	case u.Error == "" || u.Roots != "":
	case strings.Contains(u.Error, "not yet valid: current time") && strings.Contains(u.Error, " is before "):
		add("timedatectl", "certificates are refused: this node's clock is behind, or the control plane's is ahead",
			"clocks differ: %s: %s", u.Address, u.Error)
	case strings.Contains(u.Error, "x509:"), strings.Contains(u.Error, "certificate"):
		add(fmt.Sprintf("openssl s_client -connect %s -showcerts </dev/null", u.Address),
			"the control plane cannot be proved, and is not spoken to", "the certificate of %s (%s) is refused: %s", u.Address,
			u.Variable, u.Error)
	default:
		add(fmt.Sprintf("nc -vz %s", strings.Replace(u.Address, ":", " ", 1)),
			"nothing new is learnt, and certificates are not renewed; what is known goes on working",
			"the control plane %s (%s) cannot be reached: %s", u.Address, u.Variable, u.Error)
	}
}

func (p Pod) judge(plain bool, add report) {
	ns, name, _ := strings.Cut(p.Name, "/")
	if p.State != "" && p.State != "Up" {
		add("ztun pod list -o wide", "its traffic goes nowhere until it is up", "pod %s is %s: %s", p.Name, p.State,
			cmp.Or(p.Error, "no reason is known"))
	}
	if p.NetNS != "" {
		add(fmt.Sprintf("ztun pod del --namespace %s --name %s", ns, name), "the pod is gone without a word to ztun",
			"the network namespace of pod %s cannot be opened: %s", p.Name, p.NetNS)
		return
	}
	for _, s := range p.Missing {
		mend := s.Do.String()
		if s.Where == steer.Pod {
			mend = "nsenter --net=" + p.Ref + " " + mend
		}
		add(mend, "its packets go elsewhere, or nowhere", "pod %s: %q is not there, in the %s's namespace", p.Name, s.Do,
			s.Where)
	}
	again := fmt.Sprintf("ztun pod del --namespace %s --name %s, and add it again", ns, name)
	if p.Lost {
		add(again, "nothing reaches the pod, and it reaches nothing", "pod %s: the namespace %s between it and the network is "+
			"gone, and its CNI's device with it", p.Name, p.Between)
	}
	for _, s := range p.Lacks {
		ref, where := p.Ref, "the pod's namespace"
		if s.Where == sandwich.S {
			ref, where = "/var/run/netns/"+p.Between, p.Between
		}
		mend := fmt.Sprintf("nsenter --net=%s sh -c '%s'", ref, s.Do)
		switch s.Do.(type) {
		case sandwich.OnlyRules, sandwich.Move, sandwich.Pair, sandwich.Rename: // no one command
			mend = again
		}
		add(mend, "its packets go elsewhere, or nowhere; the daemon puts back what is changed, and has not",
			"pod %s: %q is not there, in %s", p.Name, s.Do, where)
	}
	if p.DNS != "" && len(p.Missing)+len(p.Lacks) == 0 && !p.Lost {
		add("nsenter --net="+p.Ref+" dig +time=2 example.com", "names of services are not found",
			"pod %s gets no answer to a DNS query: %s", p.Name, p.DNS)
	}
	if p.Slow != "" && !plain {
		add("uname -r", "without offloads each segment is a packet of its own, and throughput a fraction",
			"the device of pod %s is without offloads: %s", p.Name, p.Slow)
	}
}
