package admin

import (
	"encoding/json"
	"fmt"
	"iter"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
)

// someConnections are n of pod default/a: number i has called 10.0.0.i, began i seconds after noon and carried i bytes.
func someConnections(n int, ended bool) iter.Seq[Connection] {
	noon := time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)
	return func(yield func(Connection) bool) {
		for i := range n {
			c := Connection{
				Pod: "default/a", Direction: "outbound", Protocol: "HBONE", State: "open",
				Start: noon.Add(time.Duration(i) * time.Second), Sent: uint64(i),
				Source: Side{Address: netip.MustParseAddrPort("10.1.0.2:4000"), Workload: "a", Namespace: "default"},
				Destination: Side{Address: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 80),
					Workload: fmt.Sprintf("w%d", i), Namespace: "default"},
			}
			if ended {
				c.State, c.Outcome, c.End = "ended", []string{"success", "denied", "failed", "cut"}[i%4], c.Start.Add(time.Hour)
			}
			if !yield(c) {
				return
			}
		}
	}
}

func TestConnectionSelect(t *testing.T) {
	s := ConnectionSource{Live: someConnections(10, false), Ended: someConnections(10, true)}
	for _, c := range []struct {
		ended bool
		query string
		want  []int // by bytes, in order
	}{
		{false, "", []int{9, 8, 7, 6, 5, 4, 3, 2, 1, 0}},
		{false, "limit=2", []int{9, 8}},
		{false, "sort=bytes&limit=3", []int{9, 8, 7}},
		{false, "sort=peer&limit=2", []int{0, 1}},
		{false, "peer=10.0.0.4", []int{4}},
		{false, "peer=10.0.0.4:80", []int{4}},
		{false, "peer=10.0.0.4:81", nil},
		{false, "peer=10.0.0.0/30", []int{3, 2, 1, 0}},
		{false, "peer=default/w7", []int{7}},
		{false, "pod=a&limit=1", []int{9}},
		{false, "pod=default/a&limit=1", []int{9}},
		{false, "pod=b", nil},
		{false, "direction=inbound", nil},
		{true, "outcome=denied", []int{9, 5, 1}},
		{true, "outcome=bad", []int{9, 7, 6, 5, 3, 2, 1}},
		{true, "since=2026-11-28T13:00:07Z", []int{9, 8}},
	} {
		v, _ := url.ParseQuery(c.query)
		q, err := connectionQuery(v)
		if err != nil {
			t.Errorf("%s: %v", c.query, err)
			continue
		}
		if back, err := connectionQuery(q.values()); err != nil || back != q {
			t.Errorf("%s comes back as %+v, %v", c.query, back, err)
		}
		var got []int
		for _, x := range s.Select(c.ended, q).Connections {
			got = append(got, int(x.Sent))
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s (ended: %v): %v, want %v", c.query, c.ended, got, c.want)
		}
	}
}

// TestConnectionSelectIsBounded: an answer and what is held for it are bounded, and the total is told.
func TestConnectionSelectIsBounded(t *testing.T) {
	s := ConnectionSource{Live: someConnections(3*maxConnections, false)}
	for limit, want := range map[int]int{0: defaultConnections, 7: 7, maxConnections: maxConnections} {
		l := s.Select(false, ConnectionQuery{Limit: limit})
		if len(l.Connections) != want || l.Total != 3*maxConnections || cap(l.Connections) > 4*want ||
			l.Connections[0].Sent != 3*maxConnections-1 {
			t.Errorf("limit %d: %d of %d, room for %d, first %d", limit, len(l.Connections), l.Total, cap(l.Connections),
				l.Connections[0].Sent)
		}
	}
}

func TestConnectionQueryErrors(t *testing.T) {
	for query, want := range map[string]string{
		"sort=age2":       "choose age, bytes, peer, pod, received, sent",
		"outcome=good":    "choose success, denied, failed, cut, bad",
		"direction=up":    "choose outbound, inbound, passthrough",
		"limit=x":         "no number",
		"limit=-1":        "between 1 and",
		"limit=99999999":  "between 1 and",
		"since=yesterday": "no time like",
		"pot=a":           "there are pod, peer",
		"sort=" + url.QueryEscape(strings.Repeat("\x00", 1000)): "sort",
	} {
		v, _ := url.ParseQuery(query)
		if _, err := connectionQuery(v); err == nil || !strings.Contains(err.Error(), want) || len(err.Error()) > 500 {
			t.Errorf("%.40s: %v, want %q", query, err, want)
		}
	}
}

// TestConnectionPages: both paths of the admin server and of the socket answer with what the query asks for.
func TestConnectionPages(t *testing.T) {
	src := ConnectionSource{Live: someConnections(5, false), Ended: someConnections(5, true)}
	s := testAdmin(t, func(o *AdminOptions) { o.Connections = src })
	for path, state := range map[string]string{"/ztun/connections": "open", "/ztun/flows": "ended"} {
		resp, body := do(t, "GET", urlOf(s, path+"?limit=2"))
		var l Connections
		if err := json.Unmarshal([]byte(body), &l); err != nil || resp.StatusCode != 200 ||
			resp.Header.Get("Content-Type") != "application/json" {
			t.Fatalf("%s: %d, %v\n%s", path, resp.StatusCode, err, body)
		}
		if len(l.Connections) != 2 || l.Total != 5 || l.Connections[0].State != state || l.Connections[0].Sent != 4 {
			t.Errorf("%s: %+v", path, l)
		}
		if resp, body := do(t, "GET", urlOf(s, path+"?nonsense=1")); resp.StatusCode != 400 ||
			!strings.Contains(body, "nonsense") {
			t.Errorf("%s: %d %s", path, resp.StatusCode, body)
		}
		if resp, _ := do(t, "POST", urlOf(s, path)); resp.StatusCode != 405 {
			t.Errorf("POST %s: %d", path, resp.StatusCode)
		}
	}
}
