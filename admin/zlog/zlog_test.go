package zlog

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// buffer is a writer that tests may read at any time.
type buffer struct {
	mu     sync.Mutex
	b      bytes.Buffer
	writes []int // lines of each write
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.writes = append(b.writes, bytes.Count(p, []byte("\n")))
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func open(t testing.TB, o Options) *Log {
	l := New(o)
	t.Cleanup(func() {
		if err := l.Close(context.Background()); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return l
}

func flush(t testing.TB, l *Log) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := l.Flush(ctx); err != nil {
		t.Fatal(err)
	}
}

type display string

func (d display) String() string { return string(d) }

// attrs reads the fields of a sample's text line back into what the program would have logged.
func textAttrs(t *testing.T, s string) (as []slog.Attr) {
	for s != "" {
		k, rest, ok := strings.Cut(s, "=")
		if !ok {
			t.Fatalf("no field in %q", s)
		}
		if strings.HasPrefix(rest, `"`) {
			q, err := strconv.QuotedPrefix(rest)
			if err != nil {
				t.Fatal(err)
			}
			v, _ := strconv.Unquote(q)
			as = append(as, slog.String(k, v))
			s = strings.TrimPrefix(rest[len(q):], " ")
			continue
		}
		v, rest, _ := strings.Cut(rest, " ")
		as = append(as, bare(k, v))
		s = rest
	}
	return as
}

func bare(k, v string) slog.Attr {
	if n, err := strconv.ParseUint(v, 10, 64); err == nil {
		return slog.Uint64(k, n)
	}
	if a, err := netip.ParseAddrPort(v); err == nil {
		return slog.Any(k, a)
	}
	return slog.Any(k, display(v))
}

func level(s string) slog.Level {
	l, _ := parseLevel(s)
	return l
}

// TestSamples logs again every access line of a real ztunnel and expects the same bytes.
func TestSamples(t *testing.T) {
	for _, name := range []string{"access-a.plain.log", "access-b.plain.log", "access-a.json.log", "access-b.json.log"} {
		t.Run(name, func(t *testing.T) {
			data, err := os.ReadFile("../../docs/samples/" + name)
			if err != nil {
				t.Fatal(err)
			}
			var out buffer
			l := open(t, Options{Writer: &out, JSON: strings.Contains(name, "json")})
			log := l.Logger("ztun").With("target", "access")
			sc := bufio.NewScanner(bytes.NewReader(data))
			for sc.Scan() {
				var r slog.Record
				if l.json {
					r = jsonRecord(t, sc.Bytes())
				} else {
					f := strings.Split(sc.Text(), "\t")
					if len(f) != 5 {
						t.Fatalf("%d columns in %q", len(f), sc.Text())
					}
					ts, err := time.Parse(time.RFC3339Nano, f[0])
					if err != nil {
						t.Fatal(err)
					}
					r = slog.NewRecord(ts, level(f[1]), f[3], 0)
					r.AddAttrs(textAttrs(t, f[4])...)
				}
				if err := log.Handler().Handle(context.Background(), r); err != nil {
					t.Fatal(err)
				}
			}
			flush(t, l)
			got, want := strings.Split(out.String(), "\n"), strings.Split(string(data), "\n")
			if len(got) != len(want) {
				t.Fatalf("%d lines, want %d", len(got), len(want))
			}
			for i := range want {
				if got[i] != want[i] {
					t.Errorf("line %d:\n got %s\nwant %s", i+1, got[i], want[i])
				}
			}
		})
	}
}

func jsonRecord(t *testing.T, line []byte) slog.Record {
	d := json.NewDecoder(bytes.NewReader(line))
	d.UseNumber()
	next := func() any {
		tok, err := d.Token()
		if err != nil {
			t.Fatal(err)
		}
		return tok
	}
	next()
	head := map[string]string{}
	var as []slog.Attr
	for d.More() {
		k := next().(string)
		switch v := next().(type) {
		case json.Number:
			as = append(as, bare(k, v.String()))
		case string:
			switch {
			case k == "level" || k == "time" || k == "scope" || k == "message":
				head[k] = v
			case strings.HasSuffix(k, "addr"):
				as = append(as, bare(k, v))
			default:
				as = append(as, slog.String(k, v))
			}
		}
	}
	ts, err := time.Parse(time.RFC3339Nano, head["time"])
	if err != nil || head["scope"] != "access" {
		t.Fatal(err, head)
	}
	r := slog.NewRecord(ts, level(head["level"]), head["message"], 0)
	r.AddAttrs(as...)
	return r
}

var fixed = time.Date(2026, 11, 23, 7, 8, 9, 123456789, time.FixedZone("x", 3600))

type panics struct{}

func (*panics) String() string { panic("no") }

type valuer struct{}

func (valuer) LogValue() slog.Value { return slog.StringValue("resolved") }

func TestFormats(t *testing.T) {
	as := []slog.Attr{
		slog.String("s", "a \"b\"\n\x1b\\é\xff"),
		slog.Int("i", -3),
		slog.Float64("f", 1.5),
		slog.Bool("b", true),
		slog.Duration("d", 1500*time.Millisecond),
		slog.Time("t", fixed),
		slog.Any("err", errors.New("went wrong")),
		slog.Any("addr", netip.MustParseAddr("fd00::1")),
		slog.Any("ap", netip.MustParseAddrPort("[fd00::1]:80")),
		slog.Any("zone", netip.MustParseAddr("fe80::1%e\"0")),
		slog.Any("net", netip.MustParsePrefix("10.0.0.0/8")),
		slog.Any("none", netip.AddrPort{}),
		slog.Any("disp", display("a\nb")),
		slog.Any("nil", nil),
		slog.Any("ints", []int{1, 2}),
		slog.Any("bad", (*panics)(nil)),
		slog.Any("val", valuer{}),
		slog.Group("src", slog.String("ns", "x"), slog.Group("deep", slog.Int("n", 1))),
		slog.Group("empty"),
		slog.Attr{},
	}
	emit := func(js bool) string {
		var out buffer
		l := open(t, Options{Writer: &out, JSON: js, Now: func() time.Time { return fixed }})
		log := l.Logger("ztunnel::xds").With("k", 1).WithGroup("").WithGroup("xds").With("id", 4).WithGroup("inner")
		r := slog.NewRecord(fixed, LevelWarn, "hello\tworld", 0)
		r.AddAttrs(as...)
		if err := log.Handler().Handle(context.Background(), r); err != nil {
			t.Fatal(err)
		}
		r = slog.NewRecord(time.Time{}, LevelTrace, "no fields", 0)
		if err := l.Handler("proxy").Handle(context.Background(), r); err != nil {
			t.Fatal(err)
		}
		flush(t, l)
		return out.String()
	}
	const ts = "2026-11-23T06:08:09.123456Z"
	want := ts + "\twarn\txds:xds{id=4}:inner\thello\\tworld\tk=1 " +
		`s="a \"b\"\n\u{1b}\\é` + "\uFFFD" + `" i=-3 f=1.5 b=true d=1.5s t=` + ts +
		` err="went wrong" addr=fd00::1 ap=[fd00::1]:80 zone=fe80::1%e"0 net=10.0.0.0/8 none=invalid disp=a\nb nil=<nil> ints=[1 2] bad=!PANIC:no val="resolved" src.ns="x" src.deep.n=1` + "\n" +
		ts + "\ttrace\tproxy\tno fields\t\n"
	if got := emit(false); got != want {
		t.Errorf("text:\n got %q\nwant %q", got, want)
	}
	want = `{"level":"warn","time":"` + ts + `","scope":"ztunnel::xds","message":"hello\tworld","k":1,` +
		`"s":"a \"b\"\n\u001b\\é` + "\uFFFD" + `","i":-3,"f":1.5,"b":true,"d":"1.5s","t":"` + ts +
		`","err":"went wrong","addr":"fd00::1","ap":"[fd00::1]:80","zone":"fe80::1%e\"0","net":"10.0.0.0/8","none":"invalid","disp":"a\nb","nil":null,"ints":"[1 2]","bad":"!PANIC:no","val":"resolved","src.ns":"x","src.deep.n":1,"xds":{"id":4},"inner":{}}` + "\n" +
		`{"level":"trace","time":"` + ts + `","scope":"proxy","message":"no fields"}` + "\n"
	got := emit(true)
	if got != want {
		t.Errorf("json:\n got %s\nwant %s", got, want)
	}
	for line := range strings.Lines(got) {
		if !json.Valid([]byte(line)) {
			t.Errorf("not JSON: %s", line)
		}
	}
}

func TestTargets(t *testing.T) {
	var out buffer
	f, _ := ParseFilter("info,quiet=off,loud=trace")
	l := open(t, Options{Writer: &out, Control: NewControl(f)})
	log := l.Logger("ztun")
	log.Debug("no")
	log.With("target", "quiet").Error("no")
	loud := log.With("target", "loud", "a", "b")
	loud.Log(context.Background(), LevelTrace, "yes")
	ctx := context.Background()
	if !loud.Enabled(ctx, LevelTrace) || log.Enabled(ctx, LevelDebug) || !l.Enabled("loud", LevelDebug) {
		t.Error("Enabled does not say what is logged")
	}
	if _, err := l.Change("loud=off", false); err != nil {
		t.Fatal(err)
	}
	loud.Error("no more")
	flush(t, l)
	_, got, _ := strings.Cut(out.String(), "\t")
	if want := "trace\tloud\tyes\ta=\"b\"\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestLongValues(t *testing.T) {
	for _, js := range []bool{false, true} {
		var out buffer
		l := open(t, Options{Writer: &out, JSON: js})
		l.Logger("x").Info(strings.Repeat("é", 100000), "k", strings.Repeat("\x01", 1<<20), "d",
			display(strings.Repeat("y", 1<<20)), "n", 1)
		flush(t, l)
		s := out.String()
		if len(s) > 100<<10 || strings.Count(s, "\n") != 1 || strings.Count(s, cutMark) != 3 ||
			!(strings.Contains(s, "n=1") || strings.Contains(s, `"n":1`)) {
			t.Errorf("json=%v: line of %d bytes", js, len(s))
		}
		if js && !json.Valid([]byte(s)) {
			t.Error("a cut line is not JSON")
		}
		if l.Stats().Cut != 3 {
			t.Errorf("%d cut values counted", l.Stats().Cut)
		}
	}
}

// gate is a writer that blocks until it is opened.
type gate struct {
	buffer
	open    chan struct{}
	entered chan struct{}
	once    sync.Once
}

func newGate() *gate { return &gate{open: make(chan struct{}), entered: make(chan struct{})} }

func (g *gate) Write(p []byte) (int, error) {
	g.once.Do(func() { close(g.entered) })
	<-g.open
	return g.buffer.Write(p)
}

func TestBackPressure(t *testing.T) {
	g := newGate()
	l := open(t, Options{Writer: g, Lines: 200})
	log := l.Logger("x")
	log.Info("0")
	<-g.entered
	for i := 1; i < 200; i++ {
		log.Info(strconv.Itoa(i))
	}
	// The queue is full: one line in the writer's hands, 199 waiting.
	if s := l.Stats(); s.Queued != 200 || s.Waits != 0 {
		t.Fatalf("%+v", s)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if err := l.Flush(ctx); !errors.Is(err, ErrUnfinished) {
		t.Errorf("Flush of a blocked writer: %v", err)
	}
	done := make(chan struct{})
	go func() {
		log.Info("200")
		close(done)
	}()
	for l.Stats().Waits == 0 {
		time.Sleep(time.Millisecond)
	}
	select {
	case <-done:
		t.Error("a full queue took a line")
	default:
	}
	close(g.open)
	<-done
	flush(t, l)
	lines := strings.Split(strings.TrimSuffix(g.String(), "\n"), "\n")
	if len(lines) != 201 {
		t.Fatalf("%d lines", len(lines))
	}
	for i, line := range lines {
		if !strings.HasSuffix(line, "\t"+strconv.Itoa(i)+"\t") {
			t.Fatalf("line %d is %q", i, line)
		}
	}
	if fmt.Sprint(g.writes[:4]) != "[1 64 64 64]" {
		t.Errorf("lines per write: %v", g.writes)
	}
	if s := l.Stats(); s.Lines != 201 || s.Written != 201 || s.Queued != 0 || s.Dropped != 0 {
		t.Errorf("%+v", s)
	}
}

func TestClose(t *testing.T) {
	var out buffer
	l := New(Options{Writer: &out})
	log := l.Logger("x")
	for range 1000 {
		log.Info("line")
	}
	if err := l.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(out.String(), "\n"); n != 1000 {
		t.Errorf("Close lost lines: %d of 1000", n)
	}
	log.Info("late")
	if err := l.Close(context.Background()); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if s := l.Stats(); s.Dropped != 1 {
		t.Errorf("%+v", s)
	}

	// A reader that is gone: Close is bounded, and callers waiting for room are let go.
	g := newGate()
	l = New(Options{Writer: g, Lines: 1})
	log = l.Logger("x")
	log.Info("1")
	var wg sync.WaitGroup
	wg.Go(func() { log.Info("2") })
	for l.Stats().Waits == 0 {
		time.Sleep(time.Millisecond)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if err := l.Close(ctx); !errors.Is(err, ErrUnfinished) {
		t.Errorf("Close with a blocked writer: %v", err)
	}
	wg.Wait()
	close(g.open)
	if err := l.Close(context.Background()); err != nil {
		t.Error(err)
	}
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

func TestWriteErrors(t *testing.T) {
	l := open(t, Options{Writer: failing{}})
	l.Logger("x").Info("lost")
	flush(t, l)
	if s := l.Stats(); s.WriteErrors != 1 {
		t.Errorf("%+v", s)
	}
}

func TestConcurrent(t *testing.T) {
	var out buffer
	l := open(t, Options{Writer: &out, Lines: 50})
	var wg sync.WaitGroup
	for g := range 8 {
		log := l.Logger("x").With("g", g)
		wg.Go(func() {
			for i := range 500 {
				log.Info("m", "i", i)
				if i%100 == 0 {
					flush(t, l)
					if _, err := l.Change("x=info", true); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	flush(t, l)
	next := map[string]int{}
	for line := range strings.Lines(out.String()) {
		f := strings.Fields(line)
		g, i := f[len(f)-2], f[len(f)-1]
		if i != "i="+strconv.Itoa(next[g]) {
			t.Fatalf("%s: got %s, want %d", g, i, next[g])
		}
		next[g]++
	}
	for g, n := range next {
		if n != 500 {
			t.Errorf("%s: %d lines", g, n)
		}
	}
}

// FuzzLine: whatever the values are, one record is one line; JSON stays valid; text has its five columns.
func FuzzLine(f *testing.F) {
	f.Add("message", "key", "value")
	f.Add("a\nb", "k=\t", "\xff\"\\\u2028")
	f.Fuzz(func(t *testing.T, msg, key, value string) {
		r := slog.NewRecord(fixed, LevelInfo, msg, 0)
		r.AddAttrs(slog.String(key, value), slog.Any(key, display(value)), slog.Any(key, errors.New(value)))
		h := &handler{log: &Log{}, name: "t", spans: []span{{name: "s"}}}
		line := h.appendText(nil, &r)
		if bytes.Count(line, []byte("\n")) != 1 || bytes.Count(line, []byte("\t")) != 4 || line[len(line)-1] != '\n' {
			t.Fatalf("%q", line)
		}
		line = h.appendJSON(nil, &r)
		if bytes.Count(line, []byte("\n")) != 1 || !json.Valid(line) {
			t.Fatalf("%q", line)
		}
	})
}

func accessAttrs() []slog.Attr {
	return []slog.Attr{
		slog.Any("src.addr", netip.MustParseAddrPort("10.91.1.2:20410")),
		slog.String("src.workload", "a"), slog.String("src.namespace", "default"),
		slog.String("src.identity", "spiffe://cluster.local/ns/default/sa/a"), slog.String("src.cluster", "Kubernetes"),
		slog.Any("dst.addr", netip.MustParseAddrPort("10.91.2.2:15008")),
		slog.Any("dst.hbone_addr", display("10.91.2.2:9000")),
		slog.String("dst.workload", "b"), slog.String("dst.namespace", "default"),
		slog.String("dst.identity", "spiffe://cluster.local/ns/default/sa/b"), slog.String("dst.cluster", "Kubernetes"),
		slog.String("direction", "outbound"), slog.Uint64("bytes_sent", 78), slog.Uint64("bytes_recv", 1837),
		slog.String("duration", "98ms"),
	}
}

// BenchmarkAccess is one complete access line, attributes included.
func BenchmarkAccess(b *testing.B) {
	for _, js := range []bool{false, true} {
		b.Run(fmt.Sprintf("json=%v", js), func(b *testing.B) {
			l := open(b, Options{Writer: io.Discard, JSON: js})
			h := l.Handler("access")
			as := accessAttrs()
			now := time.Now()
			b.ReportAllocs()
			for b.Loop() {
				r := slog.NewRecord(now, LevelInfo, "connection complete", 0)
				r.AddAttrs(as...)
				h.Handle(context.Background(), r)
			}
		})
	}
}

func BenchmarkDisabled(b *testing.B) {
	l := open(b, Options{Writer: io.Discard})
	h := l.Handler("access")
	b.ReportAllocs()
	for b.Loop() {
		if h.Enabled(context.Background(), LevelDebug) {
			b.Fatal("enabled")
		}
	}
}
