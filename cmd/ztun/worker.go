package main

import (
	"context"
	"net/netip"

	mrand "math/rand/v2"

	"ztun/admin"
	"ztun/cmd/attach"
	"ztun/proxy"
	"ztun/proxy/fair"
	"ztun/proxy/state"
)

// The worker runtime: what carries traffic. Each pod has an attachment, whose goroutines are netstack's, and a proxy,
// whose connections are a goroutine or two each, labelled role=worker (proxy.enter). As many processors as they need
// are procs.go's. A worker loads the View and waits for nothing of admin.go but a certificate or an on-demand
// look-up.

func (d *daemon) newPod(ctx context.Context, spec attach.Pod) (*pod, error) {
	return newPod(ctx, &podParts{c: d.c, log: d.log.Logger("pods"), kind: d.kind, panics: d.panics, proxy: d.newProxy,
		memory: d.memory,
		know:   d.know, nameservers: d.nameservers, search: d.search, dnsMetrics: d.dnsMetrics,
		dnsLog: d.log.Logger("dns")}, spec)
}

func (d *daemon) newProxy(spec admin.PodSpec, n proxy.Network, names lookup, memory *fair.Budget) *proxy.Proxy {
	c := d.c
	var demand func(context.Context, string) error
	if client := d.xds.Load(); c.XDS.OnDemand && client != nil {
		source := refOf(spec).String()
		demand = func(ctx context.Context, key string) error { return client.Demand(ctx, source, key) }
	}
	var local func(netip.Addr) *proxy.Proxy
	if c.Proxy.LocalRelay && d.pods.alone() == nil {
		local = d.pods.proxyAt
	}
	config := c.Proxy.Config
	config.NetworkName, config.TLS = c.Node.Network, d.tls()
	config.HBONE.Memory, config.HBONE.Buffers, config.HBONE.Logger = memory, &d.buffers, d.log.Logger("hbone")
	return proxy.New(proxy.Options{
		Info:    state.WorkloadInfo{Name: spec.Name, Namespace: spec.Namespace, ServiceAccount: spec.ServiceAccount},
		Network: n, Knowledge: d.know, Certs: d.certs, Resolver: d.resolve, Metrics: d.metrics, Panics: d.panics,
		Report: d.report, Handshakes: d.handshakes, Policies: d.policies, OnDemandDNS: d.onDemandDNS, Demand: demand,
		Names: names, Local: local,
		Access: d.log.Logger("access"), Log: d.log.Logger("proxy"), Random: mrand.Uint64N, Config: config,
	})
}
