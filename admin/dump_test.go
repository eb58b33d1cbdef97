package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestDumpSample(t *testing.T) {
	want, err := os.ReadFile("../docs/samples/config_dump-a.json")
	if err != nil {
		t.Fatal(err)
	}
	var v map[string]any
	if err := json.Unmarshal(want, &v); err != nil {
		t.Fatal(err)
	}
	snapshots := 0
	s := testAdmin(t, func(o *AdminOptions) {
		o.Dump = func() map[string]Section {
			snapshots++
			m := map[string]Section{}
			for k, x := range v {
				m[k] = SectionOf(func() any { return x })
			}
			m["workloads"] = func(_ context.Context, e *Encoder) error {
				e.BeginArray()
				for _, w := range v["workloads"].([]any) {
					if err := e.Value(w); err != nil {
						return err
					}
				}
				return e.EndArray()
			}
			return m
		}
	})
	for _, method := range []string{"GET", "POST"} {
		resp, body := do(t, method, urlOf(s, "/config_dump?x=1"))
		if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "application/json" {
			t.Errorf("%s %v", resp.Status, resp.Header)
		}
		if d := cmp.Diff(strings.TrimRight(string(want), "\n"), body); d != "" {
			t.Errorf("%s:\n%s", method, d)
		}
	}
	if snapshots != 2 {
		t.Errorf("%d snapshots for 2 dumps", snapshots)
	}
}

func dumping(t *testing.T, m map[string]Section) *Server {
	return testAdmin(t, func(o *AdminOptions) { o.Dump = func() map[string]Section { return m } })
}

func TestDumpErrors(t *testing.T) {
	for name, sec := range map[string]Section{
		"error":    func(context.Context, *Encoder) error { return errors.New("broken here") },
		"nothing":  func(context.Context, *Encoder) error { return nil },
		"open":     func(_ context.Context, e *Encoder) error { return e.BeginArray() },
		"encoding": func(_ context.Context, e *Encoder) error { return e.Value(make(chan int)) },
		"swallows": func(_ context.Context, e *Encoder) error { e.Value(make(chan int)); return nil },
	} {
		s := dumping(t, map[string]Section{"a": SectionOf(func() any { return 1 }), "config": sec})
		if resp, body := do(t, "GET", urlOf(s, "/config_dump")); resp.StatusCode != 500 ||
			!strings.HasPrefix(body, "config: ") {
			t.Errorf("%s: %s %q", name, resp.Status, body)
		}
	}
	// After the first chunk only a broken connection can say it.
	late := func(_ context.Context, e *Encoder) error {
		e.Value(strings.Repeat("x", 2*dumpChunk))
		return errors.New("too late")
	}
	s := dumping(t, map[string]Section{"config": late})
	resp, err := client.Get(urlOf(s, "/config_dump"))
	if err == nil {
		_, err = io.ReadAll(resp.Body)
		resp.Body.Close()
	}
	if err == nil {
		t.Error("a broken dump looked whole")
	}
	if resp, body := do(t, "GET", urlOf(testAdmin(t, nil), "/config_dump")); resp.StatusCode != 200 || body != "{}" {
		t.Errorf("no sections: %s %q", resp.Status, body)
	}
}

// TestDumpOneAtATime: dumps never overlap, too many waiting ones are turned away, and nothing else on any
// server waits for them.
func TestDumpOneAtATime(t *testing.T) {
	var running, most atomic.Int32
	release := make(chan struct{})
	entered := make(chan struct{}, 100)
	s := dumping(t, map[string]Section{"config": func(_ context.Context, e *Encoder) error {
		most.Store(max(most.Load(), running.Add(1)))
		defer running.Add(-1)
		entered <- struct{}{}
		<-release
		return e.Value(1)
	}})
	var wg sync.WaitGroup
	var ok, busy atomic.Int32
	ask := func() {
		resp, _ := do(t, "GET", urlOf(s, "/config_dump"))
		switch {
		case resp.StatusCode == 200:
			ok.Add(1)
		case resp.StatusCode == 503 && resp.Header.Get("Retry-After") != "":
			busy.Add(1)
		default:
			t.Error(resp.Status)
		}
	}
	wg.Go(ask)
	<-entered
	for range dumpWaiting + 3 {
		wg.Go(ask)
	}
	for busy.Load() < 4 { // one runs, 7 wait, 4 are turned away
		time.Sleep(time.Millisecond)
	}
	// A client that leaves while it waits gives its place back, without ever getting a dump.
	if resp, body := do(t, "POST", urlOf(s, "/logging")); resp.StatusCode != 200 {
		t.Errorf("/logging during a dump: %s %q", resp.Status, body)
	}
	close(release)
	wg.Wait()
	if most.Load() != 1 || ok.Load() != dumpWaiting || busy.Load() != 4 {
		t.Errorf("%d at once, %d answered, %d turned away", most.Load(), ok.Load(), busy.Load())
	}
}

// TestDumpClientLeaves: the section sees it and the next dump gets its turn.
func TestDumpClientLeaves(t *testing.T) {
	first := true
	ended := make(chan error, 1)
	s := dumping(t, map[string]Section{"config": func(ctx context.Context, e *Encoder) error {
		if !first {
			return e.Value("fine")
		}
		first = false
		e.BeginArray()
		for ctx.Err() == nil && e.Err() == nil {
			e.Value(strings.Repeat("x", 1000))
		}
		err := errors.Join(ctx.Err(), e.Err())
		ended <- err
		return err
	}})
	ctx, cancel := context.WithCancel(background(t))
	req, _ := http.NewRequestWithContext(ctx, "GET", urlOf(s, "/config_dump"), nil)
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	io.CopyN(io.Discard, resp.Body, 100000)
	cancel()
	resp.Body.Close()
	if err := <-ended; err == nil {
		t.Error("the section ended without an error")
	}
	if resp, body := do(t, "GET", urlOf(s, "/config_dump")); resp.StatusCode != 200 || !strings.Contains(body, "fine") {
		t.Errorf("the next dump: %s %q", resp.Status, body)
	}
}

// TestDumpMemory: what a dump holds does not grow with what it dumps.
func TestDumpMemory(t *testing.T) {
	const n = 50000
	type item struct {
		Labels map[string]string `json:"labels"`
		Name   string            `json:"name"`
	}
	it := item{map[string]string{"a": strings.Repeat("v", 300)}, strings.Repeat("n", 300)}
	var peak atomic.Uint64
	s := dumping(t, map[string]Section{"workloads": func(_ context.Context, e *Encoder) error {
		var ms runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&ms)
		base := ms.HeapAlloc
		e.BeginArray()
		for i := range n {
			if err := e.Value(it); err != nil {
				return err
			}
			if i%10000 == 9999 {
				runtime.GC()
				runtime.ReadMemStats(&ms)
				if ms.HeapAlloc > base {
					peak.Store(max(peak.Load(), ms.HeapAlloc-base))
				}
			}
		}
		return e.EndArray()
	}})
	resp, err := client.Get(urlOf(s, "/config_dump"))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	size, err := io.Copy(io.Discard, resp.Body)
	if err != nil || size < n*600 {
		t.Fatalf("%d bytes, %v", size, err)
	}
	if peak.Load() > 2<<20 {
		t.Errorf("a dump of %d MiB held %d KiB", size>>20, peak.Load()>>10)
	}
}

// TestDumpWaitIsBounded: who waits too long is told to come again, and so are those that wait at the end.
func TestDumpWaitIsBounded(t *testing.T) {
	entered, release := make(chan struct{}, 1), make(chan struct{})
	d := newDumper(func() map[string]Section {
		return map[string]Section{"config": func(_ context.Context, e *Encoder) error {
			entered <- struct{}{}
			<-release
			return e.Value(1)
		}}
	}, slog.New(slog.DiscardHandler))
	drain := make(chan struct{})
	d.wait, d.drain = 10*time.Millisecond, drain
	ask := func() *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		d.ServeHTTP(w, httptest.NewRequest("GET", "/config_dump", nil))
		return w
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if w := ask(); w.Code != 200 {
			t.Errorf("the first: %d", w.Code)
		}
	})
	<-entered
	if w := ask(); w.Code != 503 || w.Header().Get("Retry-After") == "" ||
		!strings.Contains(w.Body.String(), "under way") {
		t.Errorf("%d %v %s", w.Code, w.Header(), w.Body)
	}
	d.wait = time.Hour
	close(drain)
	if w := ask(); w.Code != 503 || !strings.Contains(w.Body.String(), "shutting down") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	close(release)
	wg.Wait()
	if d.done.Load() != 1 || d.refused.Load() != 2 || d.failed.Load() != 0 {
		t.Errorf("done %d, refused %d, failed %d", d.done.Load(), d.refused.Load(), d.failed.Load())
	}
}

// TestWorkloadState: the pods of a real ztunnel's dump, byte for byte. Checklist 75.
func TestWorkloadState(t *testing.T) {
	data, err := os.ReadFile("../docs/samples/config_dump-inpod-a.json")
	if err != nil {
		t.Fatal(err)
	}
	var sample struct {
		WorkloadState json.RawMessage `json:"workloadState"`
	}
	var pods struct {
		WorkloadState map[string]struct {
			Info        struct{ Name, Namespace, ServiceAccount string }
			State       string
			Connections struct{ Inbound, Outbound []map[string]*string }
		}
	}
	if err := errors.Join(json.Unmarshal(data, &sample), json.Unmarshal(data, &pods)); err != nil {
		t.Fatal(err)
	}
	if len(pods.WorkloadState) == 0 {
		t.Fatal("the sample has no pods")
	}
	list := func(in []map[string]*string) (out []ConnectionDump) {
		for _, c := range in {
			x := ConnectionDump{Src: netip.MustParseAddrPort(*c["src"]), ActualDst: netip.MustParseAddrPort(*c["actualDst"]),
				Protocol: *c["protocol"]}
			if o := c["originalDst"]; o != nil {
				x.OriginalDst = netip.MustParseAddrPort(*o)
			}
			out = append(out, x)
		}
		return out
	}
	all := map[string]func() PodDump{}
	connections := 0
	for uid, p := range pods.WorkloadState {
		connections += len(p.Connections.Inbound) + len(p.Connections.Outbound)
		all[uid] = func() PodDump {
			return PodDump{Name: p.Info.Name, Namespace: p.Info.Namespace, ServiceAccount: p.Info.ServiceAccount,
				Up:      p.State == "Up",
				Inbound: list(p.Connections.Inbound), Outbound: list(p.Connections.Outbound)}
		}
	}
	if connections == 0 {
		t.Fatal("the sample has no connections")
	}
	write := func(all map[string]func() PodDump) string {
		var b bytes.Buffer
		e := NewEncoder(&b)
		e.BeginObject()
		e.Key("workloadState")
		if err := WorkloadState(func() map[string]func() PodDump { return all })(context.Background(), e); err != nil {
			t.Fatal(err)
		}
		e.EndObject()
		return b.String()
	}
	if d := cmp.Diff("{\n  \"workloadState\": "+string(sample.WorkloadState)+"\n}", write(all)); d != "" {
		t.Error(d)
	}
	pending := map[string]func() PodDump{"u": func() PodDump {
		return PodDump{Name: "p", Namespace: "n", ServiceAccount: "s"}
	}}
	if got, want := strings.Join(strings.Fields(write(pending)), " "),
		`{ "workloadState": { "u": { "info": { "name": "p", "namespace": "n", "serviceAccount": "s" }, "state": "Pending" } } }`; got != want {
		t.Errorf("%s", got)
	}
	if got := write(nil); got != "{\n  \"workloadState\": {}\n}" {
		t.Errorf("no pods: %s", got)
	}
}

// TestDumpPauses: a section that works long without writing can pause, and pauses are rare.
func TestDumpPauses(t *testing.T) {
	paused := 0
	s := dumping(t, map[string]Section{"config": func(_ context.Context, e *Encoder) error {
		return e.Raw(func(w io.Writer) error {
			p := w.(interface{ Pause() })
			started := time.Now()
			for time.Since(started) < 20*time.Millisecond { // of work and pauses
				before := time.Now()
				p.Pause()
				if time.Since(before) >= breathFor {
					paused++
				}
			}
			_, err := io.WriteString(w, "1")
			return err
		})
	}})
	if resp, body := do(t, "GET", urlOf(s, "/config_dump")); resp.StatusCode != 200 ||
		!strings.Contains(body, `"config": 1`) {
		t.Errorf("%s %q", resp.Status, body)
	}
	if paused == 0 || paused > 20 {
		t.Errorf("%d pauses in 20 ms", paused)
	}
}
