package control

import (
	"io"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"ztun/admin/page"
)

func fetch(t *testing.T, url string) (string, http.Header) {
	t.Helper()
	resp, err := http.Get(url)
	check(t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	check(t, err)
	equal(t, url, resp.StatusCode, 200)
	return string(b), resp.Header
}

// TestMetrics: a scrape tells the nodes, what they have acknowledged and what was pushed; each counter of the status
// has a name.
func TestMetrics(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": workloadsYAML("x:10.0.0.1:node-a", "y:10.0.0.2:node-a")}, nil)
	defer http.DefaultClient.CloseIdleConnections()
	c := w.connect("node-a")
	c.begin(typeAddress, nil)
	url := "http://" + w.srv.AdminAddr().String() + "/metrics"
	c.ack(c.recv())
	var text string
	eventually(t, "acknowledged", func() bool {
		text, _ = fetch(t, url)
		return strings.Contains(text, `ztun_control_node_acknowledged_version{node="node-a",type="Address"} 1`)
	})
	for _, want := range []string{
		`ztun_control_node_connected{node="node-a"} 1`, `ztun_control_node_connected{node="node-b"} 0`,
		`ztun_control_node_pods{node="node-a"} 2`,
		`ztun_control_node_lag_versions{node="node-a",type="Address"} 0`,
		`ztun_control_node_rejecting{node="node-a",type="Address"} 0`,
		"ztun_control_pushes_total 1", "ztun_control_acks_total 1", "ztun_control_snapshot_workloads 2",
		"ztun_control_directory_errors 0", "process_open_fds ",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s in\n%s", want, text)
		}
	}
	for key := range w.srv.counters.values() {
		if totals[key].name == "" {
			t.Errorf("the counter %s has no name as a metric", key)
		}
	}
	equal(t, "counters", len(w.srv.counters.values()), len(totals))
	tool, err := exec.LookPath("promtool")
	if err != nil {
		t.Fatalf("%v (Debian: apt-get install prometheus; .ci/run installs it)", err)
	}
	cmd := exec.Command(tool, "check", "metrics")
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("promtool: %v\n%s", err, out)
	}
}

// TestPage: the page of a running control plane; and what nodes and files say is text.
func TestPage(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": workloadsYAML("x:10.0.0.1:node-a")}, nil)
	defer http.DefaultClient.CloseIdleConnections()
	w.connect("node-a").begin(typeAddress, nil)
	base := "http://" + w.srv.AdminAddr().String()
	eventually(t, "the node is shown", func() bool {
		body, h := fetch(t, base+"/")
		if !strings.Contains(h.Get("Content-Security-Policy"), "default-src 'none'") {
			t.Fatal(h)
		}
		return strings.Contains(body, "node-a") && strings.Contains(body, "waiting for reply") &&
			strings.Contains(body, "ns/x")
	})
	req, err := http.NewRequest("GET", base+"/", nil)
	check(t, err)
	req.Host = "evil.example"
	resp, err := http.DefaultClient.Do(req)
	check(t, err)
	resp.Body.Close()
	equal(t, "a foreign Host", resp.StatusCode, 403)

	tags := regexp.MustCompile(`<[^>]*>`)
	times := regexp.MustCompile(`(?:datetime|title|data-key)="[^"]*"`)
	shape := func(x string) string {
		now := time.Now()
		p, err := page.New(pageText, func() any {
			problem := []Problem{{File: x, Line: 1, Key: x, Text: x}}
			return pageOf(Status{Now: now, Listen: []string{x}, Snapshot: SnapshotStatus{Version: 1, PublishedAt: now,
				ErrorCount: 1, Errors: problem, Warnings: problem},
				Certificate: CertificateStatus{NotAfter: now.Add(time.Hour), Error: x}, Revoked: RevocationStatus{Problem: x},
				Problems: problem, NotJoined: []string{x}, Counters: map[string]uint64{"messages": 1},
				Nodes: []NodeStatus{{Node: x, Connected: true, Since: now, Peer: x, Auth: x, ID: x,
					CertificateNotAfter: now.Add(time.Hour), CertificateProblem: x, Pods: 1, PodNames: []string{x},
					Types: []TypeStatus{{Type: x, NACKs: 1, LastNACK: x, LastNACKAt: now, Rejecting: true, Lag: 1, LagSeconds: 5}}}}})
		})
		check(t, err)
		rec := httptest.NewRecorder()
		p.ServeHTTP(rec, httptest.NewRequest("GET", "/", nil))
		equal(t, "status", rec.Code, 200)
		if strings.Contains(rec.Body.String(), "\u202e") {
			t.Errorf("%q turns the text around", x)
		}
		return times.ReplaceAllString(strings.Join(tags.FindAllString(rec.Body.String(), -1), "\n"), "")
	}
	want := shape("harmless")
	for _, x := range []string{`<script>alert(1)</script>`, `"><img src=x onerror=alert(1)>`, `' onload='alert(1)`,
		"</script><svg onload=alert(1)>", "a\u202eb"} {
		if shape(x) != want {
			t.Errorf("%q changes the page's tags", x)
		}
	}
}

// TestNodesInTrouble: they come first, and a node with two streams is one.
func TestNodesInTrouble(t *testing.T) {
	sync := []TypeStatus{{Type: "Address", SentNonce: "v1", AckedNonce: "v1", Synced: 1}}
	now := time.Now()
	p := pageOf(Status{Nodes: []NodeStatus{
		{Node: "a", Connected: true, Since: now.Add(-time.Hour), Types: []TypeStatus{{Rejecting: true}}},
		{Node: "a", Connected: true, Since: now, Types: sync},
		{Node: "b", Connected: true, Types: []TypeStatus{{SentNonce: "v1", Lag: 1, Waiting: true}}}, {Node: "c"},
		{Node: "d", Connected: true, Types: []TypeStatus{sync[0], {Rejecting: true}}}, {Node: "e", Connected: true},
	}})
	got := ""
	for _, n := range p.Shown {
		got += n.Node + ":" + n.State + " "
	}
	equal(t, "order", got, "c:not connected d:rejects b:waiting for reply e:no request yet a:in sync ")
	equal(t, "counts", [3]int{p.Joined, p.Connected, p.Behind}, [3]int{5, 4, 3})
}
