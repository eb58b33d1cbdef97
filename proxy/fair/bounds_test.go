package fair

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestRate(t *testing.T) {
	r := NewRate[string](10, 5, 2)
	now := time.Unix(1000, 0)
	spend := func(source string, tries int) (ok int) {
		for range tries {
			if r.AllowAt(source, now) {
				ok++
			}
		}
		return ok
	}
	if got := spend("a", 20); got != 5 {
		t.Errorf("at once: %d, want the burst of 5", got)
	}
	if got := spend("b", 5); got != 5 {
		t.Error("another source has no budget of its own")
	}
	now = now.Add(200 * time.Millisecond)
	if got := spend("a", 20); got != 2 {
		t.Errorf("after 200 ms: %d, want 2", got)
	}
	// The table is full, and neither bucket is: those beyond it share one.
	if got := spend("c", 20) + spend("d", 20) + spend("e", 20); got != 5 {
		t.Errorf("three sources beyond the table spent %d, want 5 together", got)
	}
	now = now.Add(time.Minute)
	if got := spend("f", 20); got != 5 || len(r.by) > 2 {
		t.Errorf("after a minute a new source spent %d, want 5; table %d", got, len(r.by))
	}
	now = now.Add(-time.Hour)
	if got := spend("f", 1); got != 0 {
		t.Error("a clock that goes back filled a bucket")
	}
	if r.Denied() == 0 {
		t.Error("nothing counted as denied")
	}
}

// text is a log to read.
type text struct {
	mu sync.Mutex
	b  strings.Builder
}

func (w *text) Write(p []byte) (int, error) { w.mu.Lock(); defer w.mu.Unlock(); return w.b.Write(p) }
func (w *text) lines() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.Split(strings.TrimSuffix(w.b.String(), "\n"), "\n")
}

func TestReport(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out text
		r := NewReport(slog.New(slog.NewTextHandler(&out, nil)))
		for i := range 1000 {
			r.Turned("handshakes", "default/a", "10.0.0.9", i%2 == 0)
		}
		r.Turned("handshakes", "default/b", "10.0.0.8", true)
		if got := out.lines(); len(got) != 2 || !strings.Contains(got[0], "source=10.0.0.9") ||
			!strings.Contains(got[1], "pod=default/b") {
			t.Errorf("lines:\n%s", strings.Join(got, "\n"))
		}
		time.Sleep(Every)
		r.Turned("handshakes", "default/a", "10.0.0.9", false)
		if got := out.lines(); len(got) != 3 || !strings.Contains(got[2], "evicted=499 refused=501") {
			t.Errorf("the third line does not say what came since the first:\n%s", strings.Join(got, "\n"))
		}
		c := r.Counts()
		if len(c) != 2 || c[0].Evicted != 500 || c[0].Refused != 501 || c[1].Pod != "default/b" || c[1].Evicted != 1 {
			t.Errorf("counts %+v", c)
		}
		r.Forget("default/a")
		if c := r.Counts(); len(c) != 1 {
			t.Errorf("counts after the pod has gone: %+v", c)
		}
	})
	var none *Report
	none.Turned("x", "y", "z", true)
	none.Forget("y")
	if none.Counts() != nil {
		t.Error("no report has counts")
	}
}

func TestReportIsBounded(t *testing.T) {
	r := NewReport(slog.New(slog.DiscardHandler))
	for i := range 2 * maxCounts {
		r.Turned("x", strings.Repeat("p", 1+i%7)+time.Duration(i).String(), "s", true)
	}
	var sum uint64
	for _, c := range r.Counts() {
		sum += c.Evicted
	}
	if n := len(r.Counts()); n != maxCounts+1 || sum != 2*maxCounts {
		t.Errorf("%d counts of %d in all", n, sum)
	}
}

func TestLines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out text
		l := NewLines(LinesOptions{Log: slog.New(slog.NewTextHandler(&out, nil)), PerSecond: 1, Burst: 3})
		ctx := context.Background()
		for range 100_000 {
			l.Log(ctx, slog.LevelWarn, "attacker", "connection failed")
		}
		l.Log(ctx, slog.LevelWarn, "honest", "connection failed", slog.String("who", "honest"))
		l.Log(ctx, slog.LevelDebug, "honest", "not at this level")
		if got := out.lines(); len(got) != 4 || !strings.Contains(got[3], "who=honest") {
			t.Errorf("lines:\n%s", strings.Join(got, "\n"))
		}
		time.Sleep(Every)
		synctest.Wait()
		if got := out.lines(); len(got) != 5 || !strings.Contains(got[4], "count=99997") ||
			!strings.Contains(got[4], "latest_source=attacker") {
			t.Errorf("no summary:\n%s", strings.Join(got, "\n"))
		}
		for range 20 {
			l.Log(ctx, slog.LevelWarn, "attacker", "connection failed")
		}
		l.Close() // nothing is left unsaid, and no timer
		if got := out.lines(); !strings.Contains(got[len(got)-1], "count=17") {
			t.Errorf("Close did not say what was left out:\n%s", strings.Join(got, "\n"))
		}
		if l.Swallowed() != 99_997+17 {
			t.Errorf("swallowed %d", l.Swallowed())
		}
	})
}
