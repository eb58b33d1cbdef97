package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"ztun/test/lab"
	"ztun/test/load"
)

const observabilityDir = "../../scripts/observability"

// istioDashboard are the queries of Istio's own dashboard "Istio Ztunnel Dashboard" (istio/istio,
// manifests/addons/dashboards, ztunnel.libsonnet, and the Perses one, which adds the messages) that ask ztunnel.
// moves: the answer must be above zero, or below with the minus sign, under traffic; label is what the legend names.
var istioDashboard = []struct {
	query, label string
	moves        bool
}{
	{`sum(istio_build{component="ztunnel"}) by (tag)`, "tag", true},
	{`sum by (pod) (rate(istio_tcp_connections_opened_total{pod=~"ztunnel-.*"}[$__rate_interval]))`, "pod", true},
	{`-sum by (pod) (rate(istio_tcp_connections_closed_total{pod=~"ztunnel-.*"}[$__rate_interval]))`, "pod", true},
	{`sum by (pod) (rate(istio_tcp_sent_bytes_total{pod=~"ztunnel-.*"}[$__rate_interval]))`, "pod", true},
	{`sum by (pod) (rate(istio_tcp_received_bytes_total{pod=~"ztunnel-.*"}[$__rate_interval]))`, "pod", true},
	{`sum by (pod) (rate(istio_dns_requests_total{pod=~"ztunnel-.*"}[$__rate_interval]))`, "pod", true},
	{`sum by (pod) (rate(istio_xds_connection_terminations_total{pod=~"ztunnel-.*"}[$__rate_interval]))`, "pod", false},
	{`sum by (pod) (workload_manager_active_proxy_count{pod=~"ztunnel-.*"})`, "pod", true},
	{`sum by (pod) (workload_manager_pending_proxy_count{pod=~"ztunnel-.*"})`, "pod", false},
	{`sum by (url) (irate(istio_xds_message_total{pod=~"ztunnel-.*"}[$__rate_interval]))`, "url", false},
}

// Its two other queries, container_memory_working_set_bytes and container_cpu_usage_seconds_total of the container
// istio-proxy in pods ztunnel-.*, ask kubelet's cAdvisor and not the process. None asks istiod.

// rare are metrics of our dashboard that this test does not bring about: they appear with their first event. Their
// queries must parse.
var rare = regexp.MustCompile(`ztun_bounded_total|ztun_xds_rejected_now|ztun_ca_failures_total`)

// dashboardQueries are the expressions of our dashboard.
func dashboardQueries(t testing.TB) []string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(observabilityDir, "dashboard.json"))
	must(t, err)
	var d struct {
		Panels []struct{ Targets []struct{ Expr string } }
	}
	must(t, json.Unmarshal(b, &d))
	var all []string
	for _, p := range d.Panels {
		for _, q := range p.Targets {
			all = append(all, q.Expr)
		}
	}
	return all
}

// prometheus is a server that scrapes both nodes in two ways: as a list of addresses does, and as Istio's Prometheus
// does in Kubernetes, where the scrape sets `pod` and what we export under that name becomes exported_pod.
type prometheus struct {
	m *mesh
}

const prometheusAddr = "127.0.0.1:9090"

func (m *mesh) prometheus() *prometheus {
	m.t.Helper()
	needTool(m.t, "prometheus")
	rules, err := filepath.Abs(filepath.Join(observabilityDir, "alerts.yml"))
	must(m.t, err)
	var bare, kube strings.Builder
	for _, n := range m.Nodes() {
		target := lab.HostPort(n.Addr4, lab.StatsPort)
		fmt.Fprintf(&bare, "      - {targets: ['%s'], labels: {instance: 'bare-%s'}}\n", target, n.Name)
		fmt.Fprintf(&kube, "      - {targets: ['%s'], labels: {instance: 'kube-%s', pod: 'ztunnel-%[2]s', namespace: "+
			"istio-system, app: ztunnel}}\n", target, n.Name)
	}
	dir := m.Path("prometheus")
	must(m.t, os.MkdirAll(dir, 0o755))
	must(m.t, os.WriteFile(dir+"/prometheus.yml", fmt.Appendf(nil, `global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}
rule_files: ['%s']
scrape_configs:
  - job_name: ztun
    static_configs:
%s  - job_name: kubernetes-pods
    static_configs:
%s  - job_name: control
    static_configs: [{targets: ['127.0.0.1:15014']}]
`, rules, bare.String(), kube.String()), 0o644))
	// Its log says that it is ready before it has read anything; alerts and queries wait for more anyway.
	m.background(m.N1.NS, "ready to receive web requests", "prometheus", "--config.file="+dir+"/prometheus.yml",
		"--storage.tsdb.path="+dir+"/data",
		"--web.listen-address="+prometheusAddr)
	return &prometheus{m}
}

// get asks the HTTP API and decodes its data.
func (p *prometheus) get(path string, query url.Values, data any) error {
	req, err := http.NewRequestWithContext(p.m.ctx, http.MethodGet, "http://"+prometheusAddr+path+"?"+query.Encode(), nil)
	if err != nil {
		return err
	}
	resp, err := p.m.N1.NS.HTTP(20 * time.Second).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	var reply struct {
		Status, Error string
		Data          json.RawMessage
	}
	if err := json.Unmarshal(b, &reply); err != nil {
		return fmt.Errorf("%s: %.200s", resp.Status, b)
	}
	if reply.Status != "success" {
		return errors.New(reply.Error)
	}
	return json.Unmarshal(reply.Data, data)
}

type promSample struct {
	Metric map[string]string
	Value  [2]any
}

// query evaluates an expression of a dashboard whose variable $instance has the given value.
func (p *prometheus) query(expr, instance string) ([]promSample, error) {
	expr = strings.NewReplacer("$__rate_interval", "1m", "$instance", instance).Replace(expr)
	var data struct{ Result []promSample }
	err := p.get("/api/v1/query", url.Values{"query": {expr}}, &data)
	return data.Result, err
}

// quiet says which alerts have not been evaluated after a time, are broken, or are about to fire.
func (p *prometheus) quiet(since time.Time) error {
	var data struct {
		Groups []struct {
			Rules []struct {
				Name, State, Health, LastError string
				LastEvaluation                 time.Time
			}
		}
	}
	if err := p.get("/api/v1/rules", nil, &data); err != nil {
		return err
	}
	var errs []error
	n := 0
	for _, g := range data.Groups {
		for _, r := range g.Rules {
			n++
			if r.LastEvaluation.Before(since) || r.Health != "ok" || r.State != "inactive" {
				errs = append(errs, fmt.Errorf("%s: %s, %s %s", r.Name, r.Health, r.State, r.LastError))
			}
		}
	}
	if n == 0 {
		errs = append(errs, errors.New("no rules are loaded"))
	}
	return errors.Join(errs...)
}

// TestDashboards: a real Prometheus reads both nodes. Our alerts are quiet on healthy ones; each query of Istio's own
// ztunnel dashboard and of ours has an answer, however the scrape names its targets.
func TestDashboards(t *testing.T) {
	c := newControlled(t, false, nil)
	newNameserver(t, c.h2.NS, c.h2.IPs)
	p := c.prometheus()
	c.echoServer(c.c.NS, ":9100")
	ctx, cancel := context.WithCancel(c.ctx)
	bytes, err := c.talk(ctx, c.a.NS, lab.HostPort(c.c.V4(), 9100), 50*time.Millisecond)
	must(t, err)
	defer func() { cancel(); <-bytes.end }()
	round := func(to string, ok bool) {
		t.Helper()
		if r := load.DialOnce(c.ctx, load.Target{Addr: to, Dial: c.a.NS.Dial}); r.OK != ok {
			t.Fatalf("%s: %+v", to, r)
		}
	}
	good := func() {
		round(lab.HostPort(c.c.IPs[0], 9000), true)
		round(lab.HostPort(c.h2.IPs[0], 9000), true)
	}
	good()
	eventually(t, 30*time.Second, func() error {
		up, err := p.query(`sum(up)`, "")
		if err == nil && (len(up) != 1 || up[0].Value[1] != "5") {
			err = fmt.Errorf("targets up: %v", up)
		}
		return err
	})
	scraped := time.Now()
	eventually(t, 30*time.Second, func() error { return p.quiet(scraped) })

	// Now what appears with its first event: a stream to the control plane that ends, a connection that fails, names.
	c.process.Kill()
	c.startControl()
	ours := dashboardQueries(t)
	if len(ours) < 40 {
		t.Fatalf("the dashboard has %d queries", len(ours))
	}
	eventually(t, 60*time.Second, func() error {
		good()
		round(lab.HostPort(c.c.IPs[0], 9999), false)
		if _, err := ask(c.a.NS, netip.AddrPortFrom(c.h2.V4(), 53), "elsewhere.example."); err != nil {
			return err
		}
		ask(c.a.NS, netip.AddrPortFrom(c.h1.V4(), 53), "elsewhere.example.") // nobody answers there
		var errs []error
		for _, q := range istioDashboard {
			got, err := p.query(q.query, "")
			switch {
			case err != nil:
				return fmt.Errorf("%s: %w", q.query, err)
			case len(got) == 0:
				errs = append(errs, fmt.Errorf("Istio's %s: nothing", q.query))
			}
			for _, s := range got {
				if v := s.Value[1]; s.Metric[q.label] == "" || q.moves && (v == "0" || v == "-0") {
					errs = append(errs, fmt.Errorf("Istio's %s: %v", q.query, s))
				}
			}
		}
		for _, q := range ours {
			for _, instance := range []string{"bare-.*", "kube-.*"} {
				if got, err := p.query(q, instance); err != nil {
					return fmt.Errorf("%s: %w", q, err)
				} else if len(got) == 0 && !rare.MatchString(q) {
					errs = append(errs, fmt.Errorf("%s (%s): nothing", q, instance))
				}
			}
		}
		return errors.Join(errs...)
	})
}
