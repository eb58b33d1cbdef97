package xds

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/testing/protocmp"

	"ztun/admin/pb/discoverypb"
	"ztun/admin/pb/workloadpb"
)

func onDemand(c *Client) {
	c.o.OnDemand = true
	c.wanted, c.unheard = map[string]bool{TypeAuthorization: true}, map[string]bool{TypeAuthorization: true}
	c.stats.Pending = listed(c.wanted)
	c.limits.demand = soon
}

// ask calls Demand and returns where its answer will be.
func (r *runningClient) ask(ctx context.Context, key string) <-chan error {
	c := make(chan error, 1)
	go func() { c <- r.Demand(ctx, "ns/pod", key) }()
	return c
}

func (r *runningClient) answered(c <-chan error) error {
	r.t.Helper()
	select {
	case err := <-c:
		return err
	case <-time.After(soon):
		r.t.Fatal("no answer")
		return nil
	}
}

func subscribe(names ...string) *discoverypb.DeltaDiscoveryRequest {
	return &discoverypb.DeltaDiscoveryRequest{TypeUrl: TypeAddress, ResourceNamesSubscribe: names}
}

// exchanged is a request that lets names go and subscribes to one.
func exchanged(drop []string, name string) *discoverypb.DeltaDiscoveryRequest {
	r := subscribe(name)
	r.ResourceNamesUnsubscribe = drop
	return r
}

func (s *adsStream) asked(want *discoverypb.DeltaDiscoveryRequest) {
	s.t.Helper()
	if diff := cmp.Diff(want, s.recv(), protocmp.Transform()); diff != "" {
		s.t.Fatal(diff)
	}
}

func aliased(r *discoverypb.Resource, aliases ...string) *discoverypb.Resource {
	r.Aliases = aliases
	return r
}

func goneMessage(names ...string) *discoverypb.DeltaDiscoveryResponse {
	return &discoverypb.DeltaDiscoveryResponse{TypeUrl: TypeAddress, Nonce: "g", RemovedResources: names}
}

// In wildcard mode everything is pushed: Demand does not wait.
func TestDemandWildcard(t *testing.T) {
	c := NewClient(ClientOptions{})
	if err := c.Demand(context.Background(), "", "/10.0.0.1"); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(c.Stats().Pending, types[:]) {
		t.Error(c.Stats().Pending)
	}
	if !slices.Equal(NewClient(ClientOptions{OnDemand: true}).Stats().Pending, []string{TypeAuthorization}) {
		t.Error("Address is waited for in on-demand mode")
	}
}

// checklist 21, spec 2.3, 2.6 and 12.19, 12.20: what is asked and how it is
// answered.
func TestDemand(t *testing.T) {
	defer goleak.VerifyNone(t)
	a := newADS(t)
	defer a.srv.Stop()
	r := run(t, a, onDemand)
	defer r.cancel()
	s, addr, pol := a.begin()
	want := subscribe("*")
	want.ResourceNamesUnsubscribe, want.Node = []string{"*"}, r.o.Node.wire()
	if diff := cmp.Diff(want, addr, protocmp.Transform()); diff != "" {
		t.Error("checklist 21:", diff)
	}
	if len(pol.ResourceNamesSubscribe)+len(pol.ResourceNamesUnsubscribe) != 0 {
		t.Error("checklist 21:", pol)
	}
	s.accepted(policies())
	<-r.synced // section 2.6: only policies gate

	bg := context.Background()
	// By name, by several at once; the View is there before the answer is.
	key := pod(0).Name
	first, second := r.ask(bg, key), r.ask(bg, key)
	s.asked(subscribe(key))
	r.eventually("two wait for one name", func(st ClientStats) bool {
		r.demands.mu.Lock()
		defer r.demands.mu.Unlock()
		return st.Waiting == 1 && r.demands.waiters[key].n == 2
	})
	s.accepted(addresses(pod(0)))
	if r.answered(first) != nil || r.answered(second) != nil || r.view.Load().WorkloadByUID(key) == nil {
		t.Fatal("no answer by name")
	}
	// Known already: by uid, address, service name, VIP. Nothing is asked.
	s.accepted(addresses(service(0)))
	for _, k := range []string{key, "net1/10.0.0.0", service(0).Name, "net1/10.200.0.0"} {
		if err := r.answered(r.ask(bg, k)); err != nil {
			t.Error(k, err)
		}
	}
	s.quiet()
	// 12.19: by alias.
	third := r.ask(bg, "net1/10.0.0.3")
	s.asked(subscribe("net1/10.0.0.3"))
	s.accepted(addresses(aliased(pod(3), "other", "net1/10.0.0.3")))
	if err := r.answered(third); err != nil || r.view.Load().WorkloadByUID(pod(3).Name) == nil {
		t.Error(err)
	}
	// An alias that the View does not resolve is asked for once: istiod is silent
	// the second time.
	host := meshPod(4)
	host.NetworkMode = workloadpb.NetworkMode_HOST_NETWORK
	c := r.ask(bg, "net1/10.0.0.4")
	s.asked(subscribe("net1/10.0.0.4"))
	s.accepted(addresses(aliased(workloadResource(host, "1"), "net1/10.0.0.4")))
	if err := r.answered(c); err != nil {
		t.Error(err)
	}
	if err := r.answered(r.ask(bg, "net1/10.0.0.4")); err != nil {
		t.Error(err)
	}
	s.quiet()
	// Once the resource is gone the alias is asked for again, and let go before.
	s.accepted(goneMessage(host.Uid))
	c = r.ask(bg, "net1/10.0.0.4")
	s.asked(exchanged([]string{"net1/10.0.0.4"}, nothing))
	s.asked(exchanged([]string{nothing}, "net1/10.0.0.4"))
	s.accepted(goneMessage(nothing))
	// There is no such thing: an answer too, and one that is remembered.
	s.accepted(goneMessage("net1/10.0.0.4"))
	for range 3 {
		if err := r.answered(c); err != nil {
			t.Error(err)
		}
		c = r.ask(bg, "net1/10.0.0.4")
	}
	if err := r.answered(c); err != nil {
		t.Error(err)
	}
	s.quiet()
	if n := r.Stats().DemandsRecalled; n != 3 {
		t.Error(n, "answers from memory")
	}
	// Refused: it is in the mesh, and what it is nobody can say.
	c = r.ask(bg, pod(5).Name)
	c2 := r.ask(bg, pod(5).Name)
	s.asked(subscribe(pod(5).Name))
	r.within("two wait for one name", func() bool {
		r.demands.mu.Lock()
		defer r.demands.mu.Unlock()
		return r.demands.waiters[pod(5).Name].n == 2
	})
	if s.exchange(addresses(badPod(5))).ErrorDetail == nil {
		t.Error("accepted")
	}
	for _, c := range []<-chan error{c, c2} {
		if err := r.answered(c); !errors.Is(err, ErrUnusable) || !strings.Contains(err.Error(), "tunnel_protocol") {
			t.Error(err)
		}
	}
	// The caller's patience.
	ctx, cancel := context.WithCancel(bg)
	c = r.ask(ctx, "net1/10.0.0.6")
	s.asked(subscribe("net1/10.0.0.6"))
	cancel()
	if err := r.answered(c); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	for _, bad := range []string{"*", "", "name", strings.Repeat("x/", maxKey), "a/\xff"} {
		if err := r.Demand(bg, "", bad); err == nil || !strings.Contains(err.Error(), "none of network/ip") {
			t.Errorf("%q: %v", bad, err)
		}
	}
	s.quiet()
	if st := r.Stats(); st.Waiting != 0 || st.DemandsUnanswered != 1 || len(r.demands.unsent) != 0 {
		t.Errorf("%+v", st)
	}

	// Reconnect: what is held is echoed, what is waited for is asked for again,
	// what nobody waits for any more is not.
	c = r.ask(bg, "net1/10.0.0.7")
	s.asked(subscribe("net1/10.0.0.7"))
	s.end(nil)
	s, addr, _ = a.begin()
	wantNames := map[string]string{pod(0).Name: "1", service(0).Name: "5", pod(3).Name: "4", "net1/10.0.0.7": ""}
	if diff := cmp.Diff(wantNames, addr.InitialResourceVersions); diff != "" ||
		!slices.Equal(addr.ResourceNamesUnsubscribe, []string{"*"}) {
		t.Error(diff)
	}
	s.quiet()
	s.accepted(addresses(aliased(pod(7), "net1/10.0.0.7")))
	if err := r.answered(c); err != nil {
		t.Error(err)
	}
}

// A control plane that is silent, or not there at all, blocks nobody for ever,
// and the queue is bounded.
func TestDemandUnanswered(t *testing.T) {
	a := newADS(t)
	r := run(t, a, onDemand, func(c *Client) { c.limits.demand = 20 * time.Millisecond })
	s, _, _ := a.begin()
	c := r.ask(context.Background(), "/10.0.0.1")
	s.asked(subscribe("/10.0.0.1"))
	if err := r.answered(c); !errors.Is(err, ErrNoAnswer) || !strings.Contains(err.Error(), "/10.0.0.1") {
		t.Error(err)
	}

	// The names that wait are bounded, and the pod with the most of them makes room.
	var turned atomic.Int32
	c2 := NewClient(ClientOptions{OnDemand: true, Turned: func(source string, evicted bool) {
		if turned.Add(1); source != "ns/greedy" || !evicted {
			t.Error("made way:", source, evicted)
		}
	}}) // not running
	ctx, cancel := context.WithCancel(context.Background())
	greedy := make(chan error, maxWaiting)
	for i := range maxWaiting {
		go func() { greedy <- c2.Demand(ctx, "ns/greedy", fmt.Sprint("n/", i)) }()
	}
	r.within("all wait", func() bool { return c2.Stats().Waiting == maxWaiting })
	modest := make(chan error, 2)
	for i := range 2 {
		go func() { modest <- c2.Demand(ctx, "ns/modest", fmt.Sprint("one/more", i)) }()
	}
	for range 2 {
		if err := <-greedy; !errors.Is(err, ErrDemandFull) {
			t.Error(err)
		}
	}
	go func() { greedy <- c2.Demand(ctx, "ns/greedy", "and/more") }()
	if err := <-greedy; !errors.Is(err, ErrDemandFull) {
		t.Error(err)
	}
	cancel()
	for range maxWaiting - 2 {
		if err := <-greedy; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
	for range 2 {
		if err := <-modest; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
	if st := c2.Stats(); st.Waiting != 0 || st.DemandsFull != 3 || turned.Load() != 3 || len(c2.demands.unsent) != 0 ||
		c2.demands.shares.Used() != 0 {
		t.Errorf("%+v", st)
	}
}

// TestDemandRider: of two pods that wait for one name, the one that did not ask first goes on when the other makes way.
func TestDemandRider(t *testing.T) {
	c := NewClient(ClientOptions{OnDemand: true}) // not running
	r := &runningClient{Client: c, t: t}
	ctx, cancel := context.WithCancel(context.Background())
	first, second := make(chan error, 1), make(chan error, 1)
	go func() { first <- c.Demand(ctx, "ns/first", "a/name") }()
	r.within("one waits", func() bool { return c.Stats().Waiting == 1 })
	go func() { second <- c.Demand(ctx, "ns/second", "a/name") }()
	r.within("two wait", func() bool {
		c.demands.mu.Lock()
		defer c.demands.mu.Unlock()
		return c.demands.waiters["a/name"].n == 2
	})
	c.demands.evict("a/name", c.demands.waiters["a/name"])
	if err := <-first; !errors.Is(err, ErrDemandFull) {
		t.Error(err)
	}
	r.within("the second waits for itself", func() bool {
		c.demands.mu.Lock()
		defer c.demands.mu.Unlock()
		w := c.demands.waiters["a/name"]
		return w != nil && w.source == "ns/second"
	})
	cancel()
	if err := <-second; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// What is asked for before there is a stream is sent when there is one.
func TestDemandBeforeConnected(t *testing.T) {
	a := newADS(t)
	a.dialErr = errTest
	r := run(t, a, onDemand)
	r.eventually("fails", func(st ClientStats) bool { return st.Streams > 2 })
	c := r.ask(context.Background(), pod(0).Name)
	r.eventually("waits", func(st ClientStats) bool { return st.Waiting == 1 })
	a.set(func() { a.dialErr = nil })
	s, addr, _ := a.begin()
	if len(addr.InitialResourceVersions) != 0 {
		t.Error(addr)
	}
	s.asked(subscribe(pod(0).Name))
	s.send(addresses(pod(0)))
	if err := r.answered(c); err != nil {
		t.Error(err)
	}
}
