package words

import (
	"testing"
	"time"
)

// TestPrintable: neither control characters nor what turns or hides text come through.
func TestPrintable(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "default/a": "default/a", "é漢 x": "é漢 x", "\x1b[31mred": "?[31mred", "a\nb\t": "a?b?", "\u009b1m": "?1m",
		"\u202egnp.exe": "?gnp.exe", "a\u200bb\u2066c": "a?b?c", "\xff\ufffd": "??", "a\u00a0b": "a?b", "\u2028": "?",
	} {
		if got := Printable(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

// TestSpan: at and about every change of unit, never a unit that is full.
func TestSpan(t *testing.T) {
	const s, m, h = time.Second, time.Minute, time.Hour
	for in, want := range map[time.Duration]string{
		-s: "0ms", 0: "0ms", 999 * time.Microsecond: "0ms", s - 1: "999ms", s: "1s", s + s/10 - 1: "1s", 1500 * s / 1000: "1.5s",
		m - 1: "59.9s", m: "1m0s", 90 * s: "1m30s", h - 1: "59m59s", h: "1h0m", 150 * m: "2h30m", 24*h - 1: "23h59m",
		24 * h: "1d0h", 47 * h: "1d23h", 200 * 24 * h: "200d0h", 1<<63 - 1: "106751d23h",
	} {
		if got := Span(in); got != want {
			t.Errorf("%d ns: %q, want %q", int64(in), got, want)
		}
	}
}
