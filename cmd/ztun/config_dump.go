package main

import (
	"fmt"
	"io"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"ztun/admin/istiod"
	"ztun/proxy/identity"
	"ztun/proxy/ports"
)

// dump is the configuration under ztunnel's names and in its encodings (spec controlplane 1.2, 6.3; the
// keys are those of a real ztunnel, encoding/json sorts them as it does), with our own settings under ztun.
func (c *Config) dump() map[string]any {
	illegal := []int{ports.Outbound, ports.InboundPlaintext, ports.HBONE}
	var socks any
	if c.Proxy.SOCKS5 {
		illegal = append(illegal, ports.SOCKS)
		socks = fmt.Sprint("127.0.0.1:", ports.SOCKS)
	}
	var self, workload any
	if c.Self.Identity != (identity.ID{}) {
		self = c.Self.Identity.String()
		workload = map[string]string{"name": c.Self.Pod, "namespace": c.Self.Namespace,
			"serviceAccount": c.Self.ServiceAccount}
	}
	mode, only := "Shared", any(nil)
	if c.Mode.Dedicated {
		mode = "Dedicated"
		only = map[string]string{"name": c.Mode.Workload.Name, "namespace": c.Mode.Workload.Namespace,
			"serviceAccount": c.Mode.Workload.ServiceAccount}
	}
	return map[string]any{
		"adminAddr":                c.localhost(c.Admin.Port),
		"altCaHostname":            orNull(c.CA.AltHostname),
		"altXdsHostname":           orNull(c.XDS.AltHostname),
		"caAddress":                orNull(c.CA.Address),
		"caHeaders":                headersOf(c.CA.Headers),
		"caRootCert":               dumpRoots(c.CA.Roots),
		"clusterDomain":            c.Node.ClusterDomain,
		"clusterId":                c.Node.ClusterID,
		"connectionWindowSize":     c.Proxy.HBONE.ConnWindow,
		"crlPath":                  orNull(c.CA.CRLPath),
		"dnsProxy":                 c.DNS.Proxy,
		"dnsProxyAddr":             c.dnsAddress(),
		"dnsResolverCfg":           resolvConf().servers(),
		"dnsResolverOpts":          resolvConf().options(c.Net.IPv6),
		"enableEnhancedBaggage":    c.Proxy.ResponseBaggage,
		"fakeCa":                   c.CA.Fake,
		"fakeSelfInbound":          false,
		"frameSize":                c.Proxy.HBONE.FrameSize,
		"illegalPorts":             illegal,
		"inboundAddr":              c.wildcard(ports.HBONE).String(),
		"inboundPlaintextAddr":     c.wildcard(ports.InboundPlaintext).String(),
		"inpodPortReuse":           c.Attach.PortReuse,
		"inpodUds":                 c.Attach.InpodUDS,
		"ipv6Enabled":              c.Net.IPv6,
		"localNode":                orNull(c.Node.Name),
		"localhostAppTunnel":       c.Proxy.LocalhostAppTunnel,
		"network":                  c.Node.Network,
		"numWorkerThreads":         c.Process.WorkerThreads,
		"outboundAddr":             c.wildcard(ports.Outbound).String(),
		"packetMark":               c.Net.PacketMark,
		"poolMaxStreamsPerConn":    c.Proxy.PoolMaxStreams,
		"poolUnusedReleaseTimeout": secsNanos(c.Proxy.PoolUnused),
		"preferedServiceNamespace": orNull(c.DNS.PreferredNamespace),
		"proxy":                    true,
		"proxyArgs":                c.Self.Args,
		"proxyMetadata":            c.Self.Metadata,
		"proxyMode":                mode,
		"proxyWorkloadInformation": only,
		"readinessAddr":            c.socket(c.Admin.ReadinessPort),
		"requireOriginalSource":    c.Proxy.OriginalSource,
		"secretTtl":                secsNanos(c.CA.TTL),
		"selfTerminationDeadline":  secsNanos(c.Process.TerminationDeadline),
		"socketConfig": map[string]any{
			"keepaliveEnabled": c.Net.KeepaliveEnabled, "keepaliveInterval": secsNanos(c.Net.KeepaliveInterval),
			"keepaliveRetries": c.Net.KeepaliveRetries,
			"keepaliveTime":    secsNanos(c.Net.KeepaliveTime), "userTimeoutEnabled": c.Net.UserTimeout,
		},
		"socks5Addr":      socks,
		"statsAddr":       c.socket(c.Admin.StatsPort),
		"windowSize":      c.Proxy.HBONE.StreamWindow,
		"xdsAddress":      orNull(c.XDS.Address),
		"xdsHeaders":      headersOf(c.XDS.Headers),
		"xdsOnDemand":     c.XDS.OnDemand,
		"xdsRootCert":     dumpRoots(c.XDS.Roots),
		"ztun":            c.dumpOwn(),
		"ztunnelIdentity": self,
		"ztunnelWorkload": workload,
	}
}

// dumpOwn is what ztunnel does not have or does not show; no secrets and no contents of files.
func (c *Config) dumpOwn() map[string]any {
	return map[string]any{
		"adaptiveProcessors": c.Process.AdaptiveProcessors, "authzPolicyInfoLogging": c.Proxy.PolicyInfoLogging,
		"clientCert":         orNull(c.Control.Cert),
		"controlCredentials": orNull(c.Control.Dir), "localCaDir": orNull(c.CA.LocalDir),
		"localXdsPath": orNull(c.XDS.LocalPath),
		"memoryLimit":  c.Memory.Limit, "podMemory": c.Memory.Pod,
		"maxInFlight": c.Stack.MaxInFlight, "maxInFlightPerDestination": c.Stack.MaxInFlightPerDst,
		"dnsRate": c.Stack.DNSRate,
		"flows":   c.Proxy.Remember, "sendReason": c.Proxy.SendReason, "dnsSearch": c.DNS.Search, "mtu": c.Attach.MTU,
		"nodeTun": c.Attach.NodeTUN,
		"pqc":     c.Proxy.TLS.PQC, "socket": c.State.Socket, "stateDir": c.State.Dir, "tls12": c.Proxy.TLS.TLS12,
		"tokenFile": orNull(c.Control.Token.File),
		"tunPlain":  c.Attach.Plain, "localRelay": c.Proxy.LocalRelay, "shortcuts": c.Proxy.Shortcuts,
		"denyUnknownPolicy": c.Proxy.DenyUnknownPolicy, "dropCapabilities": c.Privileges.Drop,
		"steering": c.Attach.Steering.String(), "nodeAgent": c.Attach.NodeAgent,
		"steeredNative": c.Attach.Native, "runWait": secsNanos(c.Process.RunWait),
		"supervise": c.Process.Supervise,
	}
}

func dumpRoots(r istiod.Roots) any {
	switch {
	case r.File != "":
		return map[string]string{"File": r.File}
	case r.System:
		return "Default"
	}
	return "Static"
}

func (c *Config) socket(port uint16) any {
	return map[string]string{"SocketAddr": c.wildcard(port).String()}
}

func (c *Config) localhost(port uint16) any {
	return map[string]any{"Localhost": []any{c.loopbackIPv6(), port}}
}

func (c *Config) dnsAddress() any {
	if port, ok := strings.CutPrefix(c.DNS.Addr, "localhost:"); ok {
		n, _ := strconv.ParseUint(port, 10, 16) // checked when it was read
		return c.localhost(uint16(n))
	}
	return map[string]string{"SocketAddr": c.DNS.Addr}
}

func secsNanos(d time.Duration) any {
	return map[string]int64{"nanos": int64(d % time.Second), "secs": int64(d / time.Second)}
}

func orNull(s string) any {
	if s == "" {
		return nil
	}
	return s
}

// headersOf never is null.
func headersOf(h [][2]string) [][2]string { return append([][2]string{}, h...) }

// resolver is what /etc/resolv.conf says (resolv.conf(5)), for whoever looks why a name does not resolve.
type resolver struct {
	nameservers              []string
	domain                   string
	search                   []string
	ndots, timeout, attempts int // timeout in seconds
}

// Bounds of resolv.conf, far beyond what resolvers take (three nameservers, six domains, 256 bytes).
const (
	maxResolvConf  = 256 << 10 // bytes
	maxNameservers = 16
	maxSearch      = 64
)

func resolvConf() resolver {
	f, err := os.Open("/etc/resolv.conf")
	if err != nil {
		return parseResolvConf("") // a missing one is an empty one
	}
	defer f.Close()
	b, _ := io.ReadAll(io.LimitReader(f, maxResolvConf))
	return parseResolvConf(string(b))
}

// parseResolvConf reads what is well formed and skips the rest, as resolvers do.
func parseResolvConf(text string) resolver {
	r := resolver{search: []string{}, ndots: 1, timeout: 5, attempts: 2}
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 2 || !utf8.ValidString(line) {
			continue
		}
		switch f[0] {
		case "nameserver":
			if _, err := netip.ParseAddr(f[1]); err == nil && len(r.nameservers) < maxNameservers {
				r.nameservers = append(r.nameservers, f[1])
			}
		case "domain":
			r.domain = f[1]
		case "search":
			r.search = f[1:min(len(f), 1+maxSearch)]
		case "options":
			for _, o := range f[1:] {
				name, value, _ := strings.Cut(o, ":")
				n, err := strconv.Atoi(value)
				if err != nil || n < 0 {
					continue
				}
				switch name {
				case "ndots":
					r.ndots = n
				case "timeout":
					r.timeout = n
				case "attempts":
					r.attempts = n
				}
			}
		}
	}
	return r
}

// addrs are the nameservers to ask.
func (r resolver) addrs() (all []netip.AddrPort) {
	for _, s := range r.nameservers {
		all = append(all, netip.AddrPortFrom(netip.MustParseAddr(s).Unmap(), dnsPort))
	}
	return all
}

// searchDomains are what pods append to names besides the cluster's own domains: what is configured, or what the
// daemon's own resolver appends, since kubelet adds the node's search list to every pod's. A daemon that is a pod has
// domains of its own namespace there, which are no other pod's.
func (c *Config) searchDomains(r resolver) (all []string) {
	if len(c.DNS.Search) > 0 {
		return c.DNS.Search
	}
	for _, d := range r.search {
		d = strings.Trim(strings.ToLower(d), ".")
		if d != "" && d != c.Node.ClusterDomain && !strings.HasSuffix(d, "."+c.Node.ClusterDomain) {
			all = append(all, d)
		}
	}
	return all
}

func (r resolver) servers() any {
	servers := []any{}
	for _, ip := range r.nameservers {
		connection := func(protocol string) any {
			return map[string]any{"bind_addr": nil, "port": 53, "protocol": map[string]string{"type": protocol}}
		}
		servers = append(servers, map[string]any{
			"connections": []any{connection("udp"), connection("tcp")}, "ip": ip, "trust_negative_responses": true,
		})
	}
	return map[string]any{"domain": orNull(r.domain), "name_servers": servers, "search": r.search}
}

// options has ztunnel's keys, which are those of its resolver library. attempts, ndots and timeout are
// resolv.conf's, ip_strategy follows IPV6_ENABLED; the rest has no counterpart here and stands for a reader
// that expects the keys, with that library's defaults.
func (r resolver) options(ipv6 bool) any {
	strategy := "Ipv4Only"
	if ipv6 {
		strategy = "Ipv4AndIpv6"
	}
	return map[string]any{
		"allow_answers": []string{}, "attempts": r.attempts, "avoid_local_udp_ports": []int{}, "cache_size": 4096,
		"case_randomization": false,
		"deny_answers":       []string{}, "edns0": false, "edns_payload_len": 1232, "ip_strategy": strategy,
		"max_active_requests": 32,
		"ndots":               r.ndots, "negative_max_ttl": nil, "negative_min_ttl": nil, "num_concurrent_reqs": 2,
		"os_port_selection": false,
		"positive_max_ttl":  nil, "positive_min_ttl": nil, "preserve_intermediates": true, "recursion_desired": true,
		"server_ordering_strategy": "QueryStatistics", "timeout": r.timeout, "trust_anchor": nil, "try_tcp_on_error": false,
		"use_hosts_file": "Auto",
	}
}
