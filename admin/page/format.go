package page

import (
	"fmt"
	"html/template"
	"math"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"ztun/admin/words"
)

// longest is how much of a foreign text is shown, in characters.
const longest = 300

// clean is a text that somebody else chose, fit to be shown: what does not print, or turns the text around it, is
// shown by its number; what is beyond the bound by dots.
func clean(s string) string {
	var b strings.Builder
	n := 0
	for i, r := range s {
		if n++; n > longest {
			return b.String() + "..."
		}
		switch {
		case r == utf8.RuneError && !strings.HasPrefix(s[i:], "\uFFFD"):
			fmt.Fprintf(&b, "\\x%02x", s[i])
		case unicode.IsPrint(r):
			b.WriteRune(r)
		default:
			fmt.Fprintf(&b, "\\u{%x}", r)
		}
	}
	return b.String()
}

// ago is how long ago a time was, in words short enough for a table.
func ago(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return words.Span(time.Since(t)) + " ago"
}

// until is how long it is until a time, or that it is over.
func until(t time.Time) string {
	if d := time.Until(t); d > 0 {
		return "in " + words.Span(d)
	}
	return ago(t)
}

// stamp is a time as machines and careful people read it.
func stamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05Z") }

// amount is an amount with the unit that keeps it short.
func amount(v any) string {
	n := number(v)
	if n < 1024 {
		return fmt.Sprintf("%.0f B", n)
	}
	for _, unit := range []string{"KiB", "MiB", "GiB", "TiB"} {
		if n /= 1024; n < 1024 {
			return short(n) + " " + unit
		}
	}
	return short(n/1024) + " PiB"
}

// count is a whole number with its thousands apart.
func count(v any) string {
	s := fmt.Sprintf("%.0f", number(v))
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "\u202f" + s[i:]
	}
	return s
}

// rate is a number per second.
func rate(v float64) string {
	if v >= 1000 {
		return count(v)
	}
	return short(v)
}

// short is a number with no more digits than one looks at.
func short(v float64) string {
	switch {
	case v == 0:
		return "0"
	case v < 0.05:
		return "<0.1"
	case v < 10:
		return strings.TrimSuffix(fmt.Sprintf("%.1f", v), ".0")
	}
	return fmt.Sprintf("%.0f", v)
}

func number(v any) float64 {
	switch v := v.(type) {
	case int:
		return float64(v)
	case int64:
		return float64(v)
	case uint64:
		return float64(v)
	case float64:
		return v
	}
	return math.NaN()
}

// spark draws values, oldest first, as a small curve. It consists of numbers alone.
func spark(values []float64) template.HTML {
	if len(values) < 2 {
		return ""
	}
	top := 0.0
	for _, v := range values {
		top = max(top, v)
	}
	var line strings.Builder
	for i, v := range values {
		y := 23.0
		if top > 0 {
			y = 23 - 21*v/top
		}
		fmt.Fprintf(&line, "%.1f,%.1f ", 100*float64(i)/float64(len(values)-1), y)
	}
	return template.HTML(
		fmt.Sprintf(`<svg class="spark" viewBox="0 0 100 24" preserveAspectRatio="none" aria-hidden="true">`+
			`<polygon points="0,24 %s100,24"/><polyline points="%[1]s"/></svg>`, line.String()))
}
