package ca

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestRenewAt(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		from, to time.Duration // validity, from now
		random   float64
		want     time.Duration
	}{
		{0, 24 * time.Hour, 0, 12 * time.Hour},
		{-2 * time.Minute, 24 * time.Hour, 0, 12*time.Hour - time.Minute}, // the spec's half-life counts the backdating
		{0, 100 * time.Second, 0, 50 * time.Second},
		{0, 100 * time.Second, 0.5, 47500 * time.Millisecond},
		// half-life was 30 s ago: a third of what is left
		{-2 * time.Minute, time.Minute, 0, 20 * time.Second},
		{-2 * time.Minute, 130 * time.Second, 0, 130 * time.Second / 3},      // half-life is 5 s away: too hasty
		{-23 * time.Hour, time.Hour, 0, 20 * time.Minute},                    // an old certificate, or a CA behind us
		{time.Hour, 25 * time.Hour, 0, 13 * time.Hour},                       // a CA ahead of us
		{2*time.Second + 1, 2*time.Second + 1, 0, time.Second},               // its half-life is its end
		{0, time.Second, 0, time.Second},                                     // never in a hot loop
		{-time.Hour, -time.Minute, 0, time.Second},                           // not even for what has ended
		{-2 * time.Minute, 3 * time.Minute, 0.999, 54006 * time.Millisecond}, // jitter makes it earlier, a third is before it
	} {
		got := renewAt(now, now.Add(c.from), now.Add(c.to), c.random).Sub(now)
		if got != c.want {
			t.Errorf("%v..%v: %v, want %v", c.from, c.to, got, c.want)
		}
	}
}

func TestRenewAtAlways(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now := time.Unix(rapid.Int64Range(0, 1<<33).Draw(t, "now"), 0)
		from := time.Duration(rapid.Int64Range(-int64(1000*time.Hour), int64(1000*time.Hour)).Draw(t, "from"))
		life := time.Duration(rapid.Int64Range(0, int64(10000*time.Hour)).Draw(t, "life"))
		notBefore, notAfter := now.Add(from), now.Add(from+life)
		at := renewAt(now, notBefore, notAfter, rapid.Float64Range(0, 0.999999).Draw(t, "random"))
		if at.Before(now.Add(soonest)) {
			t.Fatalf("%v: hot loop", at.Sub(now))
		}
		if left := notAfter.Sub(now); left > 2*soonest && !at.Before(notAfter) {
			t.Fatalf("%v, but only %v left", at.Sub(now), left)
		}
	})
}

func TestRetryAfter(t *testing.T) {
	want := []time.Duration{1, 2, 4, 8, 16, 32, 64, 128, 150, 150}
	for i, w := range want {
		w *= time.Second
		if lo, mid, hi := retryAfter(i+1, 0), retryAfter(i+1, 0.5), retryAfter(i+1, 1); lo != w*8/10 || mid != w ||
			hi < w*12/10-1 || hi > w*12/10+1 {
			t.Errorf("failure %d: %v %v %v", i+1, lo, mid, hi)
		}
	}
	for _, n := range []int{0, -1, 64, 1 << 40} {
		if d := retryAfter(n, 0.5); d < time.Second || d > lastRetry {
			t.Errorf("failure %d: %v", n, d)
		}
	}
}

func TestRetryValid(t *testing.T) {
	for _, c := range [][3]time.Duration{ // pause, left, want
		{time.Second, time.Hour, time.Second},
		{150 * time.Second, time.Hour, 150 * time.Second},
		{150 * time.Second, 5 * time.Minute, 100 * time.Second},
		{16 * time.Second, 15 * time.Second, 5 * time.Second},
		{16 * time.Second, 2 * time.Second, time.Second},
		{16 * time.Second, 500 * time.Millisecond, 501 * time.Millisecond},
		{16 * time.Second, 0, time.Millisecond},
	} {
		if got := retryValid(c[0], c[1]); got != c[2] {
			t.Errorf("%v with %v left: %v, want %v", c[0], c[1], got, c[2])
		}
	}
}
