package control

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write the golden files anew")

// The table of one of each: in sync, waiting, rejecting, connected only, not connected; a bad directory with warnings.
func TestStatusTable(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	st := Status{
		Now: now,
		Snapshot: SnapshotStatus{
			Version: 7, PublishedAt: now.Add(-3 * time.Hour), Files: 3, Workloads: 120, Services: 14, Policies: 5,
			FailedSince: now.Add(-90 * time.Second), ErrorCount: 12,
			Errors: []Problem{{File: "shop/stock.yaml", Line: 12, Key: "workloads[3].protocol",
				Text: `want one of TCP, HBONE, found "http"`}, {File: "b.yaml", Text: "the file is \x1b[31mempty"}},
			WarningCount: 1,
			Warnings: []Problem{{File: "a.yaml", Line: 4, Key: "workloads[1].waypoint",
				Text: `there is no service or workload "ns/wp.host"`}},
		},
		Certificate: CertificateStatus{NotAfter: now.Add(time.Hour), Error: "the CA expired"},
		Revoked:     RevocationStatus{Certificates: 3, ListedAt: now, Problem: "no key\x1b"},
		Problems:    []Problem{{File: "nodes/x.json", Text: "cannot be used"}},
		Nodes: []NodeStatus{
			{Node: "node-a", Connected: true, Since: now.Add(-49 * time.Hour), Peer: "10.0.0.1:4711", Auth: "token",
				CertificateNotAfter: now.Add(200 * 24 * time.Hour), Types: []TypeStatus{
					{Type: "Address", SentNonce: "v7-31", AckedNonce: "v7-31", Synced: 7},
					{Type: "Authorization", SentNonce: "v6-3", AckedNonce: "v5-2", Synced: 6, Lag: 1, LagSeconds: 75, NACKs: 2,
						Rejecting: true, LastNACK: "shop/p: bad\nname", LastNACKAt: now.Add(-4200 * time.Millisecond)},
				}},
			{Node: "node-b", Connected: true, Since: now.Add(-time.Minute), Peer: "10.0.0.2:4712", Auth: "certificate",
				Types: []TypeStatus{
					{Type: "Address", SentNonce: "v7-1", Waiting: true, Lag: 7, LagSeconds: 59.96},
				}},
			{Node: "node-c", Connected: true, Since: now, Peer: "10.0.0.3:4713", Auth: "token"},
			{Node: "node-d", CertificateNotAfter: now.Add(50 * time.Hour)},
			{Node: "node-da", Connected: true, Since: now, Peer: "10.0.0.6:1", Auth: "token",
				CertificateNotAfter: now.Add(-time.Hour), CertificateProblem: "it expired"},
			{Node: "node-db", Connected: true, Since: now, Peer: "10.0.0.7:1", Auth: "token",
				CertificateNotAfter: now.Add(999 * time.Hour), CertificateProblem: "of another CA"},
			// nothing is published, say
			{Node: "node-e", Connected: true, Since: now, Peer: "10.0.0.5:4715", Auth: "token",
				Types: []TypeStatus{{Type: "Address"}}},
		},
	}
	compareGolden(t, "status.txt", st.table(t))
	compareGolden(t, "empty.txt", (&Status{Now: now}).table(t))
	// What a status says survives its way through the socket.
	data, err := json.Marshal(st)
	check(t, err)
	var back Status
	check(t, json.Unmarshal(data, &back))
	if !reflect.DeepEqual(back, st) {
		t.Fatalf("%+v\n%+v", back, st)
	}
}

func (st *Status) table(t *testing.T) string {
	var b bytes.Buffer
	check(t, st.WriteTable(&b))
	return b.String()
}

func compareGolden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		check(t, os.WriteFile(path, []byte(got), 0o644))
	}
	want, err := os.ReadFile(path)
	check(t, err)
	equal(t, name, "\n"+got, "\n"+string(want))
}

// The status over its socket and over HTTP.
func TestStatus(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": workloadsYAML("x:10.0.0.1:node-a")}, nil)
	c := w.connect("node-a")
	c.begin(typeAddress, nil)
	m := c.recv()
	socket := filepath.Join(w.dir, socketName)
	info, err := os.Stat(socket)
	check(t, err)
	equal(t, "mode", info.Mode().Perm(), 0o600)
	st, err := FetchStatus(t.Context(), socket)
	check(t, err)
	n := st.Nodes[0]
	if len(st.Nodes) != 2 || n.Node != "node-a" || !n.Connected || n.Auth != "token" ||
		n.Identity != "spiffe://cluster.local/ns/istio-system/sa/ztunnel" ||
		n.ID != c.node.Id || n.Peer == "" || st.Nodes[1].Node != "node-b" || st.Nodes[1].Connected {
		t.Fatalf("%+v", st.Nodes)
	}
	y := n.Types[0]
	if y.Type != "Address" || !y.Waiting || y.SentNonce != m.Nonce || y.SentVersion != 1 || y.Lag != 1 ||
		y.AckedNonce != "" || y.Resources != 1 {
		t.Fatalf("%+v", y)
	}
	c.ack(m)
	eventually(t, "acknowledged", func() bool {
		st, err := FetchStatus(t.Context(), socket)
		check(t, err)
		y := st.Nodes[0].Types[0]
		return !y.Waiting && y.AckedNonce == m.Nonce && y.AckedVersion == 1 && y.Lag == 0 && y.LagSeconds == 0
	})
	base := "http://" + w.srv.AdminAddr().String()
	for path, want := range map[string]int{"/status": 200, "/healthz/ready": 200, "/metrics": 200, "/": 200,
		"/nothing": 404} {
		resp, err := http.Get(base + path)
		check(t, err)
		body, err := io.ReadAll(resp.Body)
		check(t, err)
		resp.Body.Close()
		equal(t, path, resp.StatusCode, want)
		if want == 404 && !strings.Contains(string(body), "/status") {
			t.Errorf("%s: %q does not say what there is", path, body)
		}
	}
	// A web page that has our address under its own name reads nothing.
	req, err := http.NewRequest("GET", base+"/status", nil)
	check(t, err)
	req.Host = "evil.example"
	refused, err := http.DefaultClient.Do(req)
	check(t, err)
	refused.Body.Close()
	equal(t, "a foreign Host", refused.StatusCode, 403)
	resp, err := http.Post(base+"/status", "", nil)
	check(t, err)
	wrong, err := io.ReadAll(resp.Body)
	check(t, err)
	resp.Body.Close()
	equal(t, "POST", resp.StatusCode, 405)
	if resp.Header.Get("Allow") != "GET, HEAD" || !strings.Contains(string(wrong), "GET") {
		t.Errorf("%v %q does not say what is wanted", resp.Header, wrong)
	}
	http.DefaultClient.CloseIdleConnections()
	check(t, w.stop())
	if _, err := FetchStatus(context.Background(), socket); err == nil ||
		!strings.Contains(err.Error(), "is ztun control running") {
		t.Fatal(err)
	}
}

func TestNotReady(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": "["}, nil)
	resp, err := http.Get("http://" + w.srv.AdminAddr().String() + "/healthz/ready")
	check(t, err)
	resp.Body.Close()
	http.DefaultClient.CloseIdleConnections()
	equal(t, "status", resp.StatusCode, 503)
}
