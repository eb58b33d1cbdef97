package admin

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestDashboard: the page keeps what scripts may know of ztunnel's, its title and its table of links in their order.
// Links that want POST are buttons of forms: ztunnel's lead to a 405.
func TestDashboard(t *testing.T) {
	s := testAdmin(t, func(o *AdminOptions) { o.Debug = map[string]http.Handler{"/debug/tun": http.NotFoundHandler()} })
	resp, body := do(t, "GET", urlOf(s, "/"))
	if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "text/html; charset=utf-8" ||
		!strings.Contains(body, "<title>Ztunnel Admin</title>") {
		t.Errorf("%s %v", resp.Status, resp.Header)
	}
	at := 0
	for i, link := range []string{"debug/pprof/profile", "debug/pprof/heap", "debug/pprof/heap/profiling", "quitquitquit",
		"config_dump", "logging", "debug/pprof/", "ztun/connections", "ztun/flows", "debug/tun"} {
		row := fmt.Sprintf(`<tr class="%s"><td><a href="%s%s">%[2]s</a></td>`, []string{"vert-space", "gray"}[i%2], link,
			map[bool]string{true: "?activate=true"}[strings.HasSuffix(link, "profiling")])
		if link == "quitquitquit" || link == "logging" {
			row = fmt.Sprintf(`<tr class="%s"><td><form method="post" action="%s"`, []string{"vert-space", "gray"}[i%2], link)
		}
		n := strings.Index(body[at:], row)
		if n < 0 {
			t.Fatalf("row %d (%s) is missing or out of order", i, row)
		}
		at += n
	}
	if _, err := NewAdmin(AdminOptions{Debug: map[string]http.Handler{"/x": nil}}); err == nil {
		t.Error("a path outside /debug/ was accepted")
	}
	if resp, body := do(t, "HEAD", urlOf(s, "/")); resp.StatusCode != 200 || body != "" {
		t.Errorf("HEAD: %s %q", resp.Status, body)
	}
}

// TestPageLinks: what the page links to answers GET, and what its forms post to answers an empty POST of the page's
// own; a foreign page's is refused.
func TestPageLinks(t *testing.T) {
	quit := make(chan string, 10)
	s := testAdmin(t, func(o *AdminOptions) {
		o.Quit = func(reason string) { quit <- reason }
		o.Dump = func() map[string]Section { return nil }
	})
	_, body := do(t, "GET", urlOf(s, "/"))
	origin := "http://" + s.Addrs()[0].String()
	find := func(re string) []string {
		var all []string
		for _, m := range regexp.MustCompile(re).FindAllStringSubmatch(body, -1) {
			all = append(all, "/"+strings.TrimPrefix(m[1], "/"))
		}
		return all
	}
	links := find(`<a href="([^"#]+)"`)
	if len(links) < 7 {
		t.Fatalf("links %q", links)
	}
	for _, l := range links {
		if l == "/debug/pprof/profile" {
			l += "?seconds=1"
		}
		if resp, _ := do(t, "GET", urlOf(s, l)); resp.StatusCode != 200 {
			t.Errorf("GET %s: %s", l, resp.Status)
		}
	}
	forms := find(`(?:form)?action="([^"]+)"`)
	if !slices.Contains(forms, "/logging?level=debug") || !slices.Contains(forms, "/quitquitquit") {
		t.Fatalf("forms %q", forms)
	}
	form := []string{"Content-Type", "application/x-www-form-urlencoded"}
	for _, f := range forms {
		if resp, body := do(t, "POST", urlOf(s, f), append(form, "Origin", origin, "Sec-Fetch-Site",
			"same-origin")...); resp.StatusCode != 200 {
			t.Errorf("POST %s: %s %s", f, resp.Status, body)
		}
		for _, foreign := range [][]string{{"Origin", "http://evil.example"}, {"Origin", "null"},
			{"Sec-Fetch-Site", "cross-site"}} {
			if resp, _ := do(t, "POST", urlOf(s, f), append(form, foreign...)...); resp.StatusCode != 403 {
				t.Errorf("POST %s with %q: %s", f, foreign, resp.Status)
			}
		}
	}
	if len(quit) != 1 {
		t.Errorf("asked to quit %d times", len(quit))
	}
	rebound, err := http.NewRequest("GET", urlOf(s, "/"), nil)
	if err != nil {
		t.Fatal(err)
	}
	rebound.Host = "rebound.example"
	resp, err := client.Do(rebound)
	if err != nil {
		t.Fatal(err)
	}
	if resp.Body.Close(); resp.StatusCode != 403 {
		t.Errorf("by a foreign name: %s", resp.Status)
	}
}

// TestPageToken: where changes need a token, the page has a field for it, and does not know it.
func TestPageToken(t *testing.T) {
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("s3cret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := testAdmin(t, func(o *AdminOptions) { o.Token = token })
	resp, body := do(t, "GET", urlOf(s, "/"))
	if resp.StatusCode != 200 || !strings.Contains(body, `id="token"`) || strings.Contains(body, "s3cret") {
		t.Errorf("%s %s", resp.Status, body)
	}
}

// hostile are texts as a peer or a control plane may choose them.
var hostile = []string{
	`<script>alert(1)</script>`, `"><img src=x onerror=alert(1)>`, `' onmouseover='alert(1)`,
	`</td></tr></table><iframe src=//evil.example>`,
	`javascript:alert(1)`, `{{.Token}}`, "</script><svg/onload=alert(1)>", "</style><script>alert(1)</script>",
	"turned\u202eaway", "nul\x00byte", "bad\xffutf8", strings.Repeat("long", 1000),
}

// hostileOptions fill everything that others choose with one such text.
func hostileOptions(x string) AdminOptions {
	now := time.Now()
	side := Side{Workload: x, Namespace: x, Identity: x, Cluster: x, Address: netip.MustParseAddrPort("10.0.0.1:80")}
	c := Connection{Pod: x, Direction: "outbound", Protocol: x, State: x, Source: side, Destination: side, Service: x,
		Authority: x, Start: now, End: now, Outcome: "failed", Reason: x, Flag: x,
		Tunnel: Tunnel{Local: side.Address, Remote: side.Address}}
	all := func(yield func(Connection) bool) { yield(c) }
	ready := NewReady(nil)
	ready.Register(x).Fail(errors.New(x))
	return AdminOptions{
		Connections: ConnectionSource{Live: all, Ended: all}, Ready: ready, Meter: NewMeter(func() (out, in Traffic) {
			return
		}),
		Overview: func() Overview {
			return Overview{Node: x, Version: x, Source: x, Started: now,
				Pods: []OverviewPod{{PodStatus: PodStatus{PodSpec: PodSpec{Name: x, Namespace: x, ServiceAccount: x}, State: x,
					Error: x, Device: x, Offload: PodOffload{Why: x}}}},
				Certificates: []OverviewCertificate{{Identity: x, State: "Unavailable: " + x, From: now,
					Until: now.Add(time.Hour)}},
				Rules:   []OverviewPolicy{{Namespace: x, Name: x, Scope: x, Action: x}},
				Missing: []OverviewMissing{{Policy: x, Workload: x, Decision: x, Since: now}}}
		},
	}
}

// TestPageIsEscaped: what others choose is text, whatever it is, and its tags are those of a harmless page.
func TestPageIsEscaped(t *testing.T) {
	tags := regexp.MustCompile(`<[^>]*>`)
	page := func(x string) string {
		s := testAdmin(t, func(o *AdminOptions) {
			h := hostileOptions(x)
			o.Connections, o.Ready, o.Meter, o.Overview = h.Connections, h.Ready, h.Meter, h.Overview
		})
		resp, body := do(t, "GET", urlOf(s, "/"))
		if resp.StatusCode != 200 {
			t.Fatalf("%q: %s %s", x, resp.Status, body)
		}
		csp := resp.Header.Get("Content-Security-Policy")
		for _, want := range []string{"default-src 'none'", "script-src 'sha256-", "style-src 'sha256-",
			"frame-ancestors 'none'", "base-uri 'none'", "form-action 'self'"} {
			if !strings.Contains(csp, want) {
				t.Fatalf("no %s in %s", want, csp)
			}
		}
		if strings.Contains(csp, "unsafe") {
			t.Fatal(csp)
		}
		return body
	}
	times := regexp.MustCompile(`datetime="[^"]*"|title="2[^"]*"`)
	shape := func(body string) string {
		return times.ReplaceAllString(strings.Join(tags.FindAllString(body, -1), "\n"), "")
	}
	want := shape(page("harmless"))
	for _, x := range hostile {
		body := page(x)
		if got := shape(body); got != want {
			t.Errorf("%.40q changes the page's tags", x)
		}
		for _, bad := range []string{"\u202e", "\x00", "\xff", strings.Repeat("long", 100)} {
			if strings.Contains(body, bad) {
				t.Errorf("%.40q: %.20q is in the page", x, bad)
			}
		}
	}
}

func TestMeter(t *testing.T) {
	var out, in Traffic
	now := time.Unix(0, 0)
	m := NewMeter(func() (Traffic, Traffic) { return out, in })
	m.now = func() time.Time { return now }
	if r := m.Rates(); len(r.Out) != 0 || r.LastOut() != 0 {
		t.Errorf("of nothing: %+v", r)
	}
	for range 2 * meterSamples {
		m.measure()
		out.Opened, out.Bytes, in.Opened, in.Failed = out.Opened+10, out.Bytes+1000, in.Opened+5, in.Failed+1
		now = now.Add(5 * time.Second)
	}
	r := m.Rates()
	if len(r.Out) != meterSamples-1 || r.LastOut() != 2 || r.LastIn() != 1 || r.LastBytes() != 200 ||
		r.Connections()[0] != 3 || r.Over != 5*time.Minute || r.Failed != meterSamples-1 {
		t.Errorf("%+v", r)
	}
}

// TestOneWalk: a rendering of the page walks over the live connections once, however many of its parts are about
// them: there may be a hundred thousand.
func TestOneWalk(t *testing.T) {
	walks := 0
	tunnel := Tunnel{Local: netip.MustParseAddrPort("10.1.0.1:4000"), Remote: netip.MustParseAddrPort("10.2.0.1:15008")}
	p := overviewOf(&AdminOptions{Meter: NewMeter(func() (out, in Traffic) { return }), Connections: ConnectionSource{
		Live: func(yield func(Connection) bool) {
			walks++
			for range 3 {
				if !yield(Connection{Pod: "n/p", Direction: "outbound", Tunnel: tunnel, Sent: 5}) {
					return
				}
			}
			yield(Connection{Pod: "n/p", Direction: "passthrough"})
		}}}, nil)
	if walks != 1 || p.Live.Total != 4 || p.Carriers != 1 || len(p.Tunnels) != 1 || p.Tunnels[0].Connections != 3 ||
		p.Tunnels[0].Bytes != 15 {
		t.Errorf("%d walks, %d connections, tunnels %+v of %d", walks, p.Live.Total, p.Tunnels, p.Carriers)
	}
}
