package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"ztun/admin"
	"ztun/admin/zlog"
	"ztun/proxy/identity"
	"ztun/proxy/state"
)

// waiting is a run that waits for a control plane and a CA that are the test's.
type waiting struct {
	*runWait
	task *admin.Task // of the state manager

	mu      sync.Mutex
	view    *state.View
	cert    error // instead of a certificate
	slow    time.Duration
	retried int

	log logged
}

var waiter = state.WorkloadInfo{Namespace: "shop", Name: "till", ServiceAccount: "tills"}

func newWaiting(limit time.Duration) *waiting {
	w := &waiting{view: new(state.View)}
	log := slog.New(slog.NewTextHandler(&w.log, nil))
	ready := admin.NewReady(time.Now)
	w.task = ready.Register(stateManager)
	w.runWait = &runWait{limit: limit, info: waiter, ready: ready, know: newKnowledge(func() *state.View {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.view
	}), certs: w, control: newControlLost(log, "10.0.0.1:15012", limit),
		ca: newCALost(log, "10.0.0.2:15012", "CA_ADDRESS", limit), log: log, retry: func() { w.retried++ }}
	return w
}

// Certificate is the CA's answer.
func (w *waiting) Certificate(ctx context.Context, _ identity.ID) (*identity.Certificate, error) {
	w.mu.Lock()
	slow, err := w.slow, w.cert
	w.mu.Unlock()
	select {
	case <-time.After(slow):
		return nil, err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// publish makes a mesh of one workload known.
func (w *waiting) publish(name string) {
	b := state.NewBuilder("")
	b.InsertWorkload(&state.Workload{UID: name, Name: name, Namespace: "shop", ServiceAccount: "tills"})
	w.mu.Lock()
	w.view = b.Build()
	w.mu.Unlock()
	w.know.published(nil, nil)
}

// TestRunWaits: the command waits for the first state, its record and its certificate, however long a control plane
// that answers takes for them, and it is said what for; no longer than ZTUN_RUN_WAIT for one that does not answer, and
// for 5 s if it does not take us.
func TestRunWaits(t *testing.T) {
	refused := errors.New("rpc error: code = Unavailable desc = dial tcp 10.0.0.1:15012: connect: connection refused")
	stranger := errors.New("rpc error: code = Unauthenticated desc = no such token")
	for _, tt := range []struct {
		name  string
		limit time.Duration
		do    func(w *waiting) // beside the wait
		after time.Duration    // it ends
		err   string           // "": the command starts
		said  string
	}{
		{"slow", 30 * time.Second, func(w *waiting) {
			time.Sleep(10 * time.Minute)
			w.slow = time.Minute
			w.publish("till")
			w.task.Done()
		}, 11 * time.Minute, "", "waiting for the first state of the control plane 10.0.0.1:15012"},
		{"answers between failures", 30 * time.Second, func(w *waiting) {
			for range 10 {
				w.control.trouble(refused)
				time.Sleep(29 * time.Second)
				w.control.connected()
				time.Sleep(29 * time.Second)
			}
			w.publish("till")
			w.task.Done()
		}, 580 * time.Second, "", "waiting for the first state"},
		{"away", 30 * time.Second, func(w *waiting) {
			for range 60 {
				w.control.trouble(refused)
				time.Sleep(time.Second)
			}
		}, 30 * time.Second, "gave up after 30s (--wait): the control plane is not reached, 10.0.0.1:15012: nothing listens " +
			"there: is it running, and is XDS_ADDRESS right? (" + refused.Error() + ")",
			"the control plane is not reached: it is waited for"},
		{"refuses us", 30 * time.Second, func(w *waiting) { w.control.trouble(stranger) }, 5 * time.Second,
			"gave up after 5s (--wait): the control plane is not reached, 10.0.0.1:15012: it does not take these credentials",
			"waiting for the first state"},
		{"does not know us", 20 * time.Second, func(w *waiting) { w.publish("other"); w.task.Done() }, 20 * time.Second,
			"the control plane 10.0.0.1:15012 knows no workload of name till, namespace shop, service account tills",
			"waiting for the record of this workload"},
		{"knows us later", 20 * time.Second, func(w *waiting) {
			w.publish("other")
			w.task.Done()
			time.Sleep(19 * time.Second)
			w.publish("till")
		}, 19 * time.Second, "", "waiting for the record of this workload"},
		{"CA away", 20 * time.Second, func(w *waiting) {
			w.cert = errors.New("dial tcp 10.0.0.2:15012: i/o timeout")
			w.publish("till")
			w.task.Done()
		}, 20 * time.Second, "no certificate comes from the CA, 10.0.0.2:15012: nobody answers there",
			"waiting for this workload's certificate, from the CA 10.0.0.2:15012"},
		{"not at all", 0, func(*waiting) {}, 0, "", ""},
		{"from files", 20 * time.Second, func(w *waiting) { w.publish("till") }, 0, "", ""},
		{"from files without us", 20 * time.Second, func(w *waiting) { w.publish("other") }, 20 * time.Second,
			"the file of workloads knows no workload of name till", "waiting for the record of this workload"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWaiting(tt.limit)
				files := strings.HasPrefix(tt.name, "from files")
				var work sync.WaitGroup
				work.Go(func() { tt.do(w) })
				if files {
					work.Wait()
				}
				run := *w.runWait
				if files {
					run.control = nil
				}
				begin := time.Now()
				err := run.wait(t.Context())
				took := time.Since(begin)
				work.Wait()
				if took < tt.after || took > tt.after+2*time.Second {
					t.Errorf("after %v, want %v", took, tt.after)
				}
				if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
					t.Errorf("%v, want %q", err, tt.err)
				}
				if lines := strings.Join(w.log.take(), "\n"); !strings.Contains(lines, tt.said) ||
					tt.said == "" && lines != "" {
					t.Errorf("said %q, want %q", lines, tt.said)
				}
				if w.retried == 0 && tt.after > time.Second && tt.name != "refuses us" {
					t.Error("the control plane is not asked for")
				}
			})
		})
	}
}

// TestRunWaitEnds: a signal that would end the command ends the wait for it, as it would have ended the command; others
// are kept for it.
func TestRunWaitEnds(t *testing.T) {
	for _, tt := range []struct {
		pipe, own syscall.Signal
		want      exitStatus
	}{
		{pipe: syscall.SIGTERM, want: 143},
		{pipe: syscall.SIGHUP, want: 129},
		{own: syscall.SIGINT, want: 130},
		{own: syscall.SIGQUIT, want: 131},
		{own: syscall.SIGTERM}, // comes by the pipe, too
		{pipe: syscall.SIGUSR1},
	} {
		synctest.Test(t, func(t *testing.T) {
			l := &lifeline{signals: make(chan syscall.Signal, 16), own: make(chan os.Signal, 4)}
			w := newWaiting(time.Minute)
			ctx, stop := l.interruptible(t.Context())
			done := make(chan error, 1)
			go func() { done <- w.wait(ctx) }()
			if tt.pipe != 0 {
				l.signals <- tt.pipe
			}
			if tt.own != 0 {
				l.own <- tt.own
			}
			synctest.Wait()
			if tt.want == 0 {
				w.publish("till")
				w.task.Done()
			}
			var got exitStatus
			if err := <-done; (err == nil) != (tt.want == 0) || err != nil && (!errors.As(err, &got) || got != tt.want) {
				t.Errorf("%v, %v: %v", tt.pipe, tt.own, err)
			}
			stop()
			want := max(tt.pipe, tt.own)
			if tt.own == syscall.SIGTERM {
				want = 0
			}
			if kept := l.pending(); kept != want {
				t.Errorf("%v, %v: kept %v, want %v", tt.pipe, tt.own, kept, want)
			}
		})
	}
}

// pending is the next signal for the command, 0 for none.
func (l *lifeline) pending() syscall.Signal {
	select {
	case s := <-l.signals:
		return s
	default:
		return 0
	}
}

// TestRunWaitKeeps: a signal that comes while the wait succeeds, and just after it, ends the wait or is the command's;
// a failure of ours is told in that moment, too.
func TestRunWaitKeeps(t *testing.T) {
	for i := range 2000 {
		w := newWaiting(0) // nothing is waited for
		d := &daemon{c: load(t, "ZTUN_RUN_WAIT", "0"), ready: w.ready, quit: make(chan string, 1), know: w.know,
			lost: w.control, log: zlog.New(zlog.Options{Writer: &w.log})}
		l := &lifeline{signals: make(chan syscall.Signal, 16), own: make(chan os.Signal, 4)}
		const reason = "failure of xds"
		var work sync.WaitGroup
		work.Go(func() {
			switch i % 3 {
			case 0:
				l.signals <- syscall.SIGTERM
			case 1:
				l.own <- syscall.SIGINT
			case 2:
				d.quit <- reason
			}
		})
		err := d.hold(t.Context(), l.interruptible)
		work.Wait()
		l.keepOwn()
		kept := l.pending()
		switch i % 3 {
		case 0:
			if err == nil && kept != syscall.SIGTERM {
				t.Fatalf("%d: SIGTERM is lost", i)
			}
		case 1:
			if err == nil && kept != syscall.SIGINT {
				t.Fatalf("%d: SIGINT is lost", i)
			}
		case 2:
			if err == nil && len(d.quit) == 0 {
				t.Fatalf("%d: the failure is lost", i)
			}
		}
		d.log.Close(t.Context())
	}
}

// TestRunWaitQuits: what fails in our own process ends the wait.
func TestRunWaitQuits(t *testing.T) {
	w := newWaiting(time.Minute)
	d := &daemon{c: load(t, "ZTUN_RUN_WAIT", "1h"), log: zlog.New(zlog.Options{Writer: &w.log}), ready: w.ready,
		quit: make(chan string, 1), know: w.know, lost: w.control}
	defer d.log.Close(t.Context())
	d.askToQuit("failure of xds")
	err := d.hold(t.Context(), func(ctx context.Context) (context.Context, func()) { return ctx, func() {} })
	if err == nil || err.Error() != "failure of xds" {
		t.Error(err)
	}
}
