package main

import (
	"context"
	"io"

	"github.com/prometheus/client_golang/prometheus"

	"ztun/admin"
	"ztun/admin/xds"
	"ztun/proxy/state"
)

// bindReadiness starts 15021 first of all: a probe during start-up is answered "not ready", not refused.
func (d *daemon) bindReadiness() error {
	at, port, wanted := d.c.Admin.readiness()
	if !wanted {
		return nil
	}
	s, err := admin.NewReadiness(admin.ReadinessOptions{At: at, Port: port, IPv6: d.c.Net.IPv6, Ready: d.ready,
		Report: d.report, Logger: d.log.Logger("readiness")})
	return d.bound("readiness", s, err)
}

// bindAdmin starts 15000 and 15020.
func (d *daemon) bindAdmin() error {
	if port, wanted := d.c.Admin.page(); wanted {
		a, err := admin.NewAdmin(admin.AdminOptions{
			Port: port, IPv6: d.c.loopbackIPv6(), Logging: d.log, Dump: d.dump, Connections: d.connections(),
			Quit:     d.askToQuit,
			Overview: d.overview, Meter: d.meter, Ready: d.ready,
			Token: d.c.Admin.TokenFile, Report: d.report, Logger: d.log.Logger("admin"),
		})
		if err := d.bound("admin", a, err); err != nil {
			return err
		}
	}
	at, port, wanted := d.c.Admin.stats()
	if !wanted {
		return nil // nor does anybody collect, which is not made for nothing
	}
	registry := prometheus.NewRegistry()
	d.registry = registry
	stats, err := admin.NewStats(admin.StatsOptions{
		At: at, Port: port, IPv6: d.c.Net.IPv6, Registry: registry, Ordered: d.ordered(), Report: d.report,
		Logger: d.log.Logger("stats"),
	})
	if err := d.bound("stats", stats, err); err != nil {
		return err
	}
	registry.MustRegister(
		admin.ProcessCollector(),
		admin.BuildCollector(d.c.Self.IstioVersion),
		admin.VersionCollector(buildVersion()),
		admin.WorkloadManagerCollector(func() admin.WorkloadManagerStats {
			active, pending := d.pods.counts()
			return admin.WorkloadManagerStats{Active: active, Pending: pending, Started: d.pods.started.Load(),
				Stopped: d.pods.stopped.Load()}
		}),
		admin.GoCollector(),
		admin.RuntimeCollector(admin.RuntimeSources{Workers: d.c.Process.WorkerThreads, AdminTasks: func() int {
			return int(d.tasks.Load())
		}, Servers: d.servers}),
		admin.XDSCollector(d.xdsStats),
		&controlCollector{d: d, tables: newMetricTables()},
		admin.SelfCollector(admin.SelfSources{Loop: d.loop, Servers: d.servers, Log: func() admin.LogStats {
			s := d.log.Stats()
			return admin.LogStats{Queued: s.Queued, Lines: s.Lines, Batches: s.Batches, Waits: s.Waits, Dropped: s.Dropped,
				WriteErrors: s.WriteErrors}
		}}),
	)
	return nil
}

// ordered are the collectors whose labels come out as ztunnel's do.
func (d *daemon) ordered() []prometheus.Collector {
	all := []prometheus.Collector{d.metrics, d.onDemandDNS}
	if d.dnsMetrics != nil {
		all = append(all, d.dnsMetrics)
	}
	return all
}

// xdsStats are the figures of the client of the control plane; false: there is none.
func (d *daemon) xdsStats() (admin.XDSStats, bool) {
	client := d.xds.Load() // a scrape may come before it is made
	if client == nil {
		return admin.XDSStats{}, false
	}
	s := client.Stats()
	rejected := map[string]int{}
	for url, names := range s.Rejected {
		rejected[url] = len(names)
	}
	return admin.XDSStats{
		ConnectionErrors: s.Terminations["ConnectionError"], Errors: s.Terminations["Error"],
		Reconnects: s.Terminations["Reconnect"], Completes: s.Terminations["Complete"],
		Messages: s.Messages, Bytes: s.MessageBytes, Refused: s.Refused, Rejected: rejected, Connected: s.Connected,
		LookupsWaiting: s.Waiting, LookupsFull: s.DemandsFull, LookupsUnanswered: s.DemandsUnanswered,
		LookupsRecalled: s.DemandsRecalled,
	}, true
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
	sections := map[string]admin.Section{
		"certificates":   admin.SectionOf(func() any { return d.certs.Dump() }),
		"config":         admin.SectionOf(func() any { return d.c.dump() }),
		"policies":       raw(xds.WritePolicies),
		"services":       raw(xds.WriteServices),
		"stagedServices": raw(xds.WriteStaged),
		// The file as it is at this moment, as in ztunnel; a broken one shows as empty.
		"staticConfig":  func(_ context.Context, e *admin.Encoder) error { return e.Raw(d.static.Write) },
		"version":       admin.SectionOf(func() any { return d.version() }),
		"workloads":     raw(xds.WriteWorkloads),
		"workloadState": admin.WorkloadState(d.podDumps),
	}
	// Only where there are any: the keys are ztunnel's as long as nothing is amiss.
	if missing := d.policies.Dump(); len(missing) > 0 {
		sections["unknownPolicies"] = admin.SectionOf(func() any { return missing })
	}
	return sections
}

func (d *daemon) version() map[string]string {
	version, revision := buildVersion()
	return map[string]string{
		"version": version, "gitRevision": revision, "rustVersion": "", "buildProfile": "release", "buildStatus": "",
		"istioVersion": d.c.Self.IstioVersion, "cryptoProvider": "go",
	}
}

// podDumps are the entries of workloadState, by uid.
func (d *daemon) podDumps() map[string]func() admin.PodDump {
	out := map[string]func() admin.PodDump{}
	for _, s := range d.pods.List() {
		out[uidOf(s.PodSpec)] = func() admin.PodDump { return dumpOf(s.PodSpec) }
	}
	for _, p := range d.pods.all() {
		out[p.uid] = func() admin.PodDump {
			e := dumpOf(p.spec)
			e.Up = true
			// Streams of one tunnel to one port are one inbound entry, as in ztunnel.
			seen := map[admin.ConnectionDump]bool{}
			for x := range p.proxy.Live() {
				c := admin.ConnectionDump{Src: x.Source.Addr, ActualDst: x.Destination.Addr, Protocol: x.Protocol}
				switch {
				case x.Direction == "outbound":
					if c.OriginalDst = x.Called; !c.OriginalDst.IsValid() {
						c.OriginalDst = c.ActualDst
					}
					e.Outbound = append(e.Outbound, c)
				case !seen[c]:
					seen[c] = true
					// OriginalDst is null in ztunnel (samples/config_dump-inpod-b.json); istioctl shows it as the target.
					e.Inbound = append(e.Inbound, c)
				}
			}
			return e
		}
	}
	return out
}

func dumpOf(s admin.PodSpec) admin.PodDump {
	return admin.PodDump{Name: s.Name, Namespace: s.Namespace, ServiceAccount: s.ServiceAccount}
}
