package main

import (
	"fmt"
	"net/http"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"ztun/admin/agent"
	"ztun/admin/zds"
	"ztun/cmd/cni"
)

// figures are all that can be seen of an agent.
type figures struct {
	zds    zds.ServerStats
	agent  agent.Stats
	cni    cni.Stats
	failed uint64
}

// metric is one of them. Those whose names end in _total only grow.
type metric struct {
	name, help string
	get        func(*figures) float64
}

// metrics are names by which dashboards and alerts know the agent: to be changed like an interface.
func metrics() []metric {
	m := func(name, help string, get func(*figures) float64) metric {
		return metric{"ztun_agent_" + name, help, get}
	}
	return []metric{
		m("pods", "Pods of this node that the proxies are to have.", func(f *figures) float64 { return float64(f.zds.Pods) }),
		m("proxies", "Proxies that are connected.", func(f *figures) float64 { return float64(f.zds.Proxies) }),
		m("proxies_complete", "Proxies that have acknowledged their snapshot.", func(f *figures) float64 {
			return float64(f.zds.Complete)
		}),
		m("proxy_connections_total", "Connections of proxies.", func(f *figures) float64 {
			return float64(f.zds.Connections)
		}),
		m("proxy_turned_away_total", "Connections of proxies for which there was no place.", func(f *figures) float64 {
			return float64(f.zds.Turned)
		}),
		m("proxy_timeouts_total", "Connections of proxies ended because no hello or acknowledgement came.",
			func(f *figures) float64 { return float64(f.zds.TimedOut) }),
		m("adds_total", "Pods sent to a proxy, with their network namespaces.", func(f *figures) float64 {
			return float64(f.zds.Adds)
		}),
		m("keeps_total", "Pods that a proxy was told to keep, since nobody knows their network namespaces.",
			func(f *figures) float64 { return float64(f.zds.Keeps) }),
		m("dels_total", "Pods that a proxy was told to let go.", func(f *figures) float64 { return float64(f.zds.Dels) }),
		m("adds_refused_total", "Pods that a proxy has refused.", func(f *figures) float64 { return float64(f.zds.Refused) }),
		m("pods_full_total", "Pods for which there was no place.", func(f *figures) float64 { return float64(f.zds.Full) }),
		m("announced_total", "Pods annotated as captured.", func(f *figures) float64 { return float64(f.agent.Announced) }),
		m("released_total", "Running pods that were let go.", func(f *figures) float64 { return float64(f.agent.Released) }),
		m("plugin_added_total", "Pods that the CNI plugin asked for and that were captured before they started.",
			func(f *figures) float64 { return float64(f.agent.PluginAdded) }),
		m("plugin_left_total", "Pods that the CNI plugin asked for and that are not the mesh's.", func(f *figures) float64 {
			return float64(f.agent.PluginLeft)
		}),
		m("plugin_failed_total", "Requests of the CNI plugin that failed: the pod did not start.",
			func(f *figures) float64 { return float64(f.agent.PluginFail) }),
		m("cni_writes_total", "Times that the node's network configuration was written: once, and each time that another "+
			"CNI took ztun's plugin out.", func(f *figures) float64 { return float64(f.cni.Writes) }),
		m("cni_failures_total", "Times that the CNI plugin was looked for and could not be put in place.",
			func(f *figures) float64 { return float64(f.cni.Failures) }),
		m("reconcile_failures_total", "Times that a pod was looked at in vain.", func(f *figures) float64 {
			return float64(f.failed)
		}),
	}
}

// collector exports an agent's figures at each scrape.
type collector struct {
	get func() figures
}

// Describe implements prometheus.Collector: what there is is seen when it is collected.
func (c collector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	f := c.get()
	for _, m := range metrics() {
		kind := prometheus.GaugeValue
		if strings.HasSuffix(m.name, "_total") {
			kind = prometheus.CounterValue
		}
		ch <- prometheus.MustNewConstMetric(prometheus.NewDesc(m.name, m.help, nil, nil), kind, m.get(&f))
	}
}

func (n *node) figures() figures {
	f := figures{zds: n.proxies.Stats(), agent: n.enroller.Stats(), failed: n.failed.Load()}
	if n.plugin != nil {
		f.cni = n.plugin.Stats()
	}
	return f
}

// visible serves readiness and metrics.
func (n *node) visible() http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collector{n.figures}, collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	mux.HandleFunc("GET /healthz/ready", func(w http.ResponseWriter, _ *http.Request) {
		if err := n.ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		s := n.proxies.Stats()
		fmt.Fprintf(w, "ready: %d pods of the mesh, %d proxies\n", s.Pods, s.Proxies)
	})
	return mux
}
