package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"ztun/test/lab"
)

// together runs things beside each other and collects what they found and what went wrong.
type together struct {
	wg  sync.WaitGroup
	mu  sync.Mutex
	err error
}

// start runs f; its failure cancels the others.
func (t *together) start(cancel context.CancelFunc, f func() error) {
	t.wg.Go(func() {
		if err := f(); err != nil {
			t.mu.Lock()
			t.err = errors.Join(t.err, err)
			t.mu.Unlock()
			cancel()
		}
	})
}

// note writes pairs of name and value into o.
func (t *together) note(o outcome, pairs ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := 0; i < len(pairs); i += 2 {
		o[pairs[i].(string)] = pairs[i+1].(float64)
	}
}

func (t *together) wait() error {
	t.wg.Wait()
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.err
}

// stormScrapes is how many scrapes per second there are in a storm, beside the measured ones: twenty impatient
// Prometheuses.
const stormScrapes = 20

// storm lets loose at node n1 what --storm names, for d: configuration dumps one after the other without a pause,
// scrapes, updates.
func (b *bench) storm(ctx context.Context, cancel context.CancelFunc, all *together, w *controlWorld, o outcome,
	d time.Duration) {
	n1 := w.lab.N1.NS
	if slices.Contains(b.o.Storm, "dumps") {
		all.start(cancel, func() error {
			var r probeResult
			err := b.probe(ctx, w, n1, &r, "http", "-url", fmt.Sprintf("http://127.0.0.1:%d/config_dump", lab.AdminPort), "-t",
				d.String())
			all.note(o, "dumps", float64(r.Asked)/max(r.Seconds, 0.001), "one dump p50", r.Latency.P50, "one dump max",
				r.Latency.Max)
			return err
		})
	}
	if slices.Contains(b.o.Storm, "scrapes") {
		all.start(cancel, func() error {
			var r probeResult
			err := b.probe(ctx, w, n1, &r, "http", "-url", fmt.Sprintf("http://127.0.0.1:%d/metrics", lab.StatsPort), "-rate",
				fmt.Sprint(stormScrapes), "-t", d.String())
			all.note(o, "scrapes", float64(r.Asked)/max(r.Seconds, 0.001))
			return err
		})
	}
	if slices.Contains(b.o.Storm, "updates") {
		all.start(cancel, func() error {
			step := time.Duration(float64(time.Second) / cmp.Or(b.o.Updates, w.source.pace()))
			began, n := time.Now(), 0
			for ; time.Since(began) < d; n++ {
				if err := w.source.update(); err != nil {
					return err
				}
				settle(ctx, time.Until(began.Add(time.Duration(n+1)*step)))
				if ctx.Err() != nil {
					return nil // somebody else's failure
				}
			}
			all.note(o, "updates", float64(n)/time.Since(began).Seconds())
			return nil
		})
	}
	stop := b.watchRSS(ctx, w.path.daemons[0])
	all.start(cancel, func() error {
		settle(ctx, d)
		grown, err := stop()
		all.note(o, "RSS grows by", grown/mib)
		return err
	})
}

// watchRSS looks at a daemon's resident memory often; the function that it returns ends that and says by how many
// bytes it was above the first look at most.
func (b *bench) watchRSS(ctx context.Context, d *lab.Daemon) func() (float64, error) {
	first, err := b.r.proc.Mem(d.Pid())
	most := first.RSS
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil && err == nil {
			settle(ctx, 20*time.Millisecond)
			m, merr := b.r.proc.Mem(d.Pid())
			most, err = max(most, m.RSS), errors.Join(err, merr)
		}
	})
	return func() (float64, error) {
		cancel()
		wg.Wait()
		return float64(most - first.RSS), err
	}
}

// probe runs ztprobe in a namespace. Answers that failed are an error: at these paces none may.
func (b *bench) probe(ctx context.Context, w *controlWorld, ns *lab.NS, r *probeResult, args ...string) error {
	out, err := w.lab.Run(ctx, ns, append([]string{b.tool("ztprobe")}, args...)...)
	what := "ztprobe " + strings.Join(args, " ")
	if out = strings.TrimSpace(out); out == "" {
		return fmt.Errorf("%s: no result: %w", what, err)
	}
	if jerr := json.Unmarshal([]byte(out), r); jerr != nil {
		return fmt.Errorf("%s: %w in %.200q", what, jerr, out)
	}
	if r.Failed > 0 {
		return fmt.Errorf("%s: %d of %d failed: %s", what, r.Failed, r.Asked, strings.Join(r.Errors, "; "))
	}
	if r.Asked == 0 {
		return fmt.Errorf("%s: nothing was asked", what)
	}
	return err
}
