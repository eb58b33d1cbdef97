package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"ztun/admin/zds"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 20 * time.Second

// fake is everything around an Enroller.
type fake struct {
	*Enroller
	t *testing.T

	mu     sync.Mutex
	seen   map[Ref]Pod // by the watch
	there  map[Ref]Pod // at the API server
	labels map[string]string
	down   error             // the API server
	netns  map[string]string // uid to the namespace's path
	put    map[string]string // uid to the inode
	state  zds.State
	reason error
	did    []string
	full   error         // of Put
	atOnce bool          // the proxies answer within Put
	acked  chan struct{} // closed when state may be waited for no longer
}

func newFake(t *testing.T) *fake {
	f := &fake{t: t, seen: map[Ref]Pod{}, there: map[Ref]Pod{}, labels: map[string]string{}, netns: map[string]string{},
		put: map[string]string{}, state: zds.Acked}
	f.Enroller = New(Options{Cluster: f, Proxies: proxies{f}, Namespaces: f, Logger: slog.New(slog.DiscardHandler)})
	return f
}

func (f *fake) note(format string, a ...any) { f.did = append(f.did, fmt.Sprintf(format, a...)) }

// done is what was done since it was last asked.
func (f *fake) done() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := strings.Join(f.did, ", ")
	f.did = nil
	return s
}

func (f *fake) Pod(ref Ref) (Pod, map[string]string, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p, ok := f.seen[ref]
	return p, f.labels, ok
}

func (f *fake) Fetch(_ context.Context, ref Ref) (Pod, map[string]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p, ok := f.there[ref]
	if !ok && f.down == nil {
		return p, nil, ErrNotFound
	}
	return p, f.labels, f.down
}

func (f *fake) Annotate(_ context.Context, p Pod, value string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.note("annotate %s %q", p.UID, value)
	if p, ok := f.seen[p.Ref()]; ok && f.down == nil {
		p.Annotations = maps.Clone(p.Annotations)
		p.Annotations[AnnotationRedirected] = value
		f.seen[p.Ref()] = p
	}
	return f.down
}

func (f *fake) Warn(p Pod, reason, text string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.note("warn %s %s", p.UID, reason)
	if text == "" {
		f.t.Error("an event without words")
	}
}

func (f *fake) Again(r Ref) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.note("again")
}

func (f *fake) Later(r Ref) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.note("later")
}

func (f *fake) Open(uid string) (*os.File, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if path, ok := f.netns[uid]; ok {
		return os.Open(path)
	}
	return nil, ErrNoProcess
}

type proxies struct{ *fake }

func (p proxies) Put(pod zds.Pod) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if pod.Netns == nil {
		p.note("keep %s", pod.UID)
		p.put[pod.UID] = ""
		return nil
	}
	p.note("put %s", pod.UID)
	if p.full != nil {
		return errors.Join(p.full, pod.Netns.Close())
	}
	p.put[pod.UID] = pod.Netns.Name()
	if p.atOnce { // a proxy's answer may be there before Put returns
		p.mu.Unlock()
		p.Answered(pod.UID)
		p.mu.Lock()
	}
	return pod.Netns.Close()
}

func (p proxies) Remove(uid string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.note("remove %s", uid)
	delete(p.put, uid)
}

func (p proxies) State(uid string) (zds.State, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if path, ok := p.put[uid]; !ok {
		return zds.Unknown, nil
	} else if path == "" {
		return zds.Waiting, nil
	}
	return p.fake.state, p.reason
}

func (p proxies) Await(ctx context.Context, uid string) error {
	if p.acked != nil {
		<-p.acked
	}
	if _, ok := ctx.Deadline(); !ok {
		return errors.New("no time limit")
	}
	st, err := p.State(uid)
	if st == zds.Acked {
		return nil
	}
	return err
}

// see has the watch see the pod with a uid; "" sees it go.
func (f *fake) see(uid, words string) Ref {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := pod(words)
	if p.UID = uid; uid == "" {
		delete(f.seen, p.Ref())
		delete(f.there, p.Ref())
	} else {
		f.seen[p.Ref()], f.there[p.Ref()] = p, p
	}
	return p.Ref()
}

// is reconciles a pod, and compares what was done for it.
func (f *fake) is(what string, ref Ref, want string) {
	f.t.Helper()
	err := f.Reconcile(context.Background(), ref)
	got := f.done()
	if err != nil {
		got += "!"
	}
	if got != want {
		f.t.Errorf("%s: did %s (%v), want %s", what, got, err, want)
	}
}

// A running pod's life: labelled, captured, made anew under its name, unlabelled, labelled again, gone.
func TestReconcile(t *testing.T) {
	f := newFake(t)
	f.netns["u1"], f.netns["u2"] = "/proc/self/ns/net", "/proc/self/ns/net"
	f.state = zds.Waiting
	ref := f.see("u1", "ip")
	f.is("no label", ref, "")
	f.see("u1", "ip mode=ambient")
	f.is("labelled", ref, "put u1")
	f.is("no proxy has answered", ref, "")
	f.Answered("u1")
	f.Answered("nobody")
	if got := f.done(); got != "" {
		t.Error("an answer that is none:", got)
	}
	f.state = zds.Acked
	f.Answered("u1")
	f.is("acked", ref, `again, annotate u1 "enabled"`)
	f.is("nothing new", ref, "")
	f.see("u2", "mode=ambient")
	f.is("another pod of that name, which has no sandbox yet", ref, "remove u1")
	f.see("u2", "ip mode=ambient")
	f.is("it runs", ref, "put u2")
	f.is("and is captured", ref, `annotate u2 "enabled"`)
	f.see("u2", "ip mode=none redirected=enabled")
	f.is("unlabelled", ref, `annotate u2 "", remove u2`)
	f.is("nothing new", ref, "")
	f.see("u2", "ip mode=ambient")
	f.is("labelled again", ref, "put u2")
	f.see("", "")
	f.is("gone", ref, "remove u2")
	f.is("still gone", ref, "")
	if s := f.Stats(); s.Held != 0 || s.Announced != 2 || s.Released != 1 || len(f.refs) != 0 || len(f.busy) != 0 {
		t.Errorf("%+v, %d refs, %d busy", s, len(f.refs), len(f.busy))
	}
}

func TestReconcileTroubles(t *testing.T) {
	f := newFake(t)
	ref := f.see("u1", "ip mode=ambient redirected=enabled")
	f.is("captured before, no process", ref, "keep u1, warn u1 NotCaptured!")
	f.netns["u1"] = "/proc/self/ns/net"
	f.is("now there is", ref, "put u1")
	f.state, f.reason = zds.Refused, errors.New("port 15008 is taken")
	f.Answered("u1")
	f.is("refused", ref, "later, warn u1 NotCaptured, put u1!")
	delete(f.netns, "u1")
	f.is("refused, and its process has ended", ref, "warn u1 NotCaptured!")
	f.state, f.reason = zds.Acked, nil
	f.is("acked", ref, "")
	f.full = errors.New("no place")
	f.state, f.reason = zds.Refused, errors.New("again")
	f.netns["u1"] = "/proc/self/ns/net"
	f.is("no place for another try", ref, "warn u1 NotCaptured, put u1, warn u1 NotCaptured!")
	if h := f.holds(ref); h.uid != "u1" || !h.found {
		t.Errorf("%+v", h)
	}
	f.full, f.state, f.reason = nil, zds.Acked, nil
	f.see("u1", "ip mode=ambient")
	f.down = errors.New("the API server is away")
	f.is("it cannot be announced", ref, `annotate u1 "enabled"!`)
	f.see("u1", "ip mode=none redirected=enabled")
	f.is("nor taken back, but let go of it is", ref, `annotate u1 "", remove u1!`)
	f.down = nil
	f.is("now it can", ref, `annotate u1 "", remove u1`)
	p := pod("ip mode=ambient")
	p.UID, p.Annotations[annotationHash] = "u3", hash
	p.Annotations["ambient.istio.io/dns-capture"] = "false"
	f.netns[hash] = "/proc/self/ns/net"
	f.seen[ref] = p
	f.is("a static pod, by its hash", ref, "put u3")
	f.is("what is not supported is said", ref, `annotate u3 "enabled", warn u3 NotSupported`)
	f.see("u3", "ip mode=ambient")
	f.is("once", ref, `annotate u3 "enabled"`)
}

// An answer that is quicker than Put is not lost: nobody else would announce the pod.
func TestAnswerAtOnce(t *testing.T) {
	f := newFake(t)
	f.netns["u1"], f.atOnce = "/proc/self/ns/net", true
	ref := f.see("u1", "ip mode=ambient")
	f.is("acked within Put", ref, "put u1, again")
	f.is("announced", ref, `annotate u1 "enabled"`)
	f.see("", "")
	f.is("gone", ref, "remove u1")
	f.state, f.reason = zds.Refused, errors.New("no")
	f.see("u1", "ip mode=ambient")
	f.is("refused within Put", ref, "put u1, later")
	f.full = errors.New("no place")
	f.see("u2", "ip mode=ambient")
	f.netns["u2"] = "/proc/self/ns/net"
	f.is("no place", ref, "remove u1, put u2, remove u2, warn u2 NotCaptured!")
	if len(f.refs) != 0 || len(f.held) != 0 {
		t.Error(f.refs, f.held)
	}
}

// The plugin: 200 only when a proxy has the pod, or when it is not the mesh's by the API server's own word.
func TestPlugin(t *testing.T) {
	const ns = "/proc/self/ns/net"
	body := func(netns string) string {
		b, err := json.Marshal(map[string]any{"Netns": netns, "PodName": "web", "PodNamespace": "shop",
			"IPs": []map[string]any{{"Interface": 2, "Address": map[string]any{"IP": "10.0.0.7", "Mask": "/////w=="},
				"Gateway": "10.0.0.1"}}})
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	withUID := func(body, uid string) string { return strings.TrimSuffix(body, "}") + `,"PodUID":"` + uid + `"}` }
	for _, c := range []struct {
		name        string
		seen, there string // "-": not
		down        bool
		state       zds.State
		body        string
		code        int
		want, did   string
	}{
		{"captured", "mode=ambient", "mode=ambient", false, zds.Acked, body(ns), 200, `{"enrolled":true}`, "put u, again"},
		{"captured while the API server is away", "mode=ambient", "-", true, zds.Acked, body(ns), 200,
			`{"enrolled":true}`, "put u, again"},
		{"not seen yet", "-", "mode=ambient", false, zds.Acked, body(ns), 200, `{"enrolled":true}`, "put u, again"},
		{"labelled a moment ago", "", "mode=ambient", false, zds.Acked, body(ns), 200, `{"enrolled":true}`, "put u, again"},
		{"not the mesh's", "", "", false, zds.Acked, body(ns), 200, `{"enrolled":false}`, "again"},
		{"not the mesh's, the API server is away", "", "-", true, zds.Acked, body(ns), 200, `{"enrolled":false}`, "again"},
		{"there is none", "-", "-", false, zds.Acked, body(ns), 503, "no such pod: not found", "again"},
		{"nobody knows, the API server is away", "-", "-", true, zds.Acked, body(ns), 504, "cannot be known: away", "again"},
		{"another of its name was seen", "", "mode=ambient uid=v", false, zds.Acked, withUID(body(ns), "v"), 200,
			`{"enrolled":true}`, "put v, again"},
		{"another of its name was seen, and the API server is away", "mode=ambient", "-", true, zds.Acked,
			withUID(body(ns), "v"), 504, "cannot be known: away", "again"},
		{"another of its name is there by now", "mode=ambient", "mode=ambient", false, zds.Acked,
			withUID(body(ns), "old"), 503, "another pod of this name", "again"},
		{"gone meanwhile", "", "-", false, zds.Acked, body(ns), 503, "not found", "again"},
		{"refused", "mode=ambient", "-", false, zds.Refused, body(ns), 503, "the node proxy: no",
			"put u, remove u, warn u NotCaptured, again"},
		{"no proxy", "mode=ambient", "-", false, zds.Waiting, body(ns), 503, "the node proxy: no",
			"put u, remove u, warn u NotCaptured, again"},
		{"no namespace", "mode=ambient", "-", false, zds.Acked, body("/nowhere"), 503, "/nowhere",
			"warn u NotCaptured, again"},
		{"a file of another kind", "mode=ambient", "-", false, zds.Acked, body("/dev/null"), 503, "no network namespace",
			"warn u NotCaptured, again"},
		{"no path", "mode=ambient", "-", false, zds.Acked, body("net"), 400, "no path", ""},
		{"nonsense", "mode=ambient", "-", false, zds.Acked, "{", 400, "PodNamespace", ""},
		{"no pod", "mode=ambient", "-", false, zds.Acked, `{"Netns":"` + ns + `"}`, 400, "no pod is called", ""},
		{"a path for a name", "-", "-", false, zds.Acked,
			`{"Netns":"` + ns + `","PodName":"../x","PodNamespace":"shop"}`, 400, "no pod is called", ""},
		{"without end", "-", "-", false, zds.Acked, `{"Netns":"` + strings.Repeat("x", 70000) + `"}`, 400, "too large", ""},
	} {
		f := newFake(t)
		if c.seen != "-" {
			p := pod(c.seen)
			f.seen[p.Ref()] = p
		}
		if c.there != "-" {
			p := pod(c.there)
			f.there[p.Ref()] = p
		}
		if c.down {
			f.down = errors.New("away")
		}
		if f.state = c.state; c.state != zds.Acked {
			f.reason = errors.New("no")
		}
		w := httptest.NewRecorder()
		f.Plugin("").ServeHTTP(w, httptest.NewRequest("POST", PluginPath, strings.NewReader(c.body)))
		if w.Code != c.code || !strings.Contains(w.Body.String(), c.want) {
			t.Errorf("%s: %d %s, want %d %s", c.name, w.Code, w.Body, c.code, c.want)
		}
		if got := f.done(); got != c.did {
			t.Errorf("%s: did %s, want %s", c.name, got, c.did)
		}
		if len(f.busy) != 0 {
			t.Errorf("%s: it is still busy", c.name)
		}
	}
	f := newFake(t)
	w := httptest.NewRecorder()
	f.Plugin("").ServeHTTP(w, httptest.NewRequest("GET", PluginPath, nil))
	if w.Code != http.StatusMethodNotAllowed {
		t.Error(w.Code)
	}
}

// A pod that the plugin has named stays while the watch has not shown it and the API server has it.
func TestPluginBeforeWatch(t *testing.T) {
	f := newFake(t)
	p := pod("mode=ambient")
	ref := p.Ref()
	f.there[ref] = p
	open := func() (*os.File, error) { return os.Open("/proc/self/ns/net") }
	if in, err := f.Add(context.Background(), ref, "", open); !in || err != nil {
		t.Fatal(in, err)
	}
	f.done()
	f.is("not seen yet", ref, "!")
	f.down = errors.New("away")
	f.is("nobody knows", ref, "!")
	f.down = nil
	f.see("u", "mode=ambient")
	f.is("seen", ref, `annotate u "enabled"`)
	f.see("", "")
	f.is("gone", ref, "remove u")

	f.there[ref] = p
	if in, err := f.Add(context.Background(), ref, "", open); !in || err != nil {
		t.Fatal(in, err)
	}
	f.done()
	delete(f.there, ref)
	f.is("it was gone before it was seen", ref, "remove u")

	// The watch still shows the pod that had its name before.
	f.see("old", "mode=ambient")
	f.there[ref] = p
	if in, err := f.Add(context.Background(), ref, "u", open); !in || err != nil {
		t.Fatal(in, err)
	}
	f.done()
	f.is("its predecessor is seen", ref, "!")
	f.see("u", "mode=ambient")
	f.is("it is seen", ref, `annotate u "enabled"`)
}

// While the plugin waits for a pod, the watch does not meddle with it, and a second plugin is refused.
func TestPluginAlone(t *testing.T) {
	f := newFake(t)
	f.acked = make(chan struct{})
	ref := f.see("u", "ip mode=ambient")
	opened := make(chan struct{})
	var adding sync.WaitGroup
	adding.Go(func() {
		in, err := f.Add(context.Background(), ref, "u", func() (*os.File, error) {
			close(opened)
			return os.Open("/proc/self/ns/net")
		})
		if !in || err != nil {
			t.Error(in, err)
		}
	})
	select {
	case <-opened:
	case <-time.After(patience):
		t.Fatal("it is not asked for its namespace")
	}
	if err := f.Reconcile(context.Background(), ref); err != nil {
		t.Error(err)
	}
	if in, err := f.Add(context.Background(), ref, "", nil); !in || err == nil {
		t.Error("two at once:", in, err)
	}
	close(f.acked)
	adding.Wait()
	if got := f.done(); got != "put u, again" {
		t.Error(got)
	}
	if refs := slices.Collect(maps.Values(f.refs)); !slices.Equal(refs, []Ref{ref}) {
		t.Error(refs)
	}
}
