package steered

import (
	"context"
	"errors"
	"slices"
	"time"

	"ztun/cmd/attach"
	"ztun/tun/sandwich"
)

// checkEvery is how often what the pod's plan says is looked at.
const checkEvery = 5 * time.Second

// watch puts back what somebody has changed, lets ended connections go, and ends S with the pod's end of it.
func (p *pod) watch(ctx context.Context) {
	done := make(chan struct{})
	links, err := sandwich.Ends(p.s, done)
	if err != nil {
		p.log.Warn("changes in a pod's network are noticed late", "pod", p.spec.Label, "error", err)
	}
	defer func() {
		close(done)
		for range links { // until its sender has ended
		}
	}()
	tick := time.NewTicker(checkEvery)
	defer tick.Stop()
	events := links
	for {
		select {
		case <-ctx.Done():
			return
		case u, ok := <-events:
			if !ok {
				events = nil
				continue
			}
			if !sandwich.Ended(u) {
				continue
			}
		case <-tick.C:
		}
		if !p.check(ctx) {
			return
		}
	}
}

// check is one look; false: the pod's end is gone, or the pod is being stopped.
func (p *pod) check(ctx context.Context) bool {
	captured, err := p.record.Joined(p.namespaces())
	if err == nil && !captured {
		p.fail(errors.New("the pod's eth0 was deleted (by its CNI?), and the device behind it with it"))
		if err := sandwich.End(p.s, podDevice); err != nil {
			p.log.Error("the CNI's device of a pod is left", "pod", p.spec.Label, "in", p.record.Name(), "error", err)
		}
		return false
	}
	p.forget()
	p.checking.Lock()
	defer p.checking.Unlock()
	if p.stopping {
		return false
	}
	plan, err := p.plan()
	if err == nil {
		var changed []sandwich.Step
		changed, err = sandwich.Apply(ctx, plan, p.namespaces())
		if len(changed) > 0 {
			p.log.Warn("put back what was changed in a pod's network", "pod", p.spec.Label,
				"steps", sandwich.Plan{Steps: changed}.String())
		}
	}
	if err != nil && ctx.Err() == nil {
		p.log.Error("a pod's network is not as it is to be", "pod", p.spec.Label, "error", err)
	}
	return true
}

// forget takes the connections out of the list that have ended.
func (p *pod) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.record.Keep) == 0 {
		return
	}
	now, err := attach.Unfinished(p.ns, p.spec.IPs)
	if err != nil {
		return // the next time
	}
	keep := sandwich.Remain(p.record.Keep, conns(now))
	if slices.Equal(keep, p.record.Keep) {
		return
	}
	p.record.Keep = keep
	if err := p.record.Save(p.node.records); err != nil {
		p.log.Warn("a pod's record", "pod", p.spec.Label, "error", err)
	}
}
