package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime/pprof"
	"time"

	"ztun/admin"
	"ztun/proxy"
	"ztun/proxy/identity"
	"ztun/proxy/state"
)

// The admin runtime: the goroutines that are not traffic, each labelled role=admin in profiles, and what a change of
// what is known asks for. They wait for files and networks; no worker waits for them. See worker.go.

// admin starts a goroutine of the admin runtime; serve one that ends when what it serves is closed. An
// unexpected end of either ends the process.
func (d *daemon) admin(ctx context.Context, name string, f func(context.Context) error) {
	d.work.Add(1)
	d.tasks.Add(1)
	go func() {
		defer d.work.Done()
		defer d.tasks.Add(-1)
		pprof.Do(ctx, pprof.Labels("role", "admin", "task", name), func(ctx context.Context) {
			if err := f(ctx); err != nil && ctx.Err() == nil {
				d.fail(name, err)
			}
		})
	}()
}

func (d *daemon) serve(name string, f func() error) {
	d.admin(context.Background(), name, func(context.Context) error { return f() })
}

func (d *daemon) fail(name string, err error) {
	if errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrClosed) {
		return
	}
	d.logger.Error("failed", "task", name, "error", err)
	d.failed.Store(true)
	d.askToQuit(fmt.Sprintf("failure of %s: %v", name, err))
}

// newState is what a new View, or a change of the pods, asks for beside being used: connections that it
// forbids are cut, the certificates of pods whose record has arrived are fetched before somebody waits
// for them, and those of identities that no pod of this node has any more are dropped.
func (d *daemon) newState() {
	// Listed before the View is taken: what somebody asks for meanwhile, by a newer one, is not among them.
	had := d.certs.Dump()
	view := d.loop.View()
	used := map[identity.ID]bool{}
	pods := d.pods.all()
	infos := make([]state.WorkloadInfo, len(pods))
	for i, p := range pods {
		infos[i] = p.info()
	}
	self := d.pods.self.Load()
	if self != nil {
		infos = append(infos, self.info())
	}
	d.policies.Follow(view, infos)
	use := func(p *proxy.Proxy, info state.WorkloadInfo) {
		p.Recheck()
		if w := view.WorkloadByInfo(info); w != nil {
			used[w.Identity()] = true
			d.certs.Prefetch(w.Identity())
		}
	}
	for i, p := range pods {
		use(p.proxy, infos[i])
	}
	if self != nil {
		use(self.proxy, self.info())
	}
	if d.ports != nil && len(pods) > 0 {
		d.ports.follow(context.Background(), view.WorkloadByInfo(pods[0].info()), d.log.Logger("pods"))
	}
	for _, c := range had {
		if !used[c.Identity] {
			d.certs.Forget(c.Identity)
		}
	}
}

// podsChanged is called when a pod came or went: one that is new needs its record, and the control plane may be
// waited for.
func (d *daemon) podsChanged() {
	d.know.poke()
	if d.agent != nil {
		d.agent.settle()
	}
	if client := d.xds.Load(); client != nil {
		client.Retry()
	}
}

// present tells which of the workloads that series are about still exist.
func (d *daemon) present(known map[proxy.NamedWorkload]bool) {
	// In pieces: nobody waits for this, and with GOMAXPROCS=1 everybody would (see admin's breather).
	for _, w := range d.loop.View().WorkloadsPausing(func() { time.Sleep(100 * time.Microsecond) }) {
		if k := (proxy.NamedWorkload{Namespace: w.Namespace, Workload: w.WorkloadName}); !known[k] {
			if _, asked := known[k]; asked {
				known[k] = true
			}
		}
	}
}

// handle is what the events of the loop mean here.
func (d *daemon) handle(e admin.Event) {
	// What is broken the loop reports itself.
	if e, ok := e.(admin.StateBuilt); ok {
		w, s, p := e.View.Counts()
		d.log.Logger("xds").Info("new state", "source", e.Source, "workloads", w, "services", s, "policies", p)
	}
}

// known reports whether the control side knows a pod; until then its connections wait, and are refused after 5 s.
func (d *daemon) known(i state.WorkloadInfo) bool { return d.loop.View().WorkloadByInfo(i) != nil }
