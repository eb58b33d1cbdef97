package admin

import (
	"bytes"
	"compress/gzip"
	"context"
	"io"
	neturl "net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func mustURL(s *Server, path string) *neturl.URL {
	return &neturl.URL{Scheme: "http", Host: s.Addrs()[0].String(), Opaque: "//" + s.Addrs()[0].String() + path}
}

func TestProfileBounds(t *testing.T) {
	s := testAdmin(t, nil)
	for _, q := range []string{"seconds=0", "seconds=301", "frequency=0", "frequency=1001", "seconds=x", "seconds=",
		"seconds=-1", "seconds=1.5", "seconds=99999999999999", "seconds=1&frequency=y"} {
		resp, body := do(t, "GET", urlOf(s, "/debug/pprof/profile?"+q))
		if resp.StatusCode != 400 || !strings.HasSuffix(body, "\n") || !strings.HasPrefix(body, "invalid ") {
			t.Errorf("%s: %s %q", q, resp.Status, body)
		}
	}
	for _, p := range []string{"/debug/pprof/trace?seconds=0", "/debug/pprof/trace?seconds=400",
		"/debug/pprof/allocs?seconds=301"} {
		if resp, _ := do(t, "GET", urlOf(s, p)); resp.StatusCode != 400 {
			t.Errorf("%s: %s", p, resp.Status)
		}
	}
}

func TestProfile(t *testing.T) {
	s := testAdmin(t, nil)
	resp, body := do(t, "GET", urlOf(s, "/debug/pprof/profile?seconds=1"))
	if resp.StatusCode != 200 || len(resp.Header["Content-Type"]) != 0 {
		t.Errorf("%s %v", resp.Status, resp.Header)
	}
	// Uncompressed: the names in the protobuf's string table are in clear.
	if strings.HasPrefix(body, "\x1f\x8b") || !strings.Contains(body, "nanoseconds") {
		t.Errorf("not an uncompressed profile: %.20q", body)
	}
}

// TestProfileEnds: a second profile is refused while one runs, and Shutdown cuts a long one short.
func TestProfileEnds(t *testing.T) {
	srv, err := NewAdmin(AdminOptions{})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve() }()
	resp, err := client.Get(urlOf(srv, "/debug/pprof/profile?seconds=300")) // returns when it has begun
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if second, body := do(t, "GET", urlOf(srv, "/debug/pprof/profile?seconds=1")); second.StatusCode != 500 ||
		!strings.Contains(body, "already") {
		t.Errorf("a second profile: %s %q", second.Status, body)
	}
	type result struct {
		body []byte
		err  error
	}
	got := make(chan result, 1)
	go func() {
		b, err := io.ReadAll(resp.Body)
		got <- result{b, err}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := srv.Shutdown(ctx); err != nil {
		t.Error(err)
	}
	if r := <-got; r.err != nil || !bytes.Contains(r.body, []byte("nanoseconds")) {
		t.Errorf("the cut profile: %d bytes, %v", len(r.body), r.err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
}

func TestOtherProfiles(t *testing.T) {
	s := testAdmin(t, nil)
	_, body := do(t, "GET", urlOf(s, "/debug/pprof/heap"))
	z, err := gzip.NewReader(strings.NewReader(body))
	if err != nil {
		t.Fatalf("heap: %v", err)
	}
	if b, err := io.ReadAll(z); err != nil || !bytes.Contains(b, []byte("inuse_space")) {
		t.Errorf("heap: %v", err)
	}
	for p, want := range map[string]string{
		"/debug/pprof/":                             "goroutine",
		"/debug/pprof/goroutine?debug=1":            "goroutine profile:",
		"/debug/pprof/mutex?debug=1":                "mutex",
		"/debug/pprof/block?debug=1":                "contention",
		"/debug/pprof/threadcreate?debug=1":         "threadcreate",
		"/debug/pprof/allocs?debug=1":               "heap profile",
		"/debug/pprof/cmdline":                      filepath.Base(os.Args[0]),
		"/debug/pprof/symbol":                       "num_symbols",
		"/debug/pprof/heap/profiling?activate=true": "heap profiling active: true\n",
	} {
		if resp, body := do(t, "GET", urlOf(s, p)); resp.StatusCode != 200 || !strings.Contains(body, want) {
			t.Errorf("%s: %s %.200q", p, resp.Status, body)
		}
	}
	if resp, _ := do(t, "GET", urlOf(s, "/debug/pprof/heap/profiling?activate=x")); resp.StatusCode != 400 {
		t.Errorf("activate=x: %s", resp.Status)
	}
	if resp, body := do(t, "GET", urlOf(s, "/debug/pprof/trace?seconds=1")); resp.StatusCode != 200 ||
		!strings.Contains(body[:16], "go 1.") {
		t.Errorf("trace: %s", resp.Status)
	}
}
