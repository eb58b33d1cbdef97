package grow

import (
	"bytes"
	"runtime"
	"runtime/pprof"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// self is the number of the goroutine that calls it.
func self() string {
	var b [64]byte
	return strings.Fields(string(b[:runtime.Stack(b[:], false)]))[1]
}

// TestWorkersAreUsedAgain: one after the other is done by one goroutine, what is begun meanwhile by others, and no more
// than the bound wait for work.
func TestWorkersAreUsedAgain(t *testing.T) {
	var w Workers
	on := func() string {
		id := make(chan string, 1)
		w.Go(func() { id <- self() })
		return <-id
	}
	idle := func() int {
		w.mu.Lock()
		defer w.mu.Unlock()
		return len(w.idle)
	}
	wait := func(n int) {
		t.Helper()
		for end := time.Now().Add(30 * time.Second); idle() != n; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%d workers are idle, want %d", idle(), n)
			}
		}
	}
	first := on()
	wait(1)
	if second := on(); second != first {
		t.Errorf("goroutine %s, then %s", first, second)
	}
	wait(1)
	release := make(chan struct{})
	var mu sync.Mutex
	ids := map[string]bool{}
	var begun sync.WaitGroup
	for range 2 * maxIdle {
		begun.Add(1)
		w.Go(func() {
			mu.Lock()
			ids[self()] = true
			mu.Unlock()
			begun.Done()
			<-release
		})
	}
	begun.Wait() // all of them at the same time
	if len(ids) != 2*maxIdle || !ids[first] {
		t.Errorf("%d goroutines for %d functions", len(ids), 2*maxIdle)
	}
	close(release)
	wait(maxIdle)
	w.mu.Lock()
	waiting := slices.Clone(w.idle)
	w.mu.Unlock()
	w.Trim()
	w.mu.Lock()
	for _, worker := range w.idle { // others may have become idle meanwhile
		if slices.Contains(waiting, worker) {
			t.Error("one is idle still after a trim")
		}
	}
	w.mu.Unlock()
	if on() == "" {
		t.Error("no work after a trim")
	}
	hold := make(chan struct{})
	w.Go(func() { <-hold })
	w.Close()
	if on() == "" {
		t.Error("no work after the end")
	}
	close(hold)
	w.Work.Wait()
	if n := idle(); n != 0 {
		t.Errorf("%d idle after the end", n)
	}
}

// TestWorkersForgetLabels: the labels of what a worker did are not those of what it does next.
func TestWorkersForgetLabels(t *testing.T) {
	idle := make(chan struct{}, 1)
	w := Workers{OnIdle: func() { idle <- struct{}{} }}
	const label = "of-the-first"
	w.Go(func() {
		pprof.SetGoroutineLabels(pprof.WithLabels(t.Context(), pprof.Labels("test", label)))
	})
	<-idle
	var labelled bytes.Buffer
	w.Go(func() { pprof.Lookup("goroutine").WriteTo(&labelled, 1) })
	<-idle
	if strings.Contains(labelled.String(), label) {
		t.Errorf("its next work is labelled as the first:\n%s", labelled.String())
	}
	w.Close()
	w.Work.Wait()
}

// BenchmarkWorkers: what goes deep, on goroutines of its own and on workers.
func BenchmarkWorkers(b *testing.B) {
	for name, start := range map[string]func(func()){"goroutine": func(f func()) { go f() }, "worker": new(Workers).Go} {
		b.Run(name, func(b *testing.B) {
			done := make(chan int, 1)
			f := func() {
				Stack()
				done <- deep(30)
			}
			for b.Loop() {
				start(f)
				<-done
			}
		})
	}
}
