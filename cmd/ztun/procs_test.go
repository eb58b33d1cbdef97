package main

import (
	"context"
	"runtime"
	"runtime/debug"
	"testing"
	"time"
)

func TestNextProcessors(t *testing.T) {
	for _, tc := range []struct {
		name       string
		now, limit int
		u          usage
		want       int
		floor      int // 0: 1
	}{
		{name: "saturated, machine has room", now: 1, limit: 3, u: usage{own: 0.97, idle: 0.8}, want: 2},
		{name: "saturated, machine full", now: 1, limit: 3, u: usage{own: 0.97, idle: 0.02}, want: 1},
		{name: "at the limit", now: 3, limit: 3, u: usage{own: 2.9, idle: 4}, want: 3},
		{name: "one is enough", now: 2, limit: 3, u: usage{own: 0.6, idle: 0.1}, want: 1},
		{name: "two are used", now: 2, limit: 3, u: usage{own: 1.2, idle: 0.5}, want: 2},
		{name: "between the thresholds", now: 2, limit: 3, u: usage{own: 0.85, idle: 1}, want: 2},
		{name: "idle", now: 1, limit: 3, u: usage{idle: 2}, want: 1},
		{name: "idle after work", now: 3, limit: 3, u: usage{idle: 2}, want: 2},
		{name: "large machine", now: 12, limit: 17, u: usage{own: 11.5, idle: 20}, want: 13},
		{name: "limit of one", now: 1, limit: 1, u: usage{own: 1, idle: 1}, want: 1},
		{name: "large heap, idle", now: 1, limit: 3, u: usage{idle: 2}, want: 2, floor: 2},
		{name: "large heap, one is enough", now: 2, limit: 3, u: usage{own: 0.1, idle: 2}, want: 2, floor: 2},
	} {
		if got := nextProcessors(tc.now, max(1, tc.floor), tc.limit, tc.u); got != tc.want {
			t.Errorf("%s: %d, want %d", tc.name, got, tc.want)
		}
	}
	// Whatever is decided for steady work stays decided: no chasing.
	for own := 0.05; own < 3; own += 0.05 {
		for now := 1; now <= 4; now++ {
			if up := nextProcessors(now, 1, 4, usage{own: own, idle: 1}); up > now {
				if down := nextProcessors(up, 1, 4, usage{own: own, idle: 1}); down < up {
					t.Errorf("use of %.2f: %d -> %d -> %d", own, now, up, down)
				}
			}
		}
	}
}

func TestPlanProcessors(t *testing.T) {
	for _, tc := range []struct{ cpus, workers, least, limit int }{
		{1, 2, 1, 3}, {2, 2, 1, 3}, {4, 2, 1, 3}, {7, 2, 1, 3}, {8, 2, 2, 3}, {12, 2, 3, 3}, {256, 2, 3, 3},
		{8, 8, 2, 9}, {64, 16, 16, 17}, {64, 64, 16, 65}, {256, 256, 64, 257}, {0, 0, 1, 2},
	} {
		if least, limit := planProcessors(tc.cpus, tc.workers, true); least != tc.least || limit != tc.limit {
			t.Errorf("%d processors, %d workers: %d to %d, want %d to %d", tc.cpus, tc.workers, least, limit, tc.least,
				tc.limit)
		}
	}
	// Whatever the machine: as many as were asked for are reached under full load, some stay without any, and steady
	// work of any size comes to rest.
	for _, workers := range []int{1, 2, 3, 8, 32, 256} {
		before := 0
		for cpus := 1; cpus <= 256; cpus++ {
			least, limit := planProcessors(cpus, workers, true)
			if limit != workers+1 || least < before || least > limit || least < min(limit, max(1, cpus/keptShare)) {
				t.Fatalf("%d processors, %d workers: %d to %d", cpus, workers, least, limit)
			}
			before = least
			for own := 0.0; own <= float64(limit); own += float64(limit) / 16 {
				// Those in use are saturated until they are enough, and the rest of the machine has nothing to do.
				look := func(now int) int {
					u := usage{own: min(own, float64(now))}
					u.idle = max(0, float64(cpus)-u.own)
					return nextProcessors(now, least, limit, u)
				}
				for _, now := range []int{least, limit} {
					for range limit {
						now = look(now)
					}
					if now < least || now > limit || look(now) != now {
						t.Fatalf("%d processors, %d workers, use of %.1f: no rest at %d, next %d", cpus, workers, own, now,
							look(now))
					}
					if own == float64(limit) && cpus > limit && now != limit {
						t.Fatalf("%d processors, %d workers: full load gets %d", cpus, workers, now)
					}
				}
			}
			if least, now := planProcessors(cpus, workers, false); least != limit || now != limit {
				t.Fatalf("%d processors, %d workers: %d to %d, and none is to be adapted", cpus, workers, least, now)
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
	for end := time.Now().Add(30 * time.Second); runtime.GOMAXPROCS(0) > 1 && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond) // nothing to do: it comes down
	}
	if n := runtime.GOMAXPROCS(0); n != 1 {
		t.Errorf("an idle process keeps %d processors", n)
	}
	cancel()
	<-over
}

// TestLargeHeap: what is known decides how the collector runs, and back.
func TestLargeHeap(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(gcSmall))
	p := &processors{limit: 3, gc: true}
	keep := make([]byte, largeHeap*2)
	runtime.GC()
	p.measure()
	if !p.large || p.floor() != 2 || debug.SetGCPercent(gcLarge) != gcLarge {
		t.Error("a large heap is not seen")
	}
	runtime.KeepAlive(keep)
	keep = nil
	runtime.GC()
	p.measure()
	if p.large || p.floor() != 1 || debug.SetGCPercent(gcSmall) != gcSmall {
		t.Error("a small heap is not seen")
	}
	if one := (&processors{limit: 1, large: true}); one.floor() != 1 {
		t.Error("the floor is above the limit")
	}
}

func TestGCPercent(t *testing.T) {
	for _, tc := range []struct {
		name        string
		live        uint64
		procs       int
		large, busy bool
		want        int
	}{
		{name: "nothing to do", live: 4 << 20, want: gcSmall},
		{name: "small and at work", live: 4 << 20, busy: true, want: gcMost},
		{name: "some connections", live: 16 << 20, busy: true, want: 150},
		{name: "many idle ones beside work", live: 40 << 20, busy: true, want: gcSmall},
		{name: "large", live: 200 << 20, large: true, busy: true, want: gcLarge},
		{name: "no collection yet", busy: true, want: gcMost},
		{name: "fewer processors", procs: 1, live: 16 << 20, busy: true, want: 150},
		{name: "more processors", procs: 6, live: 16 << 20, busy: true, want: 300},
		{name: "many processors", procs: 257, live: 16 << 20, busy: true, want: gcMost},
		{name: "many processors, nothing to do", procs: 257, live: 4 << 20, want: gcSmall},
	} {
		got := gcPercent(tc.live, tc.procs, tc.large, tc.busy)
		if got != tc.want {
			t.Errorf("%s: %d, want %d", tc.name, got, tc.want)
		}
		// The garbage that may lie stays within what is promised, or what was allowed before.
		room := gcRoom / gcFor * uint64(max(gcFor, tc.procs))
		if lies := tc.live * uint64(got) / 100; !tc.large && lies > max(room, tc.live*gcSmall/100) {
			t.Errorf("%s: %d bytes of garbage", tc.name, lies)
		}
	}
}

// TestGCBusy: work makes the collector patient, and the end of it makes it thrifty again.
func TestGCBusy(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(gcSmall))
	runtime.GC()
	p := &processors{limit: 3, gc: true, busy: true}
	p.measure()
	if got := debug.SetGCPercent(-1); got <= gcSmall || got != p.tuned {
		t.Errorf("at work: %d", got)
	}
	p.busy = false
	p.measure()
	if got := debug.SetGCPercent(gcSmall); got != gcSmall {
		t.Errorf("after work: %d", got)
	}
}
