package main

import (
	"context"
	"runtime"
	"testing"
	"time"
)

func TestNextProcessors(t *testing.T) {
	for _, tc := range []struct {
		name       string
		now, limit int
		u          usage
		want       int
	}{
		{"saturated, machine has room", 1, 3, usage{own: 0.97, idle: 0.8}, 2},
		{"saturated, machine full", 1, 3, usage{own: 0.97, idle: 0.02}, 1},
		{"at the limit", 3, 3, usage{own: 2.9, idle: 4}, 3},
		{"one is enough", 2, 3, usage{own: 0.6, idle: 0.1}, 1},
		{"two are used", 2, 3, usage{own: 1.2, idle: 0.5}, 2},
		{"between the thresholds", 2, 3, usage{own: 0.85, idle: 1}, 2},
		{"idle", 1, 3, usage{idle: 2}, 1},
		{"idle after work", 3, 3, usage{idle: 2}, 2},
		{"large machine", 12, 17, usage{own: 11.5, idle: 20}, 13},
		{"limit of one", 1, 1, usage{own: 1, idle: 1}, 1},
	} {
		if got := nextProcessors(tc.now, tc.limit, tc.u); got != tc.want {
			t.Errorf("%s: %d, want %d", tc.name, got, tc.want)
		}
	}
	// Whatever is decided for steady work stays decided: no chasing.
	for own := 0.05; own < 3; own += 0.05 {
		for now := 1; now <= 4; now++ {
			if up := nextProcessors(now, 4, usage{own: own, idle: 1}); up > now {
				if down := nextProcessors(up, 4, usage{own: own, idle: 1}); down < up {
					t.Errorf("use of %.2f: %d -> %d -> %d", own, now, up, down)
				}
			}
		}
	}
}

func TestParseIdle(t *testing.T) {
	if got := parseIdle([]byte("cpu  100 0 50 250 50 0 3 0 0 0\n")); got != 3*time.Second {
		t.Errorf("got %v", got)
	}
	for _, s := range []string{"", "cpu0 1 2 3 4 5", "cpu 1 2 3 x 5", "cpu 1 2"} {
		if got := parseIdle([]byte(s)); got != 0 {
			t.Errorf("%q: %v", s, got)
		}
	}
	if ownCPU() <= 0 || idleCPU() <= 0 {
		t.Error("the kernel's figures cannot be read")
	}
}

func TestProcessorsRun(t *testing.T) {
	before := runtime.GOMAXPROCS(0)
	defer runtime.GOMAXPROCS(before)
	p := &processors{limit: 3}
	p.set(3)
	ctx, cancel := context.WithCancel(context.Background())
	over := make(chan struct{})
	go func() { defer close(over); p.run(ctx) }()
	for end := time.Now().Add(10 * time.Second); runtime.GOMAXPROCS(0) > 1 && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond) // nothing to do: it comes down
	}
	if n := runtime.GOMAXPROCS(0); n != 1 {
		t.Errorf("an idle process keeps %d processors", n)
	}
	cancel()
	<-over
}
