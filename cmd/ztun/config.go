package main

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"go.yaml.in/yaml/v3"
)

// Config is the effective configuration of the daemon. This file is the only reader of the environment.
type Config struct {
	NodeName, Network, ClusterID, ClusterDomain string

	LocalXDSPath, LocalXDS string
	LocalCADir             string
	FakeCA                 bool
	SecretTTL              time.Duration

	StreamWindow, ConnWindow, FrameSize uint32
	PoolMaxStreams                      uint16
	PoolUnused                          time.Duration
	ResponseBaggage                     bool

	KeepaliveTime, KeepaliveInterval time.Duration
	KeepaliveRetries                 uint32
	KeepaliveEnabled, UserTimeout    bool

	IPv6                 bool
	AdminPort, StatsPort uint16
	ReadinessPort        uint16
	PacketMark           uint32

	TerminationDeadline time.Duration
	WorkerThreads       int
	RustLog, LogFormat  string
	IstioVersion        string

	StateDir, Socket, NodeTUN              string
	MTU                                    int
	MaxInFlight, MaxInFlightPerDestination int
	GCSet                                  bool // GOGC is the operator's
	TUNPlain, AdaptiveProcessors           bool
}

// variable is one row of the table: how a value is read, and what it means.
type variable struct {
	name, def, help string
	set             func(value string) error
}

// proxyConfig is the part of Istio's ProxyConfig that a node proxy reads (spec controlplane 1.1).
type proxyConfig struct {
	ProxyAdminPort *uint16 `yaml:"proxyAdminPort"`
	StatsPort      *uint16 `yaml:"statsPort"`
	Concurrency    *uint16 `yaml:"concurrency"`
}

// configError names the variable that is wrong; the program then ends with exit code 2.
type configError struct {
	name, value string
	cause       error
}

func (e *configError) Unwrap() error { return e.cause }

func (e *configError) Error() string {
	// One line, also where the value or a YAML error has several.
	line := func(s string) string { return strings.Join(strings.Fields(s), " ") }
	return fmt.Sprintf("invalid env var %s=%s (%s)", e.name, line(e.value), line(e.cause.Error()))
}

// loadConfig reads every variable through lookup (os.LookupEnv in the program).
func loadConfig(lookup func(string) (string, bool)) (*Config, error) {
	c := &Config{}
	l := &loader{lookup: lookup, cpus: runtime.NumCPU()}
	for _, v := range variables(c, l) {
		value, set := lookup(v.name)
		if !set {
			value = v.def
		}
		if !set && v.def == "" {
			continue
		}
		if err := v.set(value); err != nil {
			return nil, &configError{v.name, value, err}
		}
	}
	_, c.GCSet = lookup("GOGC")
	return c, c.finish(l)
}

// loader keeps what several variables decide together.
type loader struct {
	lookup                   func(string) (string, bool)
	cpus                     int
	grace                    *uint64
	deadline                 *time.Duration
	workers                  string
	cpuLimit, limit, request int
	proxy                    proxyConfig
	socketSet                bool
}

// variables is the table: every variable that the daemon reads, in the order of its help.
func variables(c *Config, l *loader) []variable {
	return []variable{
		{"NODE_NAME", "", "name of this node; only its workloads are served", str(&c.NodeName)},
		{"NETWORK", "", "network of this node", str(&c.Network)},
		{"CLUSTER_ID", "Kubernetes", "cluster of this node (ISTIO_META_CLUSTER_ID wins)", str(&c.ClusterID)},
		{"ISTIO_META_CLUSTER_ID", "", "cluster of this node", nonEmpty(&c.ClusterID)},
		{"CLUSTER_DOMAIN", "cluster.local", "DNS suffix of the cluster; shown in /config_dump only, for now", str(&c.ClusterDomain)},
		{"PROXY_MODE", "shared", "shared: one daemon for all pods of the node (the only mode)", only("shared", "a TUN-based proxy serves pods through their namespaces; dedicated mode redirects with iptables")},
		{"ENABLE_PROXY", "true", "the HBONE proxy; must be on", only("true", "a node proxy without a proxy does nothing")},
		{"XDS_ADDRESS", "", "control plane; must be empty for now: workloads come from LOCAL_XDS_PATH", only("", "the xDS client is not part of this version; unset it and use LOCAL_XDS_PATH")},
		{"LOCAL_XDS_PATH", "", "workload file (ztunnel's local schema), reloaded when it changes", str(&c.LocalXDSPath)},
		{"LOCAL_XDS", "", "the same, inline", str(&c.LocalXDS)},
		{"LOCAL_CA_DIR", "", "directory of the local CA (see `ztun ca init`)", str(&c.LocalCADir)},
		{"FAKE_CA", "false", "use the built-in test CA, which every copy of this program knows: for tests only", boolean(&c.FakeCA)},
		{"SECRET_TTL", "24h", "lifetime of a workload certificate", duration(&c.SecretTTL)},
		{"HTTP2_STREAM_WINDOW_SIZE", "4194304", "HTTP/2 window of a stream, bytes", uint32v(&c.StreamWindow, 65535, math.MaxInt32)},
		{"HTTP2_CONNECTION_WINDOW_SIZE", "16777216", "HTTP/2 window of a connection, bytes", uint32v(&c.ConnWindow, 65535, math.MaxInt32)},
		{"HTTP2_FRAME_SIZE", "1048576", "largest HTTP/2 frame accepted, bytes", uint32v(&c.FrameSize, 16384, 1<<24-1)},
		{"POOL_MAX_STREAMS_PER_CONNECTION", "100", "streams that one tunnel carries at most", uint16v(&c.PoolMaxStreams, 1)},
		{"POOL_UNUSED_RELEASE_TIMEOUT", "5m", "an unused tunnel is closed after this", duration(&c.PoolUnused)},
		{"ENABLE_RESPONSE_BAGGAGE", "true", "send and read baggage in answers", boolean(&c.ResponseBaggage)},
		{"KEEPALIVE_ENABLED", "true", "TCP keepalive", boolean(&c.KeepaliveEnabled)},
		{"KEEPALIVE_TIME", "180s", "idle time before the first probe", duration(&c.KeepaliveTime)},
		{"KEEPALIVE_INTERVAL", "180s", "time between probes", duration(&c.KeepaliveInterval)},
		{"KEEPALIVE_RETRIES", "9", "probes before a connection is given up", uint32v(&c.KeepaliveRetries, 1, 127)},
		{"USER_TIMEOUT_ENABLED", "false", "TCP_USER_TIMEOUT of time + retries x interval", boolean(&c.UserTimeout)},
		{"IPV6_ENABLED", "true", "listen on and route IPv6, too", boolean(&c.IPv6)},
		{"UNSTABLE_ENABLE_SOCKS5", "false", "SOCKS5 on 15080; not part of this version", only("false", "SOCKS5 is not part of this version")},
		{"PROXY_CONFIG", "", "Istio ProxyConfig (YAML or JSON): proxyAdminPort, statsPort, concurrency", l.setProxyConfig},
		{"CONNECTION_TERMINATION_DEADLINE", "", "how long connections may finish after SIGTERM (default 5s)", l.setDeadline},
		{"TERMINATION_GRACE_PERIOD_SECONDS", "", "the same, from the pod: N>10: N-5, else N-1 seconds, at least 1", l.setGrace},
		{"ZTUNNEL_CPU_LIMIT", "", "processors of this machine, as the worker count sees them", intv(&l.cpuLimit)},
		{"ZTUNNEL_RESOURCE_CPU_LIMIT", "", "CPU limit of the daemon (Kubernetes quantity)", quantity(&l.limit)},
		{"ZTUNNEL_RESOURCE_CPU_REQUEST", "", "CPU request of the daemon (Kubernetes quantity)", quantity(&l.request)},
		{"ZTUNNEL_WORKER_THREADS", "", "worker threads: N, N%, 0 = all; default a quarter of the processors, at least 2", str(&l.workers)},
		{"RUST_LOG", "info", "log filter: level or target=level, comma separated", str(&c.RustLog)},
		{"LOG_FORMAT", "plain", "json, or anything else for text", str(&c.LogFormat)},
		{"ISTIO_META_ISTIO_VERSION", "unknown", "version shown by the istio_build metric", str(&c.IstioVersion)},
		{"ZTUN_STATE_DIR", "/var/run/ztun", "where the daemon keeps its socket and the list of pods", str(&c.StateDir)},
		{"ZTUN_SOCKET", "", "control socket of `ztun pod` (default ZTUN_STATE_DIR/ztun.sock)", str(&c.Socket)},
		{"ZTUN_NODE_TUN", "ztun-node", "name of the node's TUN device", deviceName(&c.NodeTUN)},
		{"ZTUN_MTU", "1500", "MTU of the TUN devices, bytes", ranged(&c.MTU, 1280, 65535)},
		{"ZTUN_MAX_INFLIGHT", "1024", "connections of one pod that may wait for their verdict", ranged(&c.MaxInFlight, 1, 1<<20)},
		{"ZTUN_MAX_INFLIGHT_PER_DESTINATION", "256", "the same, to one destination", ranged(&c.MaxInFlightPerDestination, 1, 1<<20)},
		{"ZTUN_TUN_PLAIN", "false", "use the portable TUN path without offload", boolean(&c.TUNPlain)},
		{"ZTUN_ADAPTIVE_PROCESSORS", "true", "use as many processors as the work needs, up to the worker threads plus one; false: always that many", boolean(&c.AdaptiveProcessors)},
		{"ZTUN_READINESS_PORT", "15021", "readiness port (fixed in ztunnel; for several daemons in one namespace)", uint16v(&c.ReadinessPort, 0)},
		{"PACKET_MARK", "0", "SO_MARK of the sockets towards the network, 0 for none (ztunnel's 1337 serves its iptables rules, of which there are none here)", uint32v(&c.PacketMark, 0, math.MaxUint32)},
	}
}

// finish applies the rules that span several variables.
func (c *Config) finish(l *loader) error {
	c.AdminPort, c.StatsPort = 15000, 15020
	if p := l.proxy.ProxyAdminPort; p != nil {
		c.AdminPort = *p
	}
	if p := l.proxy.StatsPort; p != nil {
		c.StatsPort = *p
	}
	switch {
	case c.LocalXDS != "" && c.LocalXDSPath != "":
		return &configError{"LOCAL_XDS", "...", errors.New("LOCAL_XDS_PATH is set as well; only one of them may be")}
	case c.LocalXDS == "" && c.LocalXDSPath == "":
		return &configError{"LOCAL_XDS_PATH", "", errors.New("no source of workloads: name a workload file")}
	case c.FakeCA && c.LocalCADir != "":
		return &configError{"FAKE_CA", "true", errors.New("LOCAL_CA_DIR is set as well; only one of them may be")}
	case !c.FakeCA && c.LocalCADir == "":
		return &configError{"LOCAL_CA_DIR", "", errors.New("no source of certificates: run `ztun ca init DIR` and name DIR here, or set FAKE_CA=true for a test")}
	case c.ConnWindow < c.StreamWindow:
		return &configError{"HTTP2_CONNECTION_WINDOW_SIZE", fmt.Sprint(c.ConnWindow), errors.New("smaller than HTTP2_STREAM_WINDOW_SIZE: one stream could block all others")}
	case c.SecretTTL < 10*time.Second:
		return &configError{"SECRET_TTL", c.SecretTTL.String(), errors.New("shorter than 10s leaves no time to rotate")}
	}
	if c.Socket == "" {
		c.Socket = filepath.Join(c.StateDir, "ztun.sock")
	}
	c.TerminationDeadline = terminationDeadline(l.deadline, l.grace)
	n, err := workerThreads(l.workers, l.proxy.Concurrency, l.limit, l.request, l.cpuLimit, l.cpus)
	if err != nil {
		return &configError{"ZTUNNEL_WORKER_THREADS", l.workers, err}
	}
	c.WorkerThreads = n
	return nil
}

// terminationDeadline is spec dataplane 12: the explicit deadline, else the grace period less a margin
// in which the process can still end by itself, else 5 s.
func terminationDeadline(deadline *time.Duration, grace *uint64) time.Duration {
	switch {
	case deadline != nil:
		return *deadline
	case grace == nil:
		return 5 * time.Second
	case *grace > 10:
		return time.Duration(*grace-5) * time.Second
	case *grace > 2:
		return time.Duration(*grace-1) * time.Second
	}
	return time.Second
}

// workerThreads is spec controlplane 9.2, first match.
func workerThreads(explicit string, concurrency *uint16, limit, request, cpuLimit, cpus int) (int, error) {
	if cpuLimit > 0 {
		cpus = cpuLimit
	}
	if limit > 0 {
		cpus = limit
	}
	switch {
	case strings.HasSuffix(explicit, "%"):
		p, err := strconv.ParseFloat(strings.TrimSuffix(explicit, "%"), 64)
		if err != nil || !(p > 0 && p <= 100) {
			return 0, errors.New("a percentage lies above 0% and at most at 100%")
		}
		return max(1, int(math.Ceil(float64(cpus)*p/100))), nil
	case explicit != "":
		n, err := strconv.ParseUint(explicit, 10, 16)
		if err != nil {
			return 0, errors.New("not a number or a percentage")
		}
		if n == 0 {
			return cpus, nil
		}
		return int(n), nil
	case concurrency != nil && *concurrency > 0:
		return int(*concurrency), nil
	case concurrency != nil:
		return cpus, nil
	case limit > 0:
		return max(limit, request), nil
	}
	return max(int(math.Ceil(float64(cpus)*0.25)), request, 2), nil
}

func (l *loader) setProxyConfig(v string) error {
	if v == "" {
		return nil
	}
	return yaml.Unmarshal([]byte(v), &l.proxy)
}

func (l *loader) setDeadline(v string) error {
	d, err := parseDuration(v)
	l.deadline = &d
	return err
}

func (l *loader) setGrace(v string) error {
	n, err := strconv.ParseUint(v, 10, 31)
	if err != nil {
		return errors.New("not a whole number of seconds")
	}
	l.grace = &n
	return nil
}

func str(p *string) func(string) error {
	return func(v string) error { *p = v; return nil }
}

// nonEmpty lets an empty value leave what another variable has said.
func nonEmpty(p *string) func(string) error {
	return func(v string) error {
		if v != "" {
			*p = v
		}
		return nil
	}
}

func only(allowed, why string) func(string) error {
	return func(v string) error {
		if v != allowed {
			return errors.New(why)
		}
		return nil
	}
}

func boolean(p *bool) func(string) error {
	return func(v string) error {
		if v != "true" && v != "false" {
			return errors.New("must be true or false")
		}
		*p = v == "true"
		return nil
	}
}

func duration(p *time.Duration) func(string) error {
	return func(v string) (err error) { *p, err = parseDuration(v); return err }
}

func uint32v(p *uint32, lo, hi uint64) func(string) error {
	return func(v string) error {
		n, err := strconv.ParseUint(v, 10, 32)
		if err != nil || n < lo || n > hi {
			return fmt.Errorf("must be a decimal number from %d to %d", lo, hi)
		}
		*p = uint32(n)
		return nil
	}
}

func uint16v(p *uint16, lo uint64) func(string) error {
	return func(v string) error {
		n, err := strconv.ParseUint(v, 10, 16)
		if err != nil || n < lo {
			return fmt.Errorf("must be a decimal number from %d to 65535", lo)
		}
		*p = uint16(n)
		return nil
	}
}

func intv(p *int) func(string) error { return ranged(p, 1, 1<<16) }

func ranged(p *int, lo, hi int) func(string) error {
	return func(v string) error {
		n, err := strconv.Atoi(v)
		if err != nil || n < lo || n > hi {
			return fmt.Errorf("must be a decimal number from %d to %d", lo, hi)
		}
		*p = n
		return nil
	}
}

// quantity reads a Kubernetes CPU quantity ("2", "1.5", "500m"), rounded up to whole processors.
func quantity(p *int) func(string) error {
	return func(v string) error {
		div := 1.0
		num := v
		if s, ok := strings.CutSuffix(v, "m"); ok {
			num, div = s, 1000
		}
		f, err := strconv.ParseFloat(num, 64)
		if err != nil || !(f > 0) || math.IsInf(f, 0) {
			return errors.New("must be a CPU quantity above 0, such as 2, 1.5 or 500m")
		}
		*p = int(math.Ceil(f / div))
		return nil
	}
}

func deviceName(p *string) func(string) error {
	return func(v string) error {
		if v == "" || len(v) > 15 || strings.ContainsAny(v, "/ \t%") {
			return errors.New("must be a device name of 1 to 15 characters")
		}
		*p = v
		return nil
	}
}

// parseDuration reads ztunnel's durations: numbers with units, summed; a bare number is in seconds.
func parseDuration(s string) (time.Duration, error) {
	s = strings.TrimSpace(s)
	if s == "" {
		return 0, errors.New("empty duration")
	}
	units := map[string]time.Duration{
		"": time.Second, "ns": time.Nanosecond, "us": time.Microsecond, "µs": time.Microsecond, "ms": time.Millisecond,
		"s": time.Second, "m": time.Minute, "h": time.Hour, "d": 24 * time.Hour, "w": 7 * 24 * time.Hour,
	}
	var total time.Duration
	for s != "" {
		i := 0
		for i < len(s) && (s[i] >= '0' && s[i] <= '9') {
			i++
		}
		j := i
		for j < len(s) && !(s[j] >= '0' && s[j] <= '9') && s[j] != ' ' && s[j] != '+' {
			j++
		}
		n, err := strconv.ParseInt(s[:i], 10, 64)
		unit, ok := units[s[i:j]]
		if err != nil || !ok {
			return 0, fmt.Errorf("%q is no duration; write it like 300s, 5m, 1h30m or 100ms", s)
		}
		if n > int64(math.MaxInt64-total)/int64(unit) {
			return 0, fmt.Errorf("%q is too long", s)
		}
		total += time.Duration(n) * unit
		s = strings.TrimLeft(s[j:], " +")
	}
	return total, nil
}

// helpTable renders the table of variables for `ztun proxy --help`.
func helpTable() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 4, 2, ' ', 0)
	for _, v := range variables(&Config{}, &loader{}) {
		fmt.Fprintf(w, "  %s\t%s\t%s\n", v.name, v.def, v.help)
	}
	w.Flush()
	return b.String()
}

// userTimeout is TCP_USER_TIMEOUT of the connections to the network (spec 1), 0 for none.
func (c *Config) userTimeout() time.Duration {
	if !c.UserTimeout {
		return 0
	}
	return c.KeepaliveTime + time.Duration(c.KeepaliveRetries)*c.KeepaliveInterval
}

// wildcard is the address that a server of this daemon binds to serve the network.
func (c *Config) wildcard(port uint16) netip.AddrPort {
	if c.IPv6 {
		return netip.AddrPortFrom(netip.IPv6Unspecified(), port)
	}
	return netip.AddrPortFrom(netip.IPv4Unspecified(), port)
}

// loopbackIPv6 reports whether ::1 can be bound (spec controlplane 1.2).
func (c *Config) loopbackIPv6() bool {
	if !c.IPv6 {
		return false
	}
	b, err := os.ReadFile("/proc/sys/net/ipv6/conf/lo/disable_ipv6")
	return err != nil || strings.TrimSpace(string(b)) != "1"
}
