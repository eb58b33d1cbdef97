package rescue

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestCaught(t *testing.T) {
	var log bytes.Buffer
	p := New(slog.New(slog.NewTextHandler(&log, nil)))
	var told error
	p.Func("a test", func() { panic("boom") }, func(err error) { told = err })()
	var e *Error
	if !errors.As(told, &e) || e.What != "a test" || e.Value != "boom" || told.Error() != "panic in a test: boom" {
		t.Errorf("told %v", told)
	}
	for _, want := range []string{"level=ERROR", `in="a test"`, "panic=boom", "rescue_test.go"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("%q is not in the log:\n%s", want, log.String())
		}
	}
	p.Run("another", func() { panic(errors.New("again")) }, func(error) { panic("while clearing up") })
	//lint:ignore SA5000 the panic is what the test is about
	p.Run("nobody's", func() { var m map[string]int; m["x"] = 1 }, nil)
	if n := p.Total(); n != 4 {
		t.Errorf("%d panics counted, want 4", n)
	}
	done := false
	p.Run("no panic", func() { done = true }, func(err error) { t.Errorf("told of %v", err) })
	if !done || p.Total() != 4 {
		t.Error("what does not panic is no panic")
	}
	for range 100 {
		p.Run("a loop", func() { panic("boom") }, nil)
	}
	p.Close()
	if n := strings.Count(log.String(), "level=ERROR"); n > 10 || !strings.Contains(log.String(), "log lines left out") {
		t.Errorf("%d stacks in the log", n)
	}
}

func TestNobodyCatches(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("a panic was swallowed")
		}
	}()
	var p *Panics
	if p.Total() != 0 {
		t.Error("nobody has counted")
	}
	p.Close()
	p.Func("x", func() { panic("boom") }, nil)()
}

func TestSeize(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		Seize(&mu) // free
		began := time.Now()
		go func() { time.Sleep(time.Second); mu.Unlock() }()
		Seize(&mu) // held by somebody who lives
		if d := time.Since(began); d < time.Second || d > 2*time.Second {
			t.Errorf("taken after %v from a holder who let go after 1 s", d)
		}
		began = time.Now()
		Seize(&mu) // held by nobody any more
		if d := time.Since(began); d < 2*time.Second || d > 5*time.Second {
			t.Errorf("taken over after %v", d)
		}
		mu.Unlock()
	})
}

func TestWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New(slog.New(slog.DiscardHandler))
		var wg sync.WaitGroup
		wg.Add(1)
		go func() { time.Sleep(time.Minute); wg.Done() }()
		if !p.Wait(&wg) {
			t.Error("without a panic it gave up")
		}
		wg.Add(1)
		p.Run("x", func() { panic("boom") }, nil)
		if p.Wait(&wg) {
			t.Error("it waited for what never comes")
		}
		wg.Done()
		var none *Panics
		if !none.Wait(&wg) || !p.Wait(&wg) {
			t.Error("nothing to wait for")
		}
	})
}
