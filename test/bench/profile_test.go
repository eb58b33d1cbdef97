package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseTop(t *testing.T) {
	const in = `File: ztun
Build ID: abc
Type: cpu
Time: 2026-11-23 07:51:00 UTC
Duration: 4s, Total samples = 1.32s (32.99%)
Showing nodes accounting for 1.04s, 78.79% of 1.32s total
Showing top 10 nodes out of 153
      flat  flat%   sum%        cum   cum%
     0.61s 46.21% 46.21%      0.61s 46.21%  internal/runtime/syscall/linux.Syscall6
     0.19s 14.39% 60.61%      0.19s 14.39%  gcm.gcmAesEnc
`
	want := []string{
		"Duration: 4s, Total samples = 1.32s (32.99%)",
		"      flat  flat%   sum%        cum   cum%",
		"     0.61s 46.21% 46.21%      0.61s 46.21%  internal/runtime/syscall/linux.Syscall6",
		"     0.19s 14.39% 60.61%      0.19s 14.39%  gcm.gcmAesEnc",
	}
	if d := cmp.Diff(want, parseTop(in)); d != "" {
		t.Error(d)
	}
	if got := parseTop("nothing\n"); len(got) != 0 {
		t.Error(got)
	}
}

func TestFileName(t *testing.T) {
	if got := fileName("mixed 500 per s, ../up"); got != "mixed-500-per-s--..-up" || strings.Contains(got, "/") {
		t.Error(got)
	}
}

func TestCommand(t *testing.T) {
	args := []string{"--bin", "/tmp/x", "--root=/work", "mesh", "--env", "A=it's b", "-bin=/y", "--remove-bin",
		"--seconds", "2"}
	if got, want := command(args), `scripts/bench mesh --env 'A=it'\''s b' --seconds 2`; got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
	if got := quote(""); got != "''" {
		t.Error(got)
	}
}

func TestLines(t *testing.T) {
	l := newLines()
	for _, s := range []string{"{\"a\"", ":1}\n{\"b\":2}\n", "rest"} {
		if n, err := l.Write([]byte(s)); n != len(s) || err != nil {
			t.Error(n, err)
		}
	}
	for _, want := range []string{`{"a":1}`, `{"b":2}`} {
		if got := string(<-l.c); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	// Nobody reads: the writer must not block.
	for range 100 {
		l.Write([]byte("x\n"))
	}
}

func TestLockedBufferIsBounded(t *testing.T) {
	var b lockedBuffer
	for range 10 {
		if n, _ := b.Write(make([]byte, 1000)); n != 1000 {
			t.Fatal(n)
		}
	}
	if len(b.String()) != 4096 {
		t.Error(len(b.String()))
	}
}

func TestWatchedWithoutCounters(t *testing.T) {
	o, err := watched(t.Context(), nil, 1, nil, func() (outcome, error) { return outcome{"throughput": 1}, nil })
	if d := cmp.Diff(outcome{"throughput": 1}, o); err != nil || d != "" {
		t.Error(err, d)
	}
}
