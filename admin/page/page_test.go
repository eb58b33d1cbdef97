package page

import (
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

func TestClean(t *testing.T) {
	for in, want := range map[string]string{
		"default/shop": "default/shop", "Zürich 東京": "Zürich 東京", "a\tb\n": `a\u{9}b\u{a}`, "x\u202ey": `x\u{202e}y`,
		"\u200bz": `\u{200b}z`,
		"a\xffb":  `a\xffb`, "\uFFFD": "\uFFFD", strings.Repeat("ä", 301): strings.Repeat("ä", 300) + "...",
		strings.Repeat("ä", 300): strings.Repeat("ä", 300),
	} {
		if got := clean(in); got != want {
			t.Errorf("%.20q: %.40q, want %.40q", in, got, want)
		}
	}
}

func TestFormats(t *testing.T) {
	for got, want := range map[string]string{
		amount(1023): "1023 B", amount(uint64(1536)): "1.5 KiB", amount(int64(5 << 30)): "5 GiB", amount(2e18): "1776 PiB",
		count(999): "999", count(1234567): "1\u202f234\u202f567", count(-1234): "-1\u202f234", rate(0): "0",
		rate(0.01): "<0.1", rate(0.25): "0.2", rate(12.6): "13", rate(2500): "2\u202f500",
		ago(time.Time{}): "", until(time.Now().Add(-time.Hour)): "1h0m ago", until(time.Now().Add(61 * time.Minute)): "in 1h0m",
	} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	if s := string(spark([]float64{0, 1, 2})); !strings.Contains(s, `points="0.0,23.0 50.0,12.5 100.0,2.0 "`) {
		t.Error(s)
	}
	if spark([]float64{1}) != "" || !strings.Contains(string(spark([]float64{0, 0})), "100.0,23.0") {
		t.Error("a curve of nothing")
	}
}

const text = `{{define "title"}}t{{end}}{{define "status"}}{{end}}{{define "nav"}}{{end}}{{define "main"}}{{.}}{{end}}`

// TestRenderedOnce: however many ask within a second, it is put together once.
func TestRenderedOnce(t *testing.T) {
	n := 0
	p, err := New(text, func() any { n++; return n })
	if err != nil {
		t.Fatal(err)
	}
	get := func() string {
		w := httptest.NewRecorder()
		p.ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
		return w.Body.String()
	}
	first := get()
	for range 50 {
		if get() != first {
			t.Fatal("rendered anew")
		}
	}
	p.made = p.made.Add(-2 * fresh)
	if get() == first || n != 2 {
		t.Errorf("rendered %d times", n)
	}
}

func TestBrokenTemplates(t *testing.T) {
	if _, err := New(`{{define "main"}}{{end`, nil); err == nil {
		t.Error("a broken template is accepted")
	}
	p, err := New(strings.Replace(text, "{{.}}", "{{.Nothing}}", 1), func() any { return struct{}{} })
	if err != nil {
		t.Fatal(err)
	}
	w := httptest.NewRecorder()
	p.ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
	if w.Code != 500 || !strings.Contains(w.Body.String(), "Nothing") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}
