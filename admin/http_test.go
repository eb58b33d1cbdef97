package admin

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"ztun/admin/zlog"
)

// serving starts s and ends it with the test.
func serving(t testing.TB, s *Server, err error) *Server {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve() }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return s
}

func urlOf(s *Server, path string) string { return "http://" + s.Addrs()[0].String() + path }

// client makes one connection per request, so that nothing outlives a test. (A nil Accept-Encoding stays
// nil: transparent compression is off.)
var client = &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DisableCompression: true},
	Timeout: time.Minute}

func do(t testing.TB, method, url string, header ...string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequest(method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Add(header[i], header[i+1])
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(b)
}

// testLog is a log whose output is thrown away.
func testLog(t testing.TB) *zlog.Log {
	l := zlog.New(zlog.Options{Writer: io.Discard})
	t.Cleanup(func() { l.Close(context.Background()) })
	return l
}

func testAdmin(t testing.TB, change func(*AdminOptions)) *Server {
	o := AdminOptions{IPv6: true, Logging: testLog(t)}
	if change != nil {
		change(&o)
	}
	s, err := NewAdmin(o)
	return serving(t, s, err)
}

// exchange is one entry of samples/admin-http.txt.
type exchange struct{ method, target, status, contentType, length, body string }

func readExchanges(t *testing.T) (es []exchange) {
	data, err := os.ReadFile("../docs/samples/admin-http.txt")
	if err != nil {
		t.Fatal(err)
	}
	for part := range strings.SplitSeq("\n"+string(data), "\n### ") {
		if part = strings.TrimPrefix(part, "\n"); part == "" {
			continue
		}
		head, body, _ := strings.Cut(part, "\n\n")
		lines := strings.Split(head, "\n")
		f := strings.Fields(lines[0])
		e := exchange{status: strings.TrimPrefix(lines[1], "HTTP/1.1 "), body: body}
		e.target, e.method = f[len(f)-1], f[len(f)-2]
		if len(f) == 3 {
			e.target = f[0] + e.target
		}
		for _, l := range lines[2:] {
			k, v, _ := strings.Cut(l, ": ")
			switch k {
			case "content-type":
				e.contentType = v
			case "content-length":
				e.length = v
			}
		}
		es = append(es, e)
	}
	return es
}

// TestSampleExchanges replays what a real ztunnel was asked and compares status, type, length and body.
func TestSampleExchanges(t *testing.T) {
	admin := testAdmin(t, nil)
	stats, err := NewStats(StatsOptions{IPv6: true})
	stats = serving(t, stats, err)
	ready, err := NewReadiness(ReadinessOptions{IPv6: true, Ready: NewReady(nil)})
	ready = serving(t, ready, err)
	es := readExchanges(t)
	if len(es) < 18 {
		t.Fatalf("only %d exchanges were read", len(es))
	}
	for _, e := range es {
		target := urlOf(admin, e.target)
		if p, ok := strings.CutPrefix(e.target, "15020"); ok {
			target = urlOf(stats, p)
		} else if p, ok := strings.CutPrefix(e.target, "15021"); ok {
			target = urlOf(ready, p)
		}
		resp, body := do(t, e.method, target)
		what := e.method + " " + e.target
		if resp.Status != e.status {
			t.Errorf("%s: status %q, want %q", what, resp.Status, e.status)
		}
		if e.status[:3] == "404" { // ztunnel's is empty
			if !strings.HasPrefix(body, "no path ") || !strings.Contains(body, "\npaths: /") {
				t.Errorf("%s: body %q", what, body)
			}
			continue
		}
		if got := resp.Header.Get("Content-Type"); got != e.contentType {
			t.Errorf("%s: content type %q, want %q", what, got, e.contentType)
		}
		if e.status[:3] == "405" { // the usage text is our own
			if !strings.HasPrefix(body, "Invalid HTTP method\n") || !strings.Contains(body, "usage: POST /logging") {
				t.Errorf("%s: body %q", what, body)
			}
			continue
		}
		if got := resp.Header.Get("Content-Length"); got != e.length {
			t.Errorf("%s: length %q, want %q", what, got, e.length)
		}
		if want := strings.TrimSuffix(e.body, "\n"); e.length != "0" && body != want+"\n" && body != e.body {
			t.Errorf("%s: body %q, want %q", what, body, e.body)
		}
		if fmt.Sprint(len(body)) != e.length {
			t.Errorf("%s: body of %d bytes", what, len(body))
		}
	}
}

// TestLogging: checklist 71 to 73, but for `mod:level`, which is accepted here.
func TestLogging(t *testing.T) {
	s := testAdmin(t, nil)
	for _, tc := range []struct {
		query, want string
		code        int
	}{
		{"?level=access=debug", "current log level is hickory_server::server=off,access=debug,info\n", 200},
		{"?level=warn", "current log level is hickory_server::server=off,access=debug,warn\n", 200},
		{"?reset&level=access=debug,info", "current log level is hickory_server::server=off,access=debug,info\n", 200},
		{"?reset", "current log level is hickory_server::server=off,info\n", 200},
		{"?level=", "current log level is hickory_server::server=off,info\n", 200},
		{"?other=1", "unknown parameter \"other\"\n", 400},
		{"?levle=debug", "unknown parameter \"levle\"; did you mean \"level\"?\n", 400},
		{"?level=debug&leve=debug", "unknown parameter \"leve\"; did you mean \"level\"?\n", 400},
		{"?level=debug&level=warn", "parameter level is given 2 times", 400},
		{"?level=debug;reset", "the query cannot be read", 400},
		{"?level=foo", "Invalid level provided: foo\n", 400},
		{"?level=mod:debug", "current log level is hickory_server::server=off,mod=debug,info\n", 200},
		{"?reset&level=ztunnel::proxy:trace,access=warn",
			"current log level is hickory_server::server=off,ztunnel::proxy=trace,access=warn,info\n", 200},
		{"?reset", "current log level is hickory_server::server=off,info\n", 200},
		{"?level=mod:loud", "Invalid level provided: mod:loud\n", 400},
		{"?level=:debug", "Invalid level provided: :debug\n", 400},
		{"?level=a::debug", "Invalid level provided: a::debug\n", 400},
		{"?level=a=b:debug", "Invalid level provided: a=b:debug\n", 400},
		{"?level=info,mod=x", "Invalid level provided: info,mod=x\n", 400},
		{"?level=" + strings.Repeat("x", 5000), "Invalid level provided: xxx", 400},
		{"", "current log level is hickory_server::server=off,info\n", 200},
	} {
		resp, body := do(t, "POST", urlOf(s, "/logging"+tc.query))
		if resp.StatusCode != tc.code || resp.Header.Get("Content-Type") != "text/plain" {
			t.Errorf("%s: %s, %q", tc.query, resp.Status, resp.Header)
		}
		if tc.code == 200 && body != tc.want || tc.code == 400 && (!strings.HasPrefix(body, tc.want) ||
			!strings.Contains(body, "usage:") || len(body) > 4096) {
			t.Errorf("%s: body %q, want %q", tc.query, body, tc.want)
		}
	}
}

// TestQuit: checklist 70, as far as this server goes.
func TestQuit(t *testing.T) {
	var mu sync.Mutex
	var reasons []string
	s := testAdmin(t, func(o *AdminOptions) {
		o.Quit = func(r string) { mu.Lock(); defer mu.Unlock(); reasons = append(reasons, r) }
	})
	if resp, body := do(t, "GET", urlOf(s, "/quitquitquit")); resp.StatusCode != 405 ||
		resp.Header.Get("Allow") != "POST" || !strings.HasPrefix(body, "/quitquitquit wants POST") || len(reasons) != 0 {
		t.Errorf("GET: %s %q %v", resp.Status, body, reasons)
	}
	if resp, body := do(t, "POST", urlOf(s, "/quitquitquit")); resp.StatusCode != 200 || body != "shutdown now\n" ||
		resp.Header.Get("Content-Type") != "text/plain" {
		t.Errorf("POST: %s %q", resp.Status, body)
	}
	if fmt.Sprint(reasons) != "[/quitquitquit]" {
		t.Error(reasons)
	}
}

func TestExactPaths(t *testing.T) {
	s := testAdmin(t, nil)
	for _, p := range []string{"/config_dump/", "//config_dump", "/./config_dump", "/Config_dump", "/debug/pprof/nope",
		"/debug", "/logging/x", "/%63onfig_dumpx"} {
		req := &http.Request{Method: "GET", URL: mustURL(s, p)}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != 404 || !strings.HasPrefix(string(b), "no path \"") ||
			!strings.HasSuffix(string(b),
				"\npaths: / /config_dump /debug/pprof/ /logging /quitquitquit /ztun/connections /ztun/flows\n") {
			t.Errorf("%s: %s, %q, %v", p, resp.Status, b, resp.Header)
		}
	}
}

// TestReadiness: checklist 80.
func TestReadiness(t *testing.T) {
	now := time.Now()
	r := NewReady(func() time.Time { return now })
	srv, err := NewReadiness(ReadinessOptions{Ready: r})
	s := serving(t, srv, err)
	if !s.Addrs()[0].Addr().Unmap().Is4() || !s.Addrs()[0].Addr().IsUnspecified() {
		t.Errorf("without IPv6 bound to %v", s.Addrs())
	}
	sm := r.Register("state manager")
	dns := r.Register("dns proxy")
	resp, body := do(t, "GET", urlOf(s, "/healthz/ready"))
	if resp.StatusCode != 500 || body != "not ready, pending: dns proxy, state manager\n" ||
		resp.Header.Get("Content-Type") != "text/plain" {
		t.Errorf("%s %q %v", resp.Status, body, resp.Header)
	}
	now = now.Add(1500 * time.Millisecond)
	sm.Fail(errors.New("no file\nhere"))
	if _, body = do(t, "GET", urlOf(s, "/healthz/ready?verbose")); body !=
		"not ready, pending: dns proxy, state manager\ndns proxy: pending for 1.5s\nstate manager: pending for 1.5s, "+
			"failed 1 times, last error: no file here\n" {
		t.Errorf("verbose: %q", body)
	}
	sm.Done()
	dns.Done()
	if resp, body = do(t, "GET", urlOf(s, "/healthz/ready")); resp.StatusCode != 200 || body != "ready\n" {
		t.Errorf("%s %q", resp.Status, body)
	}
	for _, m := range []string{"POST", "PUT", "HEAD"} {
		if resp, body = do(t, m, urlOf(s, "/healthz/ready")); resp.StatusCode != 405 || resp.Header.Get("Allow") != "GET" ||
			(body == "") != (m == "HEAD") {
			t.Errorf("%s: %s %q", m, resp.Status, body)
		}
	}
	if resp, body = do(t, "GET", urlOf(s, "/healthz/readyz")); resp.StatusCode != 404 ||
		body != "no path \"/healthz/readyz\" here; did you mean \"/healthz/ready\"?\npaths: /healthz/ready\n" {
		t.Errorf("%s %q", resp.Status, body)
	}
}

// TestBind: checklist 81, for the admin server; the others are bound by listenWildcard.
func TestBind(t *testing.T) {
	s := testAdmin(t, nil)
	as := s.Addrs()
	if as[0].Addr().String() != "127.0.0.1" || as[0].Port() == 0 {
		t.Errorf("bound to %v", as)
	}
	if len(as) == 2 {
		if as[1].Addr() != netip.IPv6Loopback() || as[1].Port() != as[0].Port() {
			t.Errorf("bound to %v", as)
		}
		if resp, _ := do(t, "GET", "http://"+as[1].String()+"/"); resp.StatusCode != 200 {
			t.Errorf("::1: %s", resp.Status)
		}
	} else if loopbackIPv6(s.logger) {
		t.Errorf("lo has IPv6, but only %v is bound", as)
	}
	only4, err := NewAdmin(AdminOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(only4.Addrs()) != 1 {
		t.Errorf("without IPv6 bound to %v", only4.Addrs())
	}
	port := as[0].Port()
	for name, bind := range map[string]func() (*Server, error){
		"admin":     func() (*Server, error) { return NewAdmin(AdminOptions{Port: port}) },
		"stats":     func() (*Server, error) { return NewStats(StatsOptions{Port: port}) },
		"readiness": func() (*Server, error) { return NewReadiness(ReadinessOptions{Port: port}) },
	} {
		_, err := bind()
		if !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(err.Error(), fmt.Sprintf("port %d", port)) ||
			!strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "another ztunnel") {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Bound and never served: Shutdown still frees the port.
	if err := only4.Shutdown(background(t)); err != nil {
		t.Error(err)
	}
	if err := only4.Serve(); err != nil {
		t.Errorf("Serve after Shutdown: %v", err)
	}
	again, err := NewAdmin(AdminOptions{Port: only4.Addrs()[0].Port()})
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
}

// TestShutdown: listeners close at once, a request in flight gets its answer.
func TestShutdown(t *testing.T) {
	entered, release := make(chan struct{}), make(chan struct{})
	s, err :=
		NewAdmin(
			AdminOptions{
				Debug: map[string]http.Handler{"/debug/slow": http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					close(entered)
					<-release
					io.WriteString(w, "done")
				})}})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve() }()
	got := make(chan string, 1)
	go func() {
		_, body := do(t, "GET", urlOf(s, "/debug/slow"))
		got <- body
	}()
	<-entered
	down := make(chan error, 1)
	go func() { down <- s.Shutdown(background(t)) }()
	addr := s.Addrs()[0].String()
	for {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			break
		}
		c.Close()
		time.Sleep(time.Millisecond)
	}
	select {
	case err := <-down:
		t.Fatalf("Shutdown did not wait: %v", err)
	default:
	}
	close(release)
	if body := <-got; body != "done" {
		t.Errorf("the request in flight got %q", body)
	}
	if err := <-down; err != nil {
		t.Error(err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}

	// A request that never ends is cut off when the context ends.
	stuck := make(chan struct{})
	defer close(stuck)
	entered2 := make(chan struct{})
	s, err =
		NewAdmin(
			AdminOptions{
				Debug: map[string]http.Handler{"/debug/stuck": http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
					close(entered2)
					<-stuck
				})}})
	if err != nil {
		t.Fatal(err)
	}
	go func() { served <- s.Serve() }()
	go func() {
		if resp, err := client.Get(urlOf(s, "/debug/stuck")); err == nil {
			resp.Body.Close()
		}
	}()
	<-entered2
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Shutdown: %v", err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
}

func TestHeaderLimits(t *testing.T) {
	s := testAdmin(t, nil)
	if resp, _ := do(t, "GET", urlOf(s, "/"), "X-Big", strings.Repeat("x", 7000)); resp.StatusCode != 200 {
		t.Errorf("a header of 7000 bytes: %s", resp.Status)
	}
	if resp, _ := do(t, "GET", urlOf(s, "/"), "X-Big", strings.Repeat("x", 9000)); resp.StatusCode != 431 {
		t.Errorf("a header of 9000 bytes: %s", resp.Status)
	}
	c, err := net.Dial("tcp", s.Addrs()[0].String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: localhost\r\n")
	c.SetReadDeadline(time.Now().Add(30 * time.Second))
	start := time.Now()
	// The server gives up by itself (with or without an answer).
	if _, err := io.ReadAll(c); err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("an unfinished header was kept for %v: %v", time.Since(start), err)
	}
	if took := time.Since(start); took < time.Second {
		t.Errorf("an unfinished header was cut after %v", took)
	}
}

// TestUnreadBody: a body that is announced and never sent delays nothing but its own connection.
func TestUnreadBody(t *testing.T) {
	s := testAdmin(t, nil)
	c, err := net.Dial("tcp", s.Addrs()[0].String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(30 * time.Second))
	io.WriteString(c, "POST /logging HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if b, _ := io.ReadAll(resp.Body); !strings.HasPrefix(string(b), "current log level is") {
		t.Errorf("got %q", b)
	}
}

// TestHalfOpen: hundreds of connections with half a request keep nobody from being answered, on any of the servers.
func TestHalfOpen(t *testing.T) {
	// What turns them away is the bound, not the time for a header.
	patient := func(s *Server, err error) *Server {
		if err == nil {
			s.http.ReadHeaderTimeout = time.Hour
		}
		return serving(t, s, err)
	}
	admin := patient(NewAdmin(AdminOptions{Logging: testLog(t)}))
	stats := patient(NewStats(StatsOptions{}))
	ready := patient(NewReadiness(ReadinessOptions{Ready: NewReady(nil)}))
	pods, err := NewPodSocket(PodSocketOptions{Path: t.TempDir() + "/ztun.sock", Pods: &fakePods{}})
	if err != nil {
		t.Fatal(err)
	}
	patient(pods.Server, nil)
	defer pods.Close()
	podConn := func() (net.Conn, error) { return net.Dial("unix", pods.path) }
	for _, tc := range []struct {
		name, path string
		s          *Server
		dial       func() (net.Conn, error)
	}{
		{"admin", "/", admin, nil}, {"stats", "/metrics", stats, nil},
		{"readiness", "/healthz/ready", ready, nil},
		{"control", podsPath, pods.Server, podConn},
	} {
		dial := tc.dial
		if dial == nil {
			dial = func() (net.Conn, error) { return net.Dial("tcp4", tc.s.Addrs()[0].String()) }
		}
		for i := range 700 { // more than there are places
			c, err := dial()
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			io.WriteString(c, "GET "+tc.path+" HTTP/1.1\r\nHost: localhost")
			if i%100 != 99 {
				continue
			}
			if c, err = dial(); err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(30 * time.Second))
			io.WriteString(c, "GET "+tc.path+" HTTP/1.1\r\nHost: localhost\r\n\r\n")
			resp, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil {
				t.Errorf("%s, after %d half-open connections: %v", tc.name, i+1, err)
				break
			}
			resp.Body.Close()
		}
		if n := tc.s.Refused(); n < 100 {
			t.Errorf("%s: only %d connections were turned away", tc.name, n)
		}
	}
}

// TestForeignRequests: what a web page sends is refused on 15000, and nothing but the port's bound stands before the
// others; with a token, changing something takes it.
func TestForeignRequests(t *testing.T) {
	quits := make(chan string, 10)
	s := testAdmin(t, func(o *AdminOptions) { o.Quit = func(r string) { quits <- r } })
	stats, err := NewStats(StatsOptions{})
	stats = serving(t, stats, err)
	ready, err := NewReadiness(ReadinessOptions{Ready: NewReady(nil)})
	ready = serving(t, ready, err)
	path := t.TempDir() + "/token"
	if err := os.WriteFile(path, []byte("s3cret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	guarded := testAdmin(t, func(o *AdminOptions) { o.Quit = func(r string) { quits <- r }; o.Token = path })
	for _, tc := range []struct {
		s                    *Server
		method, path, header string
		code, quits          int
	}{
		{s, "POST", "/quitquitquit", "Host: evil.example", 403, 0},
		{s, "POST", "/quitquitquit", "Origin: http://evil.example", 403, 0},
		{s, "POST", "/logging?level=off", "Host: evil.example:15000", 403, 0},
		{s, "GET", "/config_dump", "Host: evil.example", 403, 0},
		{s, "GET", "/debug/pprof/goroutine", "Sec-Fetch-Site: cross-site", 403, 0},
		{s, "GET", "/", "Host: localhost:4711", 200, 0},
		{s, "POST", "/quitquitquit", "Host: localhost:15000", 200, 1},
		{guarded, "POST", "/quitquitquit", "X-Nothing: x", 401, 0},
		{guarded, "POST", "/logging", "Authorization: Bearer wrong", 401, 0},
		{guarded, "GET", "/", "X-Nothing: x", 200, 0},
		{guarded, "POST", "/logging", "Authorization: Bearer s3cret", 200, 0},
		{guarded, "POST", "/quitquitquit", "Authorization: Bearer s3cret", 200, 1},
		{stats, "GET", "/metrics", "Host: node-a.example:15020", 200, 0},
		{ready, "GET", "/healthz/ready", "Host: 10.1.2.3:15021", 200, 0},
	} {
		req, err := http.NewRequest(tc.method, urlOf(tc.s, tc.path), nil)
		if err != nil {
			t.Fatal(err)
		}
		name, value, _ := strings.Cut(tc.header, ": ")
		if req.Header.Set(name, value); name == "Host" {
			req.Host = value
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != tc.code || len(quits) != tc.quits {
			t.Errorf("%s %s, %s: %s, %d quits; want %d, %d", tc.method, tc.path, tc.header, resp.Status, len(quits), tc.code,
				tc.quits)
		}
		for len(quits) > 0 {
			<-quits
		}
	}
}

func TestHandlerPanic(t *testing.T) {
	var out lockedBuffer
	l := zlog.New(zlog.Options{Writer: &out})
	defer l.Close(context.Background())
	s := testAdmin(t, func(o *AdminOptions) {
		o.Logger = l.Logger("admin")
		o.Debug = map[string]http.Handler{"/debug/bad": http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
			panic("oh no")
		})}
	})
	if resp, err := client.Get(urlOf(s, "/debug/bad")); err == nil {
		resp.Body.Close()
		t.Error("a panic was answered")
	}
	if resp, _ := do(t, "GET", urlOf(s, "/")); resp.StatusCode != 200 {
		t.Error("the server did not survive")
	}
	l.Flush(background(t))
	if s := out.String(); !strings.Contains(s, "panic in an HTTP handler") || !strings.Contains(s, "oh no") ||
		strings.Count(s, "\n") != 1 {
		t.Errorf("logged %q", s)
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
