package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"ztun/netstack"
	"ztun/proxy/identity"
	"ztun/proxy/ports"
	"ztun/proxy/state"
)

// Config is the effective configuration of the daemon, a part for each subsystem (config_groups.go). This file is the
// only reader of the environment; config_table.go has the table of variables and says which field each fills,
// config_values.go and config_duration.go read single values, config_mesh.go ProxyConfig and the metadata,
// config_control.go the way to the control plane, and config_dump.go shows it all in /config_dump.
//
// Decisions (2026-11-23), where ztunnel's reading of a variable hides a mistake: a control plane at http://,
// roots that are neither file nor PEM, and an unknown COMPLIANCE_POLICY are errors and not silently without
// effect; a ProxyConfig without proxyMetadata is read; a value that may be a secret is not repeated.
type Config struct {
	Node       nodeConfig
	Self       selfConfig
	Mode       modeConfig
	XDS        xdsConfig
	CA         caConfig
	Control    controlConfig
	Proxy      trafficConfig
	Net        netConfig
	Stack      netstack.Config // of every pod; stack() adds what Net has for it
	DNS        dnsConfig
	UDP        udpConfig
	Attach     attachConfig
	Admin      adminConfig
	Log        logConfig
	State      stateConfig
	Process    processConfig
	Memory     memoryConfig
	Privileges privilegesConfig

	Warnings []string // what is to be logged at the start
}

// configError names the variable that is wrong; the program then ends with exit code 2.
type configError struct {
	name, value string
	cause       error
}

func (e *configError) Unwrap() error { return e.cause }

func (e *configError) Error() string {
	// One line, also where the value or a YAML error has several, and one that fits a screen.
	line := func(s string) string {
		s = strings.Join(strings.Fields(s), " ")
		if len(s) > 400 {
			s = strings.ToValidUTF8(s[:400], "") + "..."
		}
		return s
	}
	value := e.value
	if secret(e.name) && value != "" {
		value = "..."
	}
	return fmt.Sprintf("invalid env var %s=%s (%s)", e.name, line(value), line(e.cause.Error()))
}

// secret reports whether the value of a variable may be one.
func secret(name string) bool {
	return name == "AUTH_TOKEN" || strings.HasPrefix(name, "XDS_HEADER_") || strings.HasPrefix(name, "CA_HEADER_")
}

func (c *Config) warn(format string, args ...any) {
	c.Warnings = append(c.Warnings, fmt.Sprintf(format, args...))
}

// loader keeps what several variables decide together.
type loader struct {
	c                        *Config
	lookup                   func(string) (string, bool)
	cpus                     int
	xds, ca                  *string // XDS_ADDRESS and CA_ADDRESS, if set
	kubernetes               bool
	discoveryFrom            string // the variable that proxy.DiscoveryAddress came by
	meta                     map[string]string
	grace                    *uint64
	deadline                 *time.Duration
	inpod                    *bool // INPOD_ENABLED
	localRelay               *bool // ZTUN_LOCAL_RELAY
	steering                 *steering
	mark                     *uint32 // PACKET_MARK
	workers                  string
	cpuLimit, limit, request int
	proxy                    proxyConfig
}

func (l *loader) given(name string) bool { _, ok := l.lookup(name); return ok }

// loadConfig reads every variable through lookup and, for the patterns of names, environ (os.LookupEnv and
// os.Environ in the program). What is not UTF-8 counts as not set. The error is a *configError.
func loadConfig(lookup func(string) (string, bool), environ func() []string) (*Config, error) {
	c := &Config{Self: selfConfig{MetaJSON: map[string]json.RawMessage{}, Args: "proxy"}}
	l := &loader{c: c, cpus: runtime.NumCPU(), meta: map[string]string{}}
	l.lookup = func(name string) (string, bool) {
		v, ok := lookup(name)
		return v, ok && utf8.ValidString(v)
	}
	for _, v := range variables(c, l) {
		value, set := l.lookup(v.name)
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
	all := map[string]string{}
	for _, pair := range environ() {
		if name, value, ok := strings.Cut(pair, "="); ok && utf8.ValidString(pair) {
			all[name] = value
		}
	}
	for _, p := range patterns(c, l) {
		for _, name := range slices.Sorted(maps.Keys(all)) {
			if key, ok := strings.CutPrefix(name, p.prefix); ok {
				if err := p.set(key, all[name]); err != nil {
					return nil, &configError{name, all[name], err}
				}
			}
		}
	}
	_, c.Process.GCSet = lookup("GOGC")
	if err := c.finish(l); err != nil {
		return nil, err
	}
	return c, nil
}

// finish applies the rules that span several variables.
func (c *Config) finish(l *loader) error {
	c.Admin.Port, c.Admin.StatsPort = ports.Admin, ports.Stats
	if p := l.proxy.ProxyAdminPort; p != nil {
		c.Admin.Port = *p
	}
	if p := l.proxy.StatsPort; p != nil {
		c.Admin.StatsPort = *p
	}
	c.Self.Metadata = proxyMetadata(l.proxy.ProxyMetadata, l.meta)
	capture, set := c.Self.Metadata["DNS_CAPTURE"]
	c.DNS.Proxy = !set || strings.ToLower(capture) == "true"
	addr := fmt.Sprint("localhost:", ports.DNS)
	if a, set := c.Self.Metadata["DNS_PROXY_ADDR"]; set {
		addr = a
	}
	var err error
	if c.DNS.Addr, err = parseDNSAddress(addr); err != nil {
		return &configError{"ISTIO_META_DNS_PROXY_ADDR", addr, err}
	}
	if c.Self.Namespace != "" && c.Self.ServiceAccount != "" && c.Self.Pod != "" {
		c.Self.Identity = identity.ID{TrustDomain: c.Self.TrustDomain, Namespace: c.Self.Namespace,
			ServiceAccount: c.Self.ServiceAccount}
	}
	if err := c.sources(l); err != nil {
		return err
	}
	switch none := c.Mode.Workload == (state.WorkloadInfo{}); {
	case c.Mode.Dedicated && none:
		return &configError{"PROXY_WORKLOAD_INFO", "", errors.New("PROXY_MODE=dedicated is one workload's proxy: say here " +
			"which, as NAMESPACE/NAME/SERVICE_ACCOUNT of its record")}
	case !c.Mode.Dedicated && !none:
		c.warn("PROXY_WORKLOAD_INFO has no effect without PROXY_MODE=dedicated: pods are named by `ztun pod add`")
		c.Mode.Workload = state.WorkloadInfo{}
	}
	if err := c.chooseSteering(l); err != nil {
		return err
	}
	switch {
	case c.XDS.OnDemand && c.DNS.Proxy:
		return &configError{"XDS_ON_DEMAND", "true",
			errors.New("the DNS proxy needs every service, not those in use: set ISTIO_META_DNS_CAPTURE=false")}
	case c.Proxy.HBONE.ConnWindow < c.Proxy.HBONE.StreamWindow:
		return &configError{"HTTP2_CONNECTION_WINDOW_SIZE", fmt.Sprint(c.Proxy.HBONE.ConnWindow),
			errors.New("smaller than HTTP2_STREAM_WINDOW_SIZE: one stream could block all others")}
	case c.CA.TTL < 10*time.Second:
		return &configError{"SECRET_TTL", c.CA.TTL.String(), errors.New("shorter than 10s leaves no time to rotate")}
	}
	if c.Net.IPv6 {
		if _, err := os.ReadFile(loopbackSetting); err != nil {
			c.warn("cannot tell whether ::1 can be bound, and take it that it can: %v", err)
		}
	}
	if !l.given("ZTUN_STATE_DIR") {
		c.State.Dir = defaultStateDir()
	}
	if c.State.Socket == "" {
		c.State.Socket = filepath.Join(c.State.Dir, "ztun.sock")
	}
	c.Process.TerminationDeadline = terminationDeadline(l.deadline, l.grace)
	if c.Process.WorkerThreads, err = workerThreads(l.workers, l.proxy.Concurrency, l.limit, l.request, l.cpuLimit,
		l.cpus); err != nil {
		return &configError{"ZTUNNEL_WORKER_THREADS", l.workers, err}
	}
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

// workerThreads is spec controlplane 9.2, first match; "" is no explicit number, 0 no limit.
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

func (l *loader) setMeshConfig(path string) error {
	return l.addProxyConfig("ZTUN_MESH_CONFIG", func() (proxyConfig, error) {
		return readMeshConfig(path, l.given("ZTUN_MESH_CONFIG"))
	})
}

func (l *loader) setProxyConfig(text string) error {
	return l.addProxyConfig("PROXY_CONFIG", func() (proxyConfig, error) { return parseProxyConfig(text) })
}

func (l *loader) addProxyConfig(from string, read func() (proxyConfig, error)) error {
	p, err := read()
	if err != nil {
		return err
	}
	if p.DiscoveryAddress != nil {
		l.discoveryFrom = from
	}
	l.proxy = p.over(l.proxy)
	return nil
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

func (l *loader) setWorkers(v string) error {
	if v == "" {
		return errors.New("not a number or a percentage")
	}
	l.workers = v
	return nil
}

func (l *loader) setMeta(key, value string) error {
	l.meta[key] = value
	return nil
}

// setMetaJSON skips what is no JSON, as ztunnel does: it is for the control plane only.
func (l *loader) setMetaJSON(key, value string) error {
	if !json.Valid([]byte(value)) {
		l.c.warn("ISTIO_METAJSON_%s is no JSON: the control plane will not see it", key)
		return nil
	}
	l.c.Self.MetaJSON[key] = json.RawMessage(value)
	return nil
}

// userTimeout is TCP_USER_TIMEOUT of the connections to the network (spec 1), 0 for none.
func (c *Config) userTimeout() time.Duration {
	if !c.Net.UserTimeout {
		return 0
	}
	return c.Net.KeepaliveTime + time.Duration(c.Net.KeepaliveRetries)*c.Net.KeepaliveInterval
}

// wildcard is the address that a server of this daemon binds to serve the network.
func (c *Config) wildcard(port uint16) netip.AddrPort {
	if c.Net.IPv6 {
		return netip.AddrPortFrom(netip.IPv6Unspecified(), port)
	}
	return netip.AddrPortFrom(netip.IPv4Unspecified(), port)
}

const loopbackSetting = "/proc/sys/net/ipv6/conf/lo/disable_ipv6"

// loopbackIPv6 reports whether ::1 can be bound (spec controlplane 1.2).
func (c *Config) loopbackIPv6() bool {
	if !c.Net.IPv6 {
		return false
	}
	b, err := os.ReadFile(loopbackSetting)
	return err != nil || strings.TrimSpace(string(b)) != "1"
}
