package connpath

import (
	"syscall"
	"testing"
	"time"
)

// warmUp is after how many connections buffers, maps and tables have the size that they keep.
const warmUp = 500

// BenchmarkConnection is one connection from the SYN to the last FIN, 16 and 1 at a time: both daemons' part of it.
// The time by the clock says how busy the machine is with other things; cpu-µs/op is the process's.
func BenchmarkConnection(b *testing.B) {
	for _, at := range []int{16, 1} {
		b.Run(map[int]string{16: "16", 1: "1"}[at], func(b *testing.B) {
			w := newWorld(b)
			w.connect(b, warmUp, at)
			b.ReportAllocs()
			before := used(b)
			b.ResetTimer()
			w.connect(b, b.N, at)
			b.StopTimer()
			b.ReportMetric(float64((used(b)-before).Nanoseconds())/1000/float64(b.N), "cpu-µs/op")
		})
	}
}

// used is the processor time of this process.
func used(t testing.TB) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// maxAllocs is how many objects one connection may cost both daemons together, as they are at work on 16 at once.
// It is a tenth more than what is measured, which differs by a few with who waits for whom.
const maxAllocs = 285

// TestAllocations holds the number of objects that are made on the whole path of a connection.
func TestAllocations(t *testing.T) {
	n, at, most := 1000, 16, float64(maxAllocs)
	if instrumented || testing.CoverMode() != "" {
		n, most = 100, most*1.5 // slow, and pools drop a part of what they are given
	}
	w := newWorld(t)
	w.connect(t, warmUp, at)
	per := testing.AllocsPerRun(1, func() { w.connect(t, n, at) }) / float64(n)
	t.Logf("%.1f objects for each connection", per)
	if per > most {
		t.Errorf("a connection costs %.1f objects, may cost %.0f: find them with\n\tgo test ./test/bench/connpath "+
			"-run '^$' -bench . -memprofile mem.out -memprofilerate 512\n\tgo tool pprof -sample_index=alloc_objects "+
			"-top mem.out", per, most)
	}
}

// connect makes n connections, at most so many at a time, and waits for their end.
func (w *world) connect(t testing.TB, n, at int) {
	t.Helper()
	timeout := time.NewTimer(5 * time.Minute)
	defer timeout.Stop()
	begun := min(n, at)
	for range begun {
		w.client.dial()
	}
	for left := n; left > 0; left-- {
		for _, k := range []*kernel{w.client, w.server} {
			select {
			case <-k.done:
			case <-timeout.C:
				t.Fatalf("%d connections have not ended", left)
			}
		}
		if begun < n {
			begun++
			w.client.dial()
		}
	}
}
