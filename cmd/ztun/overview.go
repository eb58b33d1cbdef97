package main

import (
	"ztun/admin"
)

// traffic is what the pods' connections amount to, for the meter of the page on 15000.
func (d *daemon) traffic() (out, in admin.Traffic) {
	source, destination := d.metrics.Totals()
	return admin.Traffic(source), admin.Traffic(destination)
}

// overview is what the page on 15000 shows of the daemon.
func (d *daemon) overview() admin.Overview {
	view := d.loop.View()
	version, _ := buildVersion()
	o := admin.Overview{Node: d.c.Node.Name, Version: version, Started: d.started, Source: d.c.XDS.Address}
	o.Workloads, o.Services, o.Policies = view.Counts()
	if s, ok := d.xdsStats(); ok {
		o.Connected = s.Connected
		for _, n := range s.Rejected {
			o.Rejected += n
		}
	} else if o.Source, o.File = d.c.XDS.LocalPath, true; o.Source == "" {
		o.Source = "LOCAL_XDS"
	}
	d.overviewPods(&o)
	for _, c := range d.certs.Dump() {
		x := admin.OverviewCertificate{Identity: c.Identity.String(), State: c.State}
		if len(c.Chain) > 0 {
			x.From, x.Until = c.Chain[0].NotBefore, c.Chain[0].NotAfter
		}
		o.Certificates = append(o.Certificates, x)
	}
	for _, p := range view.Policies() {
		if len(o.Rules) == admin.OverviewLimit {
			break
		}
		o.Rules = append(o.Rules, admin.OverviewPolicy{
			Namespace: p.Namespace, Name: p.Name, Scope: p.Scope.String(), Action: p.Action.String(), DryRun: p.DryRun,
			Rules: len(p.Rules),
		})
	}
	for _, m := range d.policies.Dump() {
		o.Missing = append(o.Missing, admin.OverviewMissing{Policy: m.Policy, Workload: m.Workload, Decision: m.Decision,
			Since: m.Since})
	}
	o.Memory, o.MemoryBudget = d.memory.all.Used(), d.memory.all.Limit()
	return o
}

// overviewPods adds the pods with what their data planes count.
func (d *daemon) overviewPods(o *admin.Overview) {
	byUID := map[string]*pod{}
	for _, p := range d.pods.all() {
		byUID[p.uid] = p
	}
	for _, s := range d.pods.List() {
		x := admin.OverviewPod{PodStatus: s}
		if p := byUID[uidOf(s.PodSpec)]; p != nil {
			st := p.proxy.Stats().Pool
			x.Tunnels, x.Streams, x.DialFailures = st.Conns, st.Streams, st.DialFailures
			x.Memory = p.memory.Used()
		}
		o.Pods = append(o.Pods, x)
	}
}
