package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"ztun/admin"
	"ztun/proxy/identity"
	"ztun/proxy/state"
)

// runWait holds the command of a `ztun run` back until what it calls finds what it takes: the mesh is known, this
// workload's record is in it, and its certificate is here.
//
// Decisions:
//   - 2026-11-29: a control plane that answers is waited for without end, however slow: a hundred runs that start at
//     once are such a case, in which every eighth command was refused its first connection after 5 s. ZTUN_RUN_WAIT is
//     for one that does not answer, and counts from the first attempt that failed in a row.
//   - 2026-11-29: after that the run ends with an error, and the command is never started: it could only be refused,
//     and whoever starts us (a person, a unit of systemd, a job of CI) knows better what to do than the command would.
//     ZTUN_RUN_WAIT=0 is for those whose command knows.
//   - 2026-11-29: a server that is there and does not take our credentials is tried for less long: nobody gets better
//     ones by waiting, but `ztun control` may read in this moment that the workload has joined.
type runWait struct {
	limit time.Duration // ZTUN_RUN_WAIT; 0: the command does not wait
	info  state.WorkloadInfo

	ready *admin.Ready // of which the state manager is asked
	know  *knowledge
	certs interface {
		Certificate(context.Context, identity.ID) (*identity.Certificate, error)
	}
	control *serverLost // nil: nothing but files says what is in the mesh
	ca      *serverLost
	retry   func() // asks for another attempt to reach the control plane soon
	log     *slog.Logger
}

const (
	firstWaitLine  = 3 * time.Second
	nextWaitLine   = 30 * time.Second
	refusedWait    = 5 * time.Second // at most, for who does not take our credentials
	certificateTry = 100 * time.Millisecond
)

// runWaits is the wait of a workload's daemon that has been started.
func (d *daemon) runWaits() *runWait {
	return &runWait{limit: d.c.Process.RunWait, info: d.c.Mode.Workload, ready: d.ready, know: d.know, certs: d.certs,
		control: d.lost, ca: d.caLost, log: d.log.Logger("run"), retry: func() {
			if client := d.xds.Load(); client != nil {
				client.Retry()
			}
		}}
}

// hold waits for what the workload needs, as long as the context lasts that interruptible makes of ctx, and as nothing
// of ours fails.
func (d *daemon) hold(ctx context.Context, interruptible func(context.Context) (context.Context, func())) error {
	ctx, stop := interruptible(ctx)
	defer stop()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var work sync.WaitGroup
	var failed error
	work.Go(func() {
		select {
		case reason := <-d.quit:
			failed = errors.New(reason)
			cancel()
		case <-ctx.Done():
		}
	})
	err := d.runWaits().wait(ctx)
	cancel()
	work.Wait()
	if failed != nil { // in the moment in which all was there, too: nobody will be told once more
		return failed
	}
	return err
}

// wait returns nil when the command can start. An error is what it has waited for in vain, or the cause of ctx's end.
func (w *runWait) wait(ctx context.Context) error {
	if w.limit == 0 {
		return nil
	}
	source := "the file of workloads"
	if w.control != nil {
		source = "the control plane " + w.control.address
		err := w.until(ctx, "the first state of "+source, func() (bool, <-chan struct{}) {
			pending, changed := w.ready.State()
			for _, p := range pending {
				if p.Name == stateManager {
					return false, changed
				}
			}
			return true, nil
		}, w.control.failing)
		if err != nil {
			return err
		}
	}
	unknown, begin := fmt.Errorf("%s knows no workload of name %s, namespace %s, service account %s", source,
		w.info.Name, w.info.Namespace, w.info.ServiceAccount), time.Now()
	err := w.until(ctx, "the record of this workload, which "+source+" does not have", func() (bool, <-chan struct{}) {
		changed := w.know.Changed()
		return w.know.View().WorkloadByInfo(w.info) != nil, changed
	}, func() (time.Time, error) { return begin, unknown })
	if err != nil {
		return err
	}
	return w.certificate(ctx)
}

// certificate waits for the workload's own.
func (w *runWait) certificate(ctx context.Context) error {
	ctx, stop := context.WithCancel(ctx)
	var work sync.WaitGroup
	defer work.Wait()
	defer stop()
	var mu sync.Mutex
	var since time.Time
	var last error
	here := make(chan struct{})
	work.Go(func() {
		for ctx.Err() == nil {
			// The record may have become another meanwhile.
			if r := w.know.View().WorkloadByInfo(w.info); r != nil {
				_, err := w.certs.Certificate(ctx, r.Identity())
				if err == nil {
					close(here)
					return
				}
				mu.Lock()
				if last == nil {
					since = time.Now()
				}
				last = err
				mu.Unlock()
			}
			select {
			case <-time.After(certificateTry):
			case <-ctx.Done():
			}
		}
	})
	return w.until(ctx, "this workload's certificate, from the CA "+w.ca.address, func() (bool, <-chan struct{}) {
		select {
		case <-here:
			return true, nil
		default:
			return false, here
		}
	}, func() (time.Time, error) {
		mu.Lock()
		defer mu.Unlock()
		return since, w.ca.why(last)
	})
}

// until waits for done, whose channel says when to look again, and says now and then what it waits for. It gives up
// when failing has had an error for too long.
func (w *runWait) until(ctx context.Context, what string, done func() (bool, <-chan struct{}),
	failing func() (since time.Time, err error)) error {
	begin := time.Now()
	line := time.NewTimer(firstWaitLine)
	defer line.Stop()
	look := time.NewTicker(time.Second)
	defer look.Stop()
	for {
		ok, changed := done()
		if ok {
			return nil
		}
		if since, err := failing(); err != nil {
			limit := w.limit
			if _, refused := likelyCause(err.Error(), ""); refused {
				limit = min(limit, refusedWait)
			}
			if time.Since(since) >= limit {
				return fmt.Errorf("gave up after %v (--wait): %w", limit, err)
			}
		}
		select {
		case <-changed:
		case <-look.C:
			w.retry()
		case <-line.C:
			w.log.Info("waiting for "+what, "for", time.Since(begin).Round(time.Second))
			line.Reset(nextWaitLine)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
