package connpath

import (
	"runtime"
	"testing"
	"time"
)

// maxIdle is how many bytes one idle connection may cost both daemons together, heap and stacks; a tenth more than what
// is measured. The daemons' share of kernel memory is none of it.
const maxIdle = 17500

// TestIdle holds what an idle connection keeps: no goroutine, and few bytes. Then all of them go on.
func TestIdle(t *testing.T) {
	n, most := 1000, maxIdle
	if instrumented || testing.CoverMode() != "" {
		n, most = 100, 4*maxIdle
	}
	w := newWorld(t)
	w.connect(t, warmUp, 16)
	goroutines, before := settled(t, func(int) bool { return true })
	w.server.hush()
	for i := range n {
		w.client.dial()
		poll(t, "a connection that stands", func() bool { return w.server.held() > i })
	}
	left, after := settled(t, func(g int) bool { return g-goroutines < n/5 })
	per := (after - before) / n
	t.Logf("%d bytes and %.2f goroutines for each idle connection", per, float64(left-goroutines)/float64(n))
	if per > most {
		t.Errorf("an idle connection costs %d bytes of heap and stacks, may cost %d", per, most)
	}
	w.server.speak()
	timeout := time.NewTimer(time.Minute)
	defer timeout.Stop()
	for i := range n {
		for _, k := range []*kernel{w.client, w.server} {
			select {
			case <-k.done:
			case <-timeout.C:
				t.Fatalf("%d connections do not go on after their rest", n-i)
			}
		}
	}
}

// settled waits until there are as few goroutines as are wanted (their tunnels' among them), and then says how many,
// and the bytes of what is alive on heap and stacks.
func settled(t *testing.T, want func(goroutines int) bool) (goroutines, bytes int) {
	t.Helper()
	poll(t, "goroutines that end", func() bool { return want(runtime.NumGoroutine()) })
	var m runtime.MemStats
	for range 3 { // stacks are halved one collection at a time; those of ended goroutines go with the next
		runtime.GC()
	}
	runtime.ReadMemStats(&m)
	return runtime.NumGoroutine(), int(m.HeapAlloc + m.StackInuse)
}

func poll(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no %s within a minute", what)
		}
	}
}
