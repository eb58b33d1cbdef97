package proxy

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

func seriesOf(source, destination string) labels {
	return labels{lReporter: reporterSource, lSourceNamespace: "ns", lSourceWorkload: source, lDestinationNamespace: "ns",
		lDestinationWorkload: destination, lResponseFlags: "-", lSecurityPolicy: securityMutualTLS}
}

func (m *Metrics) has(l labels) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.series[l] != nil
}

// TestSeriesExpire: a series leaves when nobody uses it, it has been idle for long enough, and one of its workloads
// is gone; not before.
func TestSeriesExpire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := NewMetrics()
		exists := map[string]bool{"a": true, "b": true, "gone": false}
		asked := 0
		present := func(ws map[NamedWorkload]bool) {
			asked++
			for w := range ws {
				if w.Namespace != "ns" {
					t.Errorf("asked about %v", w)
				}
				ws[w] = exists[w.Workload]
			}
		}
		both, gone, unknown, open, failed := seriesOf("a", "b"), seriesOf("a", "gone"), seriesOf("", ""),
			seriesOf("gone", "b"), seriesOf("gone", "b")
		failed[lResponseFlags] = FlagConnect.String()
		half := seriesOf("a", "") // to somebody unknown: the source keeps it
		for _, l := range []labels{both, gone, unknown, half} {
			m.close(m.open(l, "", 0), FlagNone)
		}
		held := m.open(open, "", 0)
		m.close(m.open(open, "", 0), FlagConnect) // makes failed as well
		if n := m.Expire(present); n != 0 || asked != 0 {
			t.Errorf("%d expired at once, asked %d times", n, asked)
		}
		time.Sleep(seriesIdle + time.Second)
		if n := m.Expire(present); n != 3 || asked != 1 {
			t.Errorf("%d expired, asked %d times", n, asked)
		}
		for _, c := range []struct {
			name string
			l    labels
			want bool
		}{{"both exist", both, true}, {"one is gone", gone, false}, {"nobody known", unknown, false},
			{"half known", half, true},
			{"gone, but a connection is open", open, true}, {"failures of the gone", failed, false}} {
			if got := m.has(c.l); got != c.want {
				t.Errorf("%s: kept %v", c.name, got)
			}
		}
		// The open connection goes on counting where it can be seen.
		(&books{series: held}).addSent(7)
		if m.series[open].sent.Load() != 7 {
			t.Error("an open connection counts into a series that is not shown")
		}
		m.close(held, FlagNone)
		time.Sleep(seriesIdle - time.Second)
		if n := m.Expire(present); n != 0 {
			t.Errorf("%d expired before their time after the last connection", n)
		}
		time.Sleep(2 * time.Second)
		if n := m.Expire(present); n != 1 || m.has(open) {
			t.Errorf("%d expired", n)
		}
		// What has expired comes back from zero.
		m.close(m.open(gone, "", 0), FlagNone)
		if n := m.series[gone].opened.Load(); n != 1 {
			t.Errorf("opened %d", n)
		}
		if m.expired.Load() != 4 {
			t.Errorf("%d counted as expired", m.expired.Load())
		}
		// Without anybody to ask, being idle is enough.
		time.Sleep(seriesIdle)
		if m.Expire(nil); len(m.series) != 0 {
			t.Errorf("%d series left", len(m.series))
		}
	})
}

// TestSeriesExpireUnderPressure: a table that is nearly full lets go of what is idle, whoever it belongs to; the
// bound holds and says so.
func TestSeriesExpireUnderPressure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := NewMetrics()
		ls := benchLabels(maxSeries + 100)
		for _, l := range ls[:maxSeries] {
			m.close(m.open(l, "", 0), FlagNone)
		}
		for _, l := range ls[maxSeries:] {
			m.close(m.open(l, "", 0), FlagNone)
		}
		if len(m.series) != maxSeries+1 || m.overflowed.Load() != 100 {
			t.Errorf("%d series, %d counted together", len(m.series), m.overflowed.Load())
		}
		everybody := func(ws map[NamedWorkload]bool) {
			for w := range ws {
				ws[w] = true
			}
		}
		time.Sleep(seriesIdle)
		m.close(m.open(ls[0], "", 0), FlagNone)
		if n := m.Expire(everybody); n != maxSeries || !m.has(ls[0]) {
			t.Errorf("%d expired", n)
		}
		if n := m.Expire(everybody); n != 0 {
			t.Errorf("%d expired without pressure", n)
		}
	})
}

// TestMetricsRun: the table is looked at by itself, and Run ends.
func TestMetricsRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := NewMetrics()
		m.close(m.open(seriesOf("a", "b"), "", 0), FlagNone)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { m.Run(ctx, nil) })
		time.Sleep(seriesIdle + expireEvery)
		synctest.Wait()
		if len(m.series) != 0 {
			t.Error("still there")
		}
		cancel()
		wg.Wait()
	})
}

// TestSeriesRace: what connections count while series expire is never lost: every count is in a series that was
// shown, or expired after.
func TestSeriesRace(t *testing.T) {
	m := NewMetrics()
	m.start = time.Now().Add(-2 * seriesIdle) // everything unused counts as idle
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				m.Expire(nil)
			}
		}
	})
	l := seriesOf("a", "b")
	for range 2000 {
		s := m.open(l, "", 0)
		if !m.has(l) {
			t.Fatal("a series with an open connection expired")
		}
		s.last.Store(0)
		m.close(s, FlagNone)
		s.last.Store(0) // idle at once
	}
	close(stop)
	wg.Wait()
}

// TestRecordingDoesNotAllocate: neither a write nor opening and closing a connection whose labels are known.
func TestRecordingDoesNotAllocate(t *testing.T) {
	m := NewMetrics()
	l := seriesOf("a", "b")
	c := &books{series: m.open(l, "", 0)}
	if n := testing.AllocsPerRun(100, func() {
		c.addSent(1)
		c.addReceived(1)
		m.close(m.open(l, "", 0), FlagNone)
		m.close(m.open(l, "", 0), FlagConnect)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestLabelTexts: an empty label is shown as unknown, and what is shown is not a copy.
func TestLabelTexts(t *testing.T) {
	m := NewMetrics()
	m.open(labels{lReporter: reporterSource, lSourceWorkload: "a"}, "", 0)
	ch := make(chan prometheus.Metric, 100)
	m.Collect(ch)
	close(ch)
	seen := 0
	for x := range ch {
		var d dto.Metric
		if err := x.Write(&d); err != nil {
			t.Fatal(err)
		}
		if len(d.Label) != int(nLabels) {
			continue
		}
		seen++
		for i, p := range d.Label {
			want := "unknown"
			switch i {
			case lReporter:
				want = "source"
			case lSourceWorkload:
				want = "a"
			}
			if p.GetName() != labelNames[i] || p.GetValue() != want {
				t.Errorf("label %d: %s=%s", i, p.GetName(), p.GetValue())
			}
		}
	}
	if seen != 3 { // opened, received, sent
		t.Errorf("%d samples", seen)
	}
}
