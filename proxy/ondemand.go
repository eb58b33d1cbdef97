package proxy

import (
	"cmp"
	"context"
	"sync"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"ztun/proxy/route"
	"ztun/proxy/state"
)

// resolve fills in the address of a destination that is known by hostname only (spec 2.6). count: it is to be used.
func (p *Proxy) resolve(local *state.Workload, d route.Decision, count bool) (route.Decision, error) {
	if d.Hostname == "" {
		return d, nil
	}
	if count {
		p.o.OnDemandDNS.count(local, d.Hostname)
	}
	ctx, cancel := context.WithTimeout(p.ctx, connectTimeout)
	defer cancel()
	addrs, err := p.o.Resolver.LookupNetIP(ctx, "ip", d.Hostname)
	if err != nil {
		return d, d.ResolveFailed()
	}
	return d.Resolved(addrs, p.o.Random)
}

// OnDemandDNS counts uses of workloads' hostnames, cached or not: istio_on_demand_dns_total of spec
// 10.1. One for all pods. It is a prometheus.Collector with labels in ztunnel's order. A nil one counts
// nothing.
type OnDemandDNS struct {
	desc *prometheus.Desc

	mu     sync.RWMutex
	counts map[onDemandLabels]*atomic.Uint64
}

// onDemandLabels are the values of onDemandNames.
type onDemandLabels [9]string

var onDemandNames = [len(onDemandLabels{})]string{
	"source_workload", "source_canonical_service", "source_canonical_revision", "source_workload_namespace",
	"source_principal", "source_app", "source_version", "source_cluster", "hostname",
}

// maxOnDemand bounds the label sets that are kept apart; further ones are counted together, all their
// labels being "overflow".
const maxOnDemand = 5000

// NewOnDemandDNS makes an empty set.
func NewOnDemandDNS() *OnDemandDNS {
	return &OnDemandDNS{
		desc: prometheus.NewDesc("istio_on_demand_dns_total",
			"The total number of requests that used on-demand DNS (unstable).", onDemandNames[:], nil),
		counts: map[onDemandLabels]*atomic.Uint64{},
	}
}

func (o *OnDemandDNS) count(w *state.Workload, hostname string) {
	if o == nil {
		return
	}
	l := onDemandLabels{w.WorkloadName, w.CanonicalName, w.CanonicalRevision, w.Namespace, w.Identity().String(),
		w.CanonicalName, w.CanonicalRevision, w.ClusterID, hostname}
	o.mu.RLock()
	n := o.counts[l]
	o.mu.RUnlock()
	if n == nil {
		o.mu.Lock()
		if _, known := o.counts[l]; !known && len(o.counts) >= maxOnDemand {
			for i := range l {
				l[i] = overflow
			}
		}
		if n = o.counts[l]; n == nil {
			n = new(atomic.Uint64)
			o.counts[l] = n
		}
		o.mu.Unlock()
	}
	n.Add(1)
}

// Describe sends nothing: the collector is unchecked, since its label order is not client_golang's.
func (o *OnDemandDNS) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (o *OnDemandDNS) Collect(ch chan<- prometheus.Metric) {
	o.mu.RLock()
	defer o.mu.RUnlock()
	for l, n := range o.counts {
		ch <- sample{desc: o.desc, pairs: l.pairs(), counter: true, value: float64(n.Load())}
	}
}

// pairs are the labels in ztunnel's order; empty ones are unknown.
func (l *onDemandLabels) pairs() []*dto.LabelPair {
	out := make([]*dto.LabelPair, len(l))
	for i, v := range l {
		out[i] = pair(onDemandNames[i], cmp.Or(v, "unknown"))
	}
	return out
}
