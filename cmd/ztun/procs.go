package main

import (
	"bufio"
	"bytes"
	"context"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
)

// processors keeps as many of Go's processors (GOMAXPROCS) as the work can use, between one and a limit, and tunes the
// garbage collector to the size of what is known.
//
// A processor more than that is dear: every wake-up then tries to start another thread, which is an
// interrupt to another CPU and a cold cache there. On a 2-core machine with bulk traffic, one processor
// per daemon moved 10 to 25 % more than three, at 10 to 25 % less CPU per byte (scripts/bench mesh
// --versus-env, 2026-11-23; design section 7, lesson 5). That is all the evidence there is (docs/performance.md,
// Processors), so a machine with many keeps a share of them: planProcessors.
type processors struct {
	limit int          // worker threads and one for admin work
	least int          // the fewest, whatever the work is; 0: 1
	now   atomic.Int64 // in use
	gc    bool         // the collector is ours to tune
	large bool         // the heap is
	busy  bool         // there is work
	tuned int          // the percentage in force; 0: the daemon's first
}

// A heap is large from this many live bytes on: then a collection takes a tenth of a second and more. With one
// processor Go looks at the network only every 10 ms while anything runs, the collector's idle work included, so that
// every connection would feel every collection; and collections are to be rare.
const largeHeap = 48 << 20

// The collector's percentages. The live heap of a small mesh is small and its garbage rare: collecting twice as often
// as Go's default saves a tenth of the memory of idle connections and costs nothing that scripts/bench can see
// (2026-11-23). It costs a fifth of the CPU time of new connections, each of which makes 13 KiB of garbage: half of a
// small heap is full after 200 of them (0.49 ms each against 0.39 with GOGC=400, conns, 16 at a time, 2026-11-29). So
// while there is work, gcRoom bytes of garbage may lie before a collection, within gcMost.
const (
	gcSmall = 50
	gcLarge = 150
	gcMost  = 400
	gcRoom  = 24 << 20
	gcFor   = 3 // processors that gcRoom was measured with; more of them have more, in proportion
)

// Work, and none, in processors.
const (
	busyFrom = 0.2
	calmFrom = 0.05
)

// gcPercent is the collector's percentage for so many live bytes and processors at most; in steps, so that it changes
// rarely. Each processor allocates from spans of its own: room for the garbage of three would be little for a hundred.
func gcPercent(live uint64, procs int, large, busy bool) int {
	switch {
	case large:
		return gcLarge
	case !busy:
		return gcSmall
	}
	room := gcRoom / gcFor * uint64(max(procs, gcFor))
	return int(min(max(room*100/max(live, 1)/50*50, gcSmall), gcMost))
}

// keptShare is the part of the machine's processors that is never adapted away: one in so many.
const keptShare = 4

// planProcessors is between which numbers of Go's processors a daemon moves on a machine of cpus, with so many worker
// threads. The most is what was asked for, however many the machine has. The fewest is one where it was measured that
// one does better (two processors), and a quarter of the machine's where they are many: there nobody has measured what
// 50 ms of a saturated processor cost beside idle ones, and Go's own way, with all of them at hand, is known to work.
// With the default of two worker threads nothing is adapted from twelve processors on.
func planProcessors(cpus, workers int, adaptive bool) (least, limit int) {
	limit = max(workers, 1) + 1
	if !adaptive {
		return limit, limit
	}
	return min(max(cpus/keptShare, 1), limit), limit
}

// measure looks how large the heap was after the last collection.
func (p *processors) measure() {
	s := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(s)
	if s[0].Value.Kind() != metrics.KindUint64 {
		return
	}
	live := s[0].Value.Uint64()
	p.large = live > largeHeap || p.large && live > largeHeap*3/4
	if p.gc {
		p.tune(gcPercent(live, p.limit, p.large, p.busy))
	}
}

// tune sets the percentage when it is another one than before: that stops the world.
func (p *processors) tune(percent int) {
	if percent != p.tuned {
		p.tuned = percent
		debug.SetGCPercent(percent)
	}
}

// floor is the fewest processors to run with.
func (p *processors) floor() int {
	if p.large {
		return min(max(2, p.least), p.limit)
	}
	return max(p.least, 1)
}

// usage is what a stretch of time took, in processors.
type usage struct {
	own  float64 // of this process
	idle float64 // of the whole machine
}

// next decides how many processors the following stretch gets. One more when those in use are saturated
// and the machine has some to spare; one less when they are not needed by a margin, so that the two do
// not chase each other.
func nextProcessors(now, floor, limit int, u usage) int {
	switch n := float64(now); {
	case now < floor:
		return floor
	case now < limit && u.own > 0.85*n && u.idle > 0.25:
		return now + 1
	case now > floor && u.own < 0.8*(n-1):
		return now - 1
	}
	return now
}

// How often the figures are looked at: at work, and while there is nothing to do.
const (
	procsBusy = 50 * time.Millisecond
	procsIdle = time.Second
	// returnAfter is how many idle looks after work memory is collected and given back to the system, and
	// once more after as many again: each collection halves the stacks of goroutines that only wait.
	returnAfter = 3
)

// run adapts GOMAXPROCS until ctx ends.
func (p *processors) run(ctx context.Context) {
	quiet := 0 // idle looks since the last work; negative: memory was returned since
	last := time.Now()
	looked := last
	own, idle := ownCPU(), idleCPU()
	timer := time.NewTimer(procsBusy)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		o, now := ownCPU(), time.Now()
		d := now.Sub(last).Seconds()
		u := usage{own: (o - own).Seconds() / d}
		wait := procsIdle
		began := !p.busy && u.own > busyFrom
		p.busy = began || p.busy && u.own > calmFrom
		if began || now.Sub(looked) >= procsIdle {
			p.measure()
			looked = now
		}
		if u.own > 0.05 || int(p.now.Load()) != p.floor() {
			i := idleCPU()
			u.idle = (i - idle).Seconds() / d
			idle, wait = i, procsBusy
			if u.own > 0.05 {
				quiet = 0
			}
			p.set(nextProcessors(int(p.now.Load()), p.floor(), p.limit, u))
		} else {
			idle = idleCPU()
			if quiet >= 0 {
				quiet++
			}
		}
		if quiet == returnAfter || quiet == 2*returnAfter {
			debug.FreeOSMemory()
			releaseProgram()              // an error is no harm: they stay
			o, now = ownCPU(), time.Now() // what that took is no work
			if quiet == 2*returnAfter {
				quiet = -1
			}
		}
		own, last = o, now
		timer.Reset(wait)
	}
}

// set changes GOMAXPROCS, which stops the world for some 20 us, only when it must.
func (p *processors) set(n int) {
	if int64(n) != p.now.Swap(int64(n)) {
		runtime.GOMAXPROCS(n)
	}
}

// ownCPU is the CPU time of this process so far.
func ownCPU() time.Duration {
	var r syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &r) != nil {
		return 0
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// idleCPU is the idle time of all CPUs of the machine so far, from the first line of /proc/stat.
func idleCPU() time.Duration {
	f, err := os.Open("/proc/stat")
	if err != nil {
		return 0
	}
	defer f.Close()
	line, err := bufio.NewReaderSize(f, 512).ReadSlice('\n')
	if err != nil {
		return 0
	}
	return parseIdle(line)
}

// userHZ is the unit of /proc/stat on every Linux that Go runs on.
const userHZ = 100

// parseIdle reads "cpu user nice system idle iowait ...".
func parseIdle(line []byte) time.Duration {
	f := bytes.Fields(line)
	if len(f) < 6 || string(f[0]) != "cpu" {
		return 0
	}
	var ticks int64
	for _, v := range f[4:6] {
		n, err := strconv.ParseInt(string(v), 10, 64)
		if err != nil {
			return 0
		}
		ticks += n
	}
	return time.Duration(ticks) * (time.Second / userHZ)
}
