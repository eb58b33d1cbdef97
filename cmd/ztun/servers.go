package main

import (
	"context"
	"io"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"ztun/admin"
	"ztun/admin/xds"
	"ztun/proxy"
	"ztun/proxy/state"
)

// bindReadiness starts 15021 first of all: a probe during start-up is answered "not ready", not refused.
func (d *daemon) bindReadiness() error {
	s, err := admin.NewReadiness(admin.ReadinessOptions{Port: d.c.ReadinessPort, IPv6: d.c.IPv6, Ready: d.ready, Logger: d.log.Logger("readiness")})
	return d.bound("readiness", s, err)
}

// bindAdmin starts 15000 and 15020.
func (d *daemon) bindAdmin() error {
	a, err := admin.NewAdmin(admin.AdminOptions{
		Port: d.c.AdminPort, IPv6: d.c.loopbackIPv6(), Logging: d.log, Dump: d.dump, Quit: d.askToQuit, Logger: d.log.Logger("admin"),
	})
	if err := d.bound("admin", a, err); err != nil {
		return err
	}
	registry := prometheus.NewRegistry()
	d.registry = registry
	s, err := admin.NewStats(admin.StatsOptions{
		Port: d.c.StatsPort, IPv6: d.c.IPv6, Registry: registry, Ordered: []prometheus.Collector{d.metrics}, Logger: d.log.Logger("stats"),
	})
	if err := d.bound("stats", s, err); err != nil {
		return err
	}
	registry.MustRegister(
		admin.ProcessCollector(),
		admin.BuildCollector(d.c.IstioVersion),
		admin.WorkloadManagerCollector(func() admin.WorkloadManagerStats {
			active, pending := d.pods.counts()
			return admin.WorkloadManagerStats{Active: active, Pending: pending, Started: d.pods.started.Load(), Stopped: d.pods.stopped.Load()}
		}),
		admin.GoCollector(),
		admin.SelfCollector(admin.SelfSources{Loop: d.loop, Servers: d.servers, Log: func() admin.LogStats {
			s := d.log.Stats()
			return admin.LogStats{Queued: s.Queued, Lines: s.Lines, Batches: s.Batches, Waits: s.Waits, Dropped: s.Dropped, WriteErrors: s.WriteErrors}
		}}),
	)
	return nil
}

func (d *daemon) bound(name string, s *admin.Server, err error) error {
	if err != nil {
		return err
	}
	d.servers = append(d.servers, s)
	d.serve(name+" server", s.Serve)
	return nil
}

// dump gives the sections of /config_dump, all of one moment.
func (d *daemon) dump() map[string]admin.Section {
	view := d.loop.View()
	raw := func(write func(io.Writer, *state.View) error) admin.Section {
		return func(_ context.Context, e *admin.Encoder) error {
			return e.Raw(func(w io.Writer) error { return write(w, view) })
		}
	}
	return map[string]admin.Section{
		"certificates":   admin.SectionOf(func() any { return d.certs.Dump() }),
		"config":         admin.SectionOf(func() any { return d.c.dump() }),
		"policies":       raw(xds.WritePolicies),
		"services":       raw(xds.WriteServices),
		"stagedServices": raw(xds.WriteStaged),
		"staticConfig": func(_ context.Context, e *admin.Encoder) error {
			// Read again at this moment, as ztunnel does; a broken file shows as empty.
			l, err := (&xds.File{Path: d.c.LocalXDSPath, Inline: d.c.LocalXDS}).Load()
			if err != nil {
				l = nil
			}
			return e.Raw(func(w io.Writer) error { return xds.WriteStatic(w, l) })
		},
		"version":       admin.SectionOf(func() any { return d.version() }),
		"workloads":     raw(xds.WriteWorkloads),
		"workloadState": admin.SectionOf(func() any { return d.workloadState() }),
	}
}

func (d *daemon) version() map[string]string {
	version, revision := buildVersion()
	return map[string]string{
		"version": version, "gitRevision": revision, "rustVersion": "", "buildProfile": "release", "buildStatus": "",
		"istioVersion": d.c.IstioVersion, "cryptoProvider": "go",
	}
}

// The shapes of workloadState (samples/config_dump-inpod-*.json).
type (
	podState struct {
		Connections *podConnections `json:"connections,omitempty"`
		Info        podInfo         `json:"info"`
		State       string          `json:"state"`
	}
	podConnections struct {
		Inbound  []podConnection `json:"inbound"`
		Outbound []podConnection `json:"outbound"`
	}
	podConnection struct {
		ActualDst   string  `json:"actualDst"`
		OriginalDst *string `json:"originalDst"`
		Protocol    string  `json:"protocol"`
		Src         string  `json:"src"`
	}
	podInfo struct {
		Name           string `json:"name"`
		Namespace      string `json:"namespace"`
		ServiceAccount string `json:"serviceAccount"`
	}
)

func infoOf(s admin.PodSpec) podInfo {
	return podInfo{Name: s.Name, Namespace: s.Namespace, ServiceAccount: s.ServiceAccount}
}

// workloadState lists the pods by namespace/name, which is what identifies a pod that no node agent gave
// a uid to.
func (d *daemon) workloadState() map[string]podState {
	out := map[string]podState{}
	for _, s := range d.pods.List() {
		out[refOf(s.PodSpec).String()] = podState{Info: infoOf(s.PodSpec), State: "Pending"}
	}
	for _, p := range d.pods.all() {
		c := &podConnections{Inbound: []podConnection{}, Outbound: []podConnection{}}
		// Streams of one tunnel to one port are one inbound entry, as in ztunnel.
		seen := map[proxy.Connection]bool{}
		for _, x := range p.proxy.Connections() {
			if x.Inbound && seen[x] {
				continue
			}
			seen[x] = true
			pc := podConnection{ActualDst: x.ActualDst.String(), Protocol: x.Protocol, Src: x.Src.String()}
			if x.OriginalDst != (netip.AddrPort{}) {
				t := x.OriginalDst.String()
				pc.OriginalDst = &t
			}
			if x.Inbound {
				c.Inbound = append(c.Inbound, pc)
			} else {
				c.Outbound = append(c.Outbound, pc)
			}
		}
		out[refOf(p.spec).String()] = podState{Connections: c, Info: infoOf(p.spec), State: "Up"}
	}
	return out
}

// dump is the configuration under ztunnel's names and in its encodings (spec controlplane 1.2, 6.3),
// with our own settings beside them.
func (c *Config) dump() map[string]any {
	dur := func(d time.Duration) any {
		return map[string]any{"nanos": int64(d % time.Second), "secs": int64(d / time.Second)}
	}
	socket := func(port uint16) any { return map[string]string{"SocketAddr": c.wildcard(port).String()} }
	orNull := func(s string) any {
		if s == "" {
			return nil
		}
		return s
	}
	return map[string]any{
		"adminAddr":                map[string]any{"Localhost": []any{c.loopbackIPv6(), c.AdminPort}},
		"altCaHostname":            nil,
		"altXdsHostname":           nil,
		"caAddress":                nil,
		"caHeaders":                []string{},
		"caRootCert":               "Static",
		"clusterDomain":            c.ClusterDomain,
		"clusterId":                c.ClusterID,
		"connectionWindowSize":     c.ConnWindow,
		"crlPath":                  nil,
		"dnsProxy":                 false,
		"enableEnhancedBaggage":    c.ResponseBaggage,
		"fakeCa":                   c.FakeCA,
		"fakeSelfInbound":          false,
		"frameSize":                c.FrameSize,
		"illegalPorts":             []int{15006, 15001, 15008},
		"inboundAddr":              c.wildcard(15008).String(),
		"inboundPlaintextAddr":     c.wildcard(15006).String(),
		"inpodPortReuse":           true,
		"inpodUds":                 nil,
		"ipv6Enabled":              c.IPv6,
		"localCaDir":               orNull(c.LocalCADir),
		"localNode":                orNull(c.NodeName),
		"localhostAppTunnel":       true,
		"network":                  c.Network,
		"numWorkerThreads":         c.WorkerThreads,
		"outboundAddr":             c.wildcard(15001).String(),
		"packetMark":               c.PacketMark,
		"poolMaxStreamsPerConn":    c.PoolMaxStreams,
		"poolUnusedReleaseTimeout": dur(c.PoolUnused),
		"preferedServiceNamespace": nil,
		"proxy":                    true,
		"proxyArgs":                "proxy",
		"proxyMetadata":            map[string]string{},
		"proxyMode":                "Shared",
		"proxyWorkloadInformation": nil,
		"readinessAddr":            socket(c.ReadinessPort),
		"requireOriginalSource":    nil,
		"secretTtl":                dur(c.SecretTTL),
		"selfTerminationDeadline":  dur(c.TerminationDeadline),
		"socketConfig": map[string]any{
			"keepaliveEnabled": c.KeepaliveEnabled, "keepaliveInterval": dur(c.KeepaliveInterval), "keepaliveRetries": c.KeepaliveRetries,
			"keepaliveTime": dur(c.KeepaliveTime), "userTimeoutEnabled": c.UserTimeout,
		},
		"socks5Addr":      nil,
		"statsAddr":       socket(c.StatsPort),
		"windowSize":      c.StreamWindow,
		"xdsAddress":      nil,
		"xdsHeaders":      []string{},
		"xdsOnDemand":     false,
		"xdsRootCert":     "Static",
		"ztunnelIdentity": nil,
		"ztunnelWorkload": nil,
		"ztun": map[string]any{
			"maxInFlight": c.MaxInFlight, "maxInFlightPerDestination": c.MaxInFlightPerDestination, "mtu": c.MTU,
			"nodeTun": c.NodeTUN, "socket": c.Socket, "stateDir": c.StateDir, "tunPlain": c.TUNPlain,
		},
	}
}
