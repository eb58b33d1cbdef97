// Package observability holds the tests of scripts/observability: alert rules and a Grafana dashboard. They name
// metrics and labels that exist (docs/metrics.md, which is compared with running daemons), and promtool accepts and
// tests the rules. That the queries have answers from a real scrape is test/e2e.TestDashboards.
package observability

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

const dir = "../../scripts/observability"

// read decodes a YAML or JSON file.
func read(t *testing.T, name string, into any) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(b, into); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

type rule struct {
	Alert, Expr string
	Labels      map[string]string
	Annotations map[string]string
}

func rules(t *testing.T) []rule {
	t.Helper()
	var f struct{ Groups []struct{ Rules []rule } }
	read(t, "alerts.yml", &f)
	var all []rule
	for _, g := range f.Groups {
		all = append(all, g.Rules...)
	}
	if len(all) == 0 {
		t.Fatal("no rules")
	}
	return all
}

// TestPromtool: the rules are well-formed, and do in promtool's hands what their unit tests say.
func TestPromtool(t *testing.T) {
	tool, err := exec.LookPath("promtool")
	if err != nil {
		t.Fatalf("%v (Debian: apt-get install prometheus; .ci/run installs it)", err)
	}
	for _, args := range [][]string{{"check", "rules", "alerts.yml"}, {"test", "rules", "alerts_test.yml"}} {
		cmd := exec.Command(tool, args...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %v: %v\n%s", args, err, out)
		}
	}
}

// TestAlertsAreTested: each alert has a unit test in which it fires and one in which it is quiet, says how bad it is,
// what is the matter and what to do.
func TestAlertsAreTested(t *testing.T) {
	var f struct {
		Tests []struct {
			AlertRuleTest []struct {
				Alertname string
				ExpAlerts []any `yaml:"exp_alerts"`
			} `yaml:"alert_rule_test"`
		}
	}
	read(t, "alerts_test.yml", &f)
	fires, quiet := map[string]bool{}, map[string]bool{}
	for _, x := range f.Tests {
		for _, a := range x.AlertRuleTest {
			if len(a.ExpAlerts) > 0 {
				fires[a.Alertname] = true
			} else {
				quiet[a.Alertname] = true
			}
		}
	}
	seen := map[string]bool{}
	for _, r := range rules(t) {
		if !fires[r.Alert] || !quiet[r.Alert] {
			t.Errorf("%s: tested to fire: %v, to be quiet: %v", r.Alert, fires[r.Alert], quiet[r.Alert])
		}
		if seen[r.Alert] {
			t.Errorf("%s is there twice", r.Alert)
		}
		seen[r.Alert] = true
		if !slices.Contains([]string{"critical", "warning", "info"}, r.Labels["severity"]) ||
			r.Annotations["summary"] == "" || r.Annotations["description"] == "" {
			t.Errorf("%s has no severity, summary or description", r.Alert)
		}
	}
	for name := range fires {
		if !seen[name] {
			t.Errorf("%s is tested and not there", name)
		}
	}
}

type panel struct {
	ID      int
	Type    string
	Title   string
	GridPos struct{ H, W, X, Y int }
	Targets []struct {
		RefID, Expr string
		Datasource  struct{ UID string }
	}
}

func dashboard(t *testing.T) []panel {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "dashboard.json"))
	if err != nil {
		t.Fatal(err)
	}
	var d struct {
		Panels     []panel
		Templating struct {
			List []struct{ Name string }
		}
	}
	if err := json.Unmarshal(b, &d); err != nil {
		t.Fatal(err)
	}
	var variables []string
	for _, v := range d.Templating.List {
		variables = append(variables, v.Name)
	}
	for _, m := range regexp.MustCompile(`\$\{?([a-z]\w*)`).FindAllStringSubmatch(string(b), -1) {
		if !slices.Contains(variables, m[1]) {
			t.Errorf("the variable %s is not declared", m[1])
		}
	}
	return d.Panels
}

// TestDashboardLayout: what Grafana would not complain of but show wrongly.
func TestDashboardLayout(t *testing.T) {
	ids, taken := map[int]bool{}, map[[2]int]string{}
	for _, p := range dashboard(t) {
		if ids[p.ID] || p.ID == 0 {
			t.Errorf("%s: id %d is another panel's", p.Title, p.ID)
		}
		ids[p.ID] = true
		if p.GridPos.X+p.GridPos.W > 24 {
			t.Errorf("%s: wider than the page", p.Title)
		}
		for x := range p.GridPos.W {
			for y := range p.GridPos.H {
				at := [2]int{p.GridPos.X + x, p.GridPos.Y + y}
				if other := taken[at]; other != "" {
					t.Fatalf("%s lies on %s", p.Title, other)
				}
				taken[at] = p.Title
			}
		}
		if p.Type != "row" && len(p.Targets) == 0 {
			t.Errorf("%s asks for nothing", p.Title)
		}
		for _, q := range p.Targets {
			if q.Datasource.UID != "${datasource}" {
				t.Errorf("%s: the data source is %q", p.Title, q.Datasource.UID)
			}
		}
	}
}

// documented are the labels of the samples that docs/metrics.md has, by name as queries spell it.
func documented(t *testing.T) map[string][]string {
	t.Helper()
	b, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string][]string{"up": nil, "process_open_fds": nil, "process_max_fds": nil,
		"process_resident_memory_bytes": nil, "process_cpu_seconds_total": nil}
	for _, m := range regexp.MustCompile("(?m)^\\| `(\\w+)` \\| (\\w+) \\| [^|]* \\| ([^|]*) \\|").FindAllStringSubmatch(
		string(b), -1) {
		labels := strings.Split(strings.TrimSpace(m[3]), ", ")
		switch m[2] {
		case "counter":
			out[m[1]+"_total"] = labels
		case "histogram":
			out[m[1]+"_bucket"] = append(labels, "le")
		default:
			out[m[1]] = labels
		}
	}
	return out
}

// target are the labels that a scrape gives its series.
var target = []string{"instance", "job", "pod", "exported_pod"}

var (
	text     = regexp.MustCompile(`"[^"]*"`)
	duration = regexp.MustCompile(`\[[^\]]*\]`)
	matchers = regexp.MustCompile(`\{([^}]*)\}`)
	grouping = regexp.MustCompile(`\b(?:by|on)\s*\(([^)]*)\)`)
	name     = regexp.MustCompile(`[a-z_][a-z0-9_]*`)
	word     = regexp.MustCompile(`^(sum|min|max|count|topk|rate|increase|resets|histogram_quantile|max_over_time|time|and|or|unless)$`)
)

// TestNames: each query asks for metrics and labels that exist, so that a renamed one is found here and not in an
// empty panel.
func TestNames(t *testing.T) {
	known := documented(t)
	if len(known) < 50 {
		t.Fatalf("docs/metrics.md has %d metrics: it was misread", len(known))
	}
	queries := map[string]string{}
	for _, r := range rules(t) {
		queries[r.Expr] = r.Alert
	}
	for _, p := range dashboard(t) {
		for _, q := range p.Targets {
			queries[q.Expr] = p.Title
		}
	}
	for q, where := range queries {
		bare := duration.ReplaceAllString(text.ReplaceAllString(q, `""`), "")
		var labels []string
		for _, re := range []*regexp.Regexp{matchers, grouping} {
			for _, m := range re.FindAllStringSubmatch(bare, -1) {
				labels = append(labels, name.FindAllString(m[1], -1)...)
			}
			bare = re.ReplaceAllString(bare, "")
		}
		allowed := slices.Clone(target)
		metrics := 0
		for _, n := range name.FindAllString(bare, -1) {
			if word.MatchString(n) {
				continue
			}
			metrics++
			of, ok := known[n]
			if !ok {
				t.Errorf("%s: docs/metrics.md has no %s: %s", where, n, q)
			}
			allowed = append(allowed, of...)
		}
		if metrics == 0 {
			t.Errorf("%s: no metric was found in %s", where, q)
		}
		for _, l := range labels {
			if !slices.Contains(allowed, l) {
				t.Errorf("%s: none of its metrics has a label %s: %s", where, l, q)
			}
		}
	}
}
