package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// fakePods is a PodManager in memory; some names fail in a certain way.
type fakePods struct {
	mu   sync.Mutex
	pods map[string]PodStatus
	hold chan struct{} // when set, Add waits for it or for its context

	entered chan struct{} // gets a token when Add begins to wait
}

func (f *fakePods) Add(ctx context.Context, p PodSpec) error {
	if f.hold != nil {
		f.entered <- struct{}{}
		select {
		case <-f.hold:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	switch p.Name {
	case "timeout":
		return fmt.Errorf("starting: %w", context.DeadlineExceeded)
	case "late":
		return fmt.Errorf("%w: shutting down", ErrPodUnavailable)
	case "broken":
		return errors.New("TUN: operation not permitted")
	case "panics":
		panic("oh no")
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	k := p.Namespace + "/" + p.Name
	if _, ok := f.pods[k]; ok {
		return fmt.Errorf("%w: pod %s is there already", ErrPodConflict, k)
	}
	f.pods[k] = PodStatus{PodSpec: p, State: "Up", Device: "ztun0", Offload: PodOffload{VNetHdr: true, TSO4: true},
		Connections: PodConnections{1, 2}}
	return nil
}

func (f *fakePods) Delete(_ context.Context, namespace, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	k := namespace + "/" + name
	if _, ok := f.pods[k]; !ok {
		return fmt.Errorf("%w: %s", ErrPodNotFound, k)
	}
	delete(f.pods, k)
	return nil
}

func (f *fakePods) DeleteUID(_ context.Context, uid string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for k, p := range f.pods {
		if p.UID == uid {
			delete(f.pods, k)
			return nil
		}
	}
	return fmt.Errorf("%w: %s", ErrPodNotFound, uid)
}

func (f *fakePods) List() (ps []PodStatus) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range f.pods {
		ps = append(ps, p)
	}
	return ps
}

func podSocket(t *testing.T, pods *fakePods) (*PodSocket, string) {
	path := filepath.Join(t.TempDir(), "run", "ztun.sock")
	s, err := NewPodSocket(PodSocketOptions{Path: path, Pods: pods})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve() }()
	t.Cleanup(func() {
		if err := s.Shutdown(background(t)); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return s, path
}

func spec(name string) PodSpec {
	return PodSpec{Name: name, Namespace: "default", ServiceAccount: "sa", NetNS: "/run/netns/a",
		IPs: []netip.Addr{netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("fd00::2")}, MTU: 1500}
}

func TestPods(t *testing.T) {
	_, path := podSocket(t, &fakePods{pods: map[string]PodStatus{}})
	ctx := background(t)
	c := NewPodClient(path)
	if l, err := c.List(ctx); err != nil || len(l) != 0 {
		t.Errorf("%v, %v", l, err)
	}
	for _, n := range []string{"b", "a"} {
		if err := c.Add(ctx, spec(n)); err != nil {
			t.Fatal(err)
		}
	}
	l, err := c.List(ctx)
	if err != nil || len(l) != 2 {
		t.Fatalf("%v, %v", l, err)
	}
	want := PodStatus{PodSpec: spec("a"), State: "Up", Device: "ztun0", Offload: PodOffload{VNetHdr: true, TSO4: true},
		Connections: PodConnections{1, 2}}
	if d := cmp.Diff(want, l[0], cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
		t.Error(d)
	}
	for name, kind := range map[string]error{"a": ErrPodConflict, "timeout": ErrPodTimeout, "late": ErrPodUnavailable,
		"broken": ErrPodInternal} {
		if err := c.Add(ctx, spec(name)); !errors.Is(err, kind) {
			t.Errorf("adding %s: %v, want %v", name, err, kind)
		}
	}
	if err := c.Add(ctx, spec("broken")); err == nil || err.Error() != "TUN: operation not permitted" {
		t.Errorf("the server's text is lost: %v", err)
	}
	if err := c.Add(ctx, spec("panics")); err == nil {
		t.Error("a panic was a success")
	}
	if err := c.Add(ctx, PodSpec{}); !errors.Is(err, ErrPodInvalid) {
		t.Errorf("%v", err)
	}
	if err := c.Delete(ctx, "default", "nope"); !errors.Is(err, ErrPodNotFound) ||
		!strings.Contains(err.Error(), "default/nope") {
		t.Errorf("%v", err)
	}
	if err := c.Delete(ctx, "de/fault", "../x"); !errors.Is(err, ErrPodInvalid) {
		t.Errorf("%v", err)
	}
	if err := c.Delete(ctx, "default", "a"); err != nil {
		t.Error(err)
	}
	if l, err := c.List(ctx); err != nil || len(l) != 1 || l[0].Name != "b" {
		t.Errorf("%v, %v", l, err)
	}
}

// TestPodHTTP speaks to the socket without the client.
func TestPodHTTP(t *testing.T) {
	_, path := podSocket(t, &fakePods{pods: map[string]PodStatus{}})
	h := &http.Client{Transport: NewPodClient(path).http.Transport}
	ask := func(method, path, body string) (int, string, string) {
		req, err := http.NewRequest(method, "http://x"+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := h.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var v map[string]any
		json.NewDecoder(resp.Body).Decode(&v)
		e, _ := v["error"].(string)
		return resp.StatusCode, e, resp.Header.Get("Content-Type")
	}
	const good = `{"name":"a","namespace":"ns","serviceAccount":"sa","netns":"1","ips":["::ffff:10.0.0.1"]}`
	for _, tc := range []struct {
		method, path, body string
		code               int
		err                string
	}{
		{"POST", "/v1/pods", good, 201, ""},
		{"POST", "/v1/pods", good, 409, "conflict: "},
		{"GET", "/v1/pods", "", 200, ""},
		{"PUT", "/v1/pods", "", 405, "method not allowed: PUT"},
		{"GET", "/v1/pods/ns/a", "", 405, "method not allowed: GET"},
		{"GET", "/v1/pods/ns", "", 404, "no such path"},
		{"DELETE", "/v1/pods/ns/a/b", "", 404, "no such path"},
		{"DELETE", "/v1/pods/ns/", "", 400, "invalid pod: is missing"},
		{"DELETE", "/v1/pods/ns/%2e%2e", "", 400, "invalid pod: "},
		{"GET", "/", "", 404, "no such path"},
		{"DELETE", "/v1/pods/ns/a", "", 204, ""},
		{"DELETE", "/v1/pods/ns/a", "", 404, "no such pod: ns/a"},
		{"POST", "/v1/pods", "", 400, "malformed request: EOF"},
		{"POST", "/v1/pods", "{}", 400,
			"invalid pod: name is missing; namespace is missing; serviceAccount is missing; netns is missing"},
		{"POST", "/v1/pods", `{"nmae":"a"}`, 400, "malformed request: json: unknown field"},
		{"POST", "/v1/pods", good + "x", 400, "malformed request: something follows"},
		{"POST", "/v1/pods", `{"ips":["10.0.0.300"]}`, 400, "malformed request: "},
		{"POST", "/v1/pods", `{"name":"` + strings.Repeat("a", 100000) + `"}`, 400,
			"malformed request: http: request body too large"},
	} {
		code, e, ct := ask(tc.method, tc.path, tc.body)
		if code != tc.code || !strings.HasPrefix(e, tc.err) || (e == "") != (tc.err == "") || code != 204 &&
			ct != "application/json" {
			t.Errorf("%s %s %.60s: %d %q %q, want %d %q", tc.method, tc.path, tc.body, code, e, ct, tc.code, tc.err)
		}
	}
}

// TestPodsByUID: a pod may be asked for by its uid alone, and without addresses, which the daemon reads then.
func TestPodsByUID(t *testing.T) {
	pods := &fakePods{pods: map[string]PodStatus{}}
	_, path := podSocket(t, pods)
	c, ctx := NewPodClient(path), background(t)
	p := spec("a")
	p.UID, p.IPs = "0f/8 fad", nil
	if err := c.Add(ctx, p); !errors.Is(err, ErrPodInvalid) || !strings.Contains(err.Error(), "uid") {
		t.Errorf("a uid of two words: %v", err)
	}
	p.UID = "0f/8&?fad"
	if err := c.Add(ctx, p); err != nil {
		t.Fatal(err)
	}
	if l := pods.List(); len(l) != 1 || l[0].UID != p.UID || len(l[0].IPs) != 0 {
		t.Errorf("%+v", l)
	}
	for uid, want := range map[string]error{"": ErrPodInvalid, "a b": ErrPodInvalid, strings.Repeat("a", 321): ErrPodInvalid,
		"other": ErrPodNotFound} {
		if err := c.DeleteUID(ctx, uid); !errors.Is(err, want) {
			t.Errorf("%.10q: %v, want %v", uid, err, want)
		}
	}
	if err := c.DeleteUID(ctx, p.UID); err != nil || len(pods.List()) != 0 {
		t.Errorf("%v, %v", err, pods.List())
	}
}

// TestPodHandlers: what else the socket answers is answered, and its errors logged, as what pods are asked for.
func TestPodHandlers(t *testing.T) {
	var log lockedBuffer
	path := filepath.Join(t.TempDir(), "ztun.sock")
	s, err := NewPodSocket(PodSocketOptions{Path: path, Pods: &fakePods{},
		Logger: slog.New(slog.NewTextHandler(&log, nil)),
		Handlers: map[string]PodHandler{
			"/v1/good": func(http.ResponseWriter, *http.Request) (any, error) { return map[string]int{"n": 1}, nil },
			"/v1/bad": func(http.ResponseWriter, *http.Request) (any, error) {
				return nil, fmt.Errorf("%w: pod n/x", ErrPodNotFound)
			},
			"/v1/own": func(w http.ResponseWriter, _ *http.Request) (any, error) {
				w.Header().Set("Content-Type", "text/plain")
				w.Write([]byte("mine"))
				return nil, nil
			},
		}})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve() }()
	c := NewPodClient(path)
	for path, want := range map[string]string{"/v1/good": "{\"n\":1}\n", "/v1/own": "mine"} {
		r, err := c.Get(background(t), path, nil)
		if err != nil {
			t.Fatal(path, err)
		}
		if b, err := io.ReadAll(r); err != nil || string(b) != want {
			t.Errorf("%s: %q, %v", path, b, err)
		}
		r.Close()
	}
	if _, err := c.Get(background(t), "/v1/bad", nil); !errors.Is(err, ErrPodNotFound) {
		t.Errorf("bad: %v", err)
	}
	if err := s.Shutdown(background(t)); err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if n := strings.Count(log.String(), "control request failed"); n != 1 || !strings.Contains(log.String(), "/v1/bad") {
		t.Errorf("%d lines: %s", n, log.String())
	}
}

func TestPodValidation(t *testing.T) {
	for _, tc := range []struct {
		change func(*PodSpec)
		want   string // "" is valid
	}{
		{func(*PodSpec) {}, ""},
		{func(p *PodSpec) { p.Name = "a.b-c.9" }, ""},
		{func(p *PodSpec) { p.MTU = 0 }, ""},
		{func(p *PodSpec) { p.IPs = p.IPs[1:] }, ""},
		{func(p *PodSpec) { p.Name = "A" }, `name "A" is not a Kubernetes name`},
		{func(p *PodSpec) { p.Name = "-a" }, `name "-a" is not`},
		{func(p *PodSpec) { p.Name = "a..b" }, `name "a..b" is not`},
		{func(p *PodSpec) { p.Namespace = strings.Repeat("a", 64) }, "namespace is longer than 63"},
		{func(p *PodSpec) { p.ServiceAccount = "a/b" }, `serviceAccount "a/b" is not`},
		{func(p *PodSpec) { p.NetNS = "" }, "netns is missing"},
		{func(p *PodSpec) { p.NetNS = "a\x00" }, "netns is not"},
		{func(p *PodSpec) { p.IPs = nil }, "ips is empty"},
		{func(p *PodSpec) { p.IPs = make([]netip.Addr, 1) }, "invalid address"},
		{func(p *PodSpec) {
			p.IPs = append(p.IPs, netip.MustParseAddr("::ffff:10.0.0.9"))
		}, "addresses 10.1.0.2 and 10.0.0.9 are of one family"},
		{func(p *PodSpec) { p.IPs[0] = netip.MustParseAddr("127.0.0.1") }, "address 127.0.0.1 cannot be a pod's"},
		{func(p *PodSpec) { p.IPs[1] = netip.MustParseAddr("fe80::1%eth0") }, "has a zone"},
		{func(p *PodSpec) { p.IPs[1] = netip.MustParseAddr("ff02::1") }, "cannot be a pod's"},
		{func(p *PodSpec) { p.MTU = 1279 }, "mtu 1279 is not between 1280 and 65535"},
		{func(p *PodSpec) { p.MTU = 65536 }, "mtu 65536"},
		{func(p *PodSpec) { p.MTU = -1 }, "mtu -1"},
	} {
		p := spec("a")
		tc.change(&p)
		err := p.Validate()
		if (err == nil) != (tc.want == "") || err != nil && (!errors.Is(err, ErrPodInvalid) ||
			!strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%+v: %v, want %q", p, err, tc.want)
		}
	}
	if s := (PodOffload{Why: "EINVAL"}).String(); s != "none (EINVAL)" {
		t.Error(s)
	}
	if s := (PodOffload{VNetHdr: true, CSum: true, TSO4: true, TSO6: true, USO: true}).String(); s !=
		"vnet,csum,tso4,tso6,uso" {
		t.Error(s)
	}
}

func TestPodSocketFile(t *testing.T) {
	s, path := podSocket(t, &fakePods{})
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o600 || st.Mode().Type() != fs.ModeSocket {
		t.Errorf("%v %v", st.Mode(), err)
	}
	if st, err = os.Stat(filepath.Dir(path)); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("%v %v", st.Mode(), err)
	}
	if _, err := NewPodSocket(PodSocketOptions{Path: path}); !errors.Is(err, syscall.EADDRINUSE) ||
		!strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "ZTUN_SOCKET") {
		t.Errorf("a second server: %v", err)
	}
	if _, err := NewPodClient(path).List(background(t)); err != nil {
		t.Errorf("the failed second server did harm: %v", err)
	}
	if err := s.Shutdown(background(t)); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}

func TestPodSocketLeftovers(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	try := func() error {
		s, err := NewPodSocket(PodSocketOptions{Path: path, Pods: &fakePods{}})
		if err == nil {
			s.Close()
		}
		return err
	}
	// A process that died leaves its socket (and perhaps the temporary one).
	for _, p := range []string{path, path + ".new"} {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: p, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		l.Close()
	}
	if err := try(); err != nil {
		t.Errorf("leftover: %v", err)
	}
	// A living server that knows nothing of the lock.
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	if err := try(); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("in use: %v", err)
	}
	l.Close()
	// Something else of that name is not ours to remove.
	if err := os.WriteFile(path, []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := try(); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("a file: %v", err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "data" {
		t.Errorf("the file was touched: %q %v", b, err)
	}
	path = filepath.Join(dir, strings.Repeat("x", 120))
	if err := try(); err == nil || !strings.Contains(err.Error(), "longer than") {
		t.Errorf("a long path: %v", err)
	}
	path = filepath.Join(dir, "s", "below-a-file")
	if err := try(); err == nil {
		t.Error("a directory that cannot be")
	}
	for path, want := range map[string]string{filepath.Join(dir, "none"): "is `ztun proxy` running",
		filepath.Join(dir, "dead"): "nobody listens"} {
		if strings.HasSuffix(path, "dead") {
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
			if err != nil {
				t.Fatal(err)
			}
			l.SetUnlinkOnClose(false)
			l.Close()
		}
		if _, err := NewPodClient(path).List(background(t)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// TestPodCallerLeaves: a request that has begun is carried through; Shutdown waits for it; Close cuts it.
func TestPodCallerLeaves(t *testing.T) {
	pods := &fakePods{pods: map[string]PodStatus{}, hold: make(chan struct{}), entered: make(chan struct{}, 9)}
	s, path := podSocket(t, pods)
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		<-pods.entered
		cancel()
	}()
	if err := NewPodClient(path).Add(ctx, spec("a")); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	down := make(chan error, 1)
	go func() { down <- s.Shutdown(background(t)) }()
	close(pods.hold)
	if err := <-down; err != nil {
		t.Error(err)
	}
	if len(pods.List()) != 1 {
		t.Error("Shutdown did not wait for what the caller had left behind")
	}

	pods = &fakePods{pods: map[string]PodStatus{}, hold: make(chan struct{}), entered: make(chan struct{}, 9)}
	s, path = podSocket(t, pods)
	got := make(chan error, 1)
	go func() { got <- NewPodClient(path).Add(context.Background(), spec("a")) }()
	<-pods.entered
	s.Close()
	if err := <-got; err == nil {
		t.Error("Close did not end the request")
	}
	if len(pods.List()) != 0 {
		t.Error("the pod was added after Close")
	}
}

// FuzzPod: any body is a valid pod or a 400.
func FuzzPod(f *testing.F) {
	f.Add(`{"name":"a","namespace":"ns","serviceAccount":"sa","netns":"1","ips":["10.0.0.1","fd00::1"],"mtu":1500}`)
	f.Add(`{"ips":["::ffff:1.2.3.4%x"],"mtu":1e99}`)
	f.Fuzz(func(t *testing.T, body string) {
		p, err := decodePod(strings.NewReader(body))
		if err != nil {
			if podStatus(err) != 400 {
				t.Fatalf("%d %v", podStatus(err), err)
			}
			return
		}
		b, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decodePod(strings.NewReader(string(b))); err != nil {
			t.Fatalf("%s: %v", b, err)
		}
	})
}
