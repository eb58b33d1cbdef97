package main

import (
	"strings"
	"testing"
	"time"
)

func TestParseDuration(t *testing.T) { // spec controlplane 1.1
	const day = 24 * time.Hour
	for s, want := range map[string]time.Duration{
		"0": 0, "7": 7 * time.Second, "300s": 300 * time.Second, "5m": 5 * time.Minute, "1h30m": 90 * time.Minute,
		"100ms": 100 * time.Millisecond,
		"1d":    day, "2w": 14 * day, "1mon": 30 * day, "1y": 365 * day, "5us": 5 * time.Microsecond,
		"5µs": 5 * time.Microsecond, "5μs": 5 * time.Microsecond, "9ns": 9,
		"1year": 365 * day, "1MONTH": 30 * day, "1Week": 7 * day, "1day": day, "1hr": time.Hour, "1hour": time.Hour,
		"2min": 2 * time.Minute, "2minute": 2 * time.Minute,
		"3sec": 3 * time.Second, "3second": 3 * time.Second, "4msec": 4 * time.Millisecond,
		"4millisecond": 4 * time.Millisecond, "5usec": 5 * time.Microsecond,
		"5usecond": 5 * time.Microsecond, "5microsecond": 5 * time.Microsecond, "6nsec": 6, "6nanosecond": 6, "1H": time.Hour,
		"1M": time.Minute,
		// sums, with and without spaces and operators
		" 1m + 30s ": 90 * time.Second, "1m+31": 91 * time.Second, "1m31": 91 * time.Second, "1m 31 s": 91 * time.Second,
		"1 d2 h3 min 4s": 93784 * time.Second,
		"1m+60+24":       144 * time.Second, "3m31s0ns": 211 * time.Second,
		// products, of seconds
		"1m*10": 10 * time.Minute, "1m * 60 * 20": 20 * time.Hour, "1m*10ms": 600 * time.Millisecond, "1m*1m": time.Hour,
		"10*1m": 10 * time.Minute, "0*5h": 0,
	} {
		if got, err := parseDuration(s); err != nil || got != want {
			t.Errorf("%q: %v, %v; want %v", s, got, err, want)
		}
	}
	for _, s := range []string{
		"", " ", "x", "s", "5 parsecs", "-1s", "+1s", "1s-1s", "1s+", "1s*", "1s**2", "1.5h", "1 2", "1 2s", "0x10s", "1s,2s",
		"1s\x00", "1s\xff",
		"9999999999999h", "99999999999999999999s", "300y", "290y+290y", "290y*2", "1m*10+5", "1m+10*5", "1h30m*2",
	} {
		if got, err := parseDuration(s); err == nil {
			t.Errorf("%q: %v, want an error", s, got)
		}
	}
}

// FuzzDuration: no text makes it crash or give a negative duration, and what it accepts it accepts again as
// the sum of itself and nothing, unless it is a product.
func FuzzDuration(f *testing.F) {
	for _, s := range []string{"1h30m", "5 µs", "1m * 10 ms", "290y*2", "1m+10*5", "9223372036854775807ns", "1s\xff",
		"+", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d, err := parseDuration(s)
		if err != nil {
			return
		}
		if d < 0 {
			t.Fatalf("%q: %v", s, d)
		}
		again, err := parseDuration(s + " + 0ns")
		if product := strings.Contains(s, "*"); product != (err != nil) || !product && again != d {
			t.Fatalf("%q: %v, then %v, %v", s, d, again, err)
		}
	})
}
