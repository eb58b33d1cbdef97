package admin

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"ztun/proxy/rescue"
	"ztun/proxy/state"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// background is the context of tests that do not end it themselves; bounded, so that a hang is a failure.
func background(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// running starts a loop that ends with the test.
func running(t testing.TB, o LoopOptions) *Loop {
	l := NewLoop(o)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := l.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return l
}

func TestLoopOrderAndEvents(t *testing.T) {
	var got []string
	v := new(state.View)
	var l *Loop
	published := 0
	l = running(t, LoopOptions{
		Handle: func(e Event) {
			got = append(got, kind(e))
			if _, ok := e.(StateBuilt); ok && l.View() != v {
				t.Error("the view is not visible when its event is handled")
			}
		},
		Published: func(old, now *state.View) {
			published++
			if old == nil || now != v {
				t.Error("Published got other views")
			}
		},
	})
	ctx := background(t)
	if l.View() == nil {
		t.Fatal("no view at the start")
	}
	if w, s, p := l.View().Counts(); w != 0 || s != 0 || p != 0 {
		t.Error("the first view is not empty")
	}
	events := []Event{StateBuilt{"file", v}, SourceSynced{"file"}, SourceBroken{"file", errors.New("x")},
		Closure{"c", func() {
			got = append(got, "ran")
		}}}
	for _, e := range events {
		if err := l.Post(ctx, e); err != nil {
			t.Fatal(err)
		}
	}
	var seen string
	if err := l.Do(ctx, func() { seen = strings.Join(got, " ") }); err != nil {
		t.Fatal(err)
	}
	if want := "state_built source_synced source_broken ran"; seen != want {
		t.Errorf("handled %q, want %q", seen, want)
	}
	if err := l.Do(ctx, func() { l.Publish(nil) }); err != nil || l.View() != v || published != 1 {
		t.Errorf("publishing nil: %v, %d published", err, published)
	}
	s := l.Stats()
	if s.Events["closure"] != 3 || s.Events["source_synced"] != 1 || s.Views != 1 || s.Panics != 0 || s.LastView.IsZero() {
		t.Errorf("%+v", s)
	}
	if pod := (PodRef{"ns", "a"}); pod.String() != "ns/a" {
		t.Error(pod)
	}
	waited := uint64(0)
	for _, n := range s.Waited.Counts {
		waited += n
	}
	if waited != s.Events["closure"]+3 || s.Waited.Sum < 0 {
		t.Errorf("%d waits for %v", waited, s.Events)
	}
}

func TestLoopPanics(t *testing.T) {
	var reported []string
	var once sync.Once
	l := running(t, LoopOptions{
		Handle: func(e Event) {
			if _, ok := e.(SourceSynced); ok {
				panic("handler")
			}
		},
		Panicked: func(e *rescue.Error) {
			reported = append(reported, e.What)
			once.Do(func() { panic("and again") })
		},
	})
	ctx := background(t)
	var pe *rescue.Error
	if err := l.DoNamed(ctx, "mine", func() {
		panic("boom")
	}); !errors.As(err, &pe) || pe.What != "mine" || pe.Value != "boom" || !strings.Contains(pe.Stack, "TestLoopPanics") {
		t.Fatalf("Do returned %v", err)
	}
	if err := l.Post(ctx, SourceSynced{}); err != nil {
		t.Fatal(err)
	}
	//lint:ignore SA5000 the panic is what the test is about
	if err := l.Post(ctx, Closure{"theirs", func() { var m map[string]int; m["x"] = 1 }}); err != nil {
		t.Fatal(err)
	}
	var got string
	if err := l.Do(ctx, func() { got = strings.Join(reported, " ") }); err != nil {
		t.Fatalf("the loop did not survive: %v", err)
	}
	if got != "mine source_synced theirs" || l.Stats().Panics != 3 {
		t.Errorf("reported %q, %+v", got, l.Stats())
	}
}

func TestLoopBackPressureAndWithdrawal(t *testing.T) {
	l := running(t, LoopOptions{Queue: 2})
	ctx := background(t)
	hold := make(chan struct{})
	held := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := l.Do(ctx, func() { close(held); <-hold }); err != nil {
			t.Error(err)
		}
	})
	<-held
	var ran atomic.Int32
	// One closure waits in the queue and is withdrawn: it must never run.
	short, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	if err := l.Do(short, func() { ran.Add(1) }); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Do on a busy loop: %v", err)
	}
	if !l.TryPost(SourceSynced{}) {
		t.Error("a queue with room refused")
	}
	if l.TryPost(SourceSynced{}) {
		t.Error("a full queue accepted")
	}
	short, cancel = context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	if err := l.Post(short, SourceSynced{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Post to a full queue: %v", err)
	}
	if s := l.Stats(); s.Full != 1 || s.Waits != 1 || s.Queued != 2 || s.Queue != 2 {
		t.Errorf("%+v", s)
	}
	// One that has begun is waited for, whatever its context says.
	close(hold)
	wg.Wait()
	ctx2, cancel2 := context.WithCancel(ctx)
	finished := false
	if err := l.Do(ctx2, func() {
		cancel2()
		time.Sleep(5 * time.Millisecond)
		finished = true
	}); err != nil || !finished {
		t.Errorf("a closure that had begun was not waited for: %v", err)
	}
	if ran.Load() != 0 {
		t.Error("a withdrawn closure ran")
	}
}

func TestLoopEnds(t *testing.T) {
	l := NewLoop(LoopOptions{})
	if !l.TryPost(SourceSynced{}) {
		t.Error("no event can be posted before Run")
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := l.Run(ctx); err != nil {
		t.Fatal(err)
	}
	bg := background(t)
	if err := l.Post(bg, SourceSynced{}); !errors.Is(err, ErrStopped) {
		t.Errorf("Post: %v", err)
	}
	if err := l.Do(bg, func() { t.Error("ran") }); !errors.Is(err, ErrStopped) {
		t.Errorf("Do: %v", err)
	}
	if l.TryPost(SourceSynced{}) {
		t.Error("TryPost after the end")
	}
	// Those who wait at the end are let go.
	l = NewLoop(LoopOptions{})
	ctx, cancel = context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); l.Run(ctx) }()
	begun := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := l.Do(bg, func() { close(begun); <-ctx.Done() }); err != nil {
			t.Errorf("the closure that was running: %v", err)
		}
	})
	<-begun
	for range 3 {
		wg.Go(func() {
			if err := l.Do(bg, func() { t.Error("ran after the end") }); !errors.Is(err, ErrStopped) {
				t.Errorf("waiting Do: %v", err)
			}
		})
	}
	for l.Stats().Queued < 3 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	wg.Wait()
	<-done
}

// TestLoopOwnership: closures of many goroutines change one variable without a lock; -race watches.
func TestLoopOwnership(t *testing.T) {
	l := running(t, LoopOptions{Queue: 4})
	ctx := background(t)
	n := 0
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 200 {
				if err := l.Do(ctx, func() { n++; l.Publish(new(state.View)) }); err != nil {
					t.Error(err)
				}
				l.View().Counts()
			}
		})
	}
	wg.Wait()
	if n != 1600 || l.Stats().Views != 1600 {
		t.Errorf("n = %d, %d views", n, l.Stats().Views)
	}
}
