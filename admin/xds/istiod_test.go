package xds

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"ztun/admin/pb/discoverypb"
)

// istiod is a control plane that keeps its books of an on-demand stream as Istio's does (its discovery server, 1.30):
// it is silent about a request that changes none of the names it watches for the node, answers one that subscribes to
// nothing with the removal of everything, and for a pushed change looks at names only, never at aliases.
type istiod struct {
	t *testing.T

	mu      sync.Mutex
	objects map[string]*discoverypb.Resource // by name
	local   map[string]bool                  // names of the node's own pods, sent unasked
	stream  *books
	wiped   int // times it took everything back
}

// books is one stream and the names that are watched for it.
type books struct {
	*adsStream
	names map[string]bool
}

func (i *istiod) lookup(name string) *discoverypb.Resource {
	if o := i.objects[name]; o != nil {
		return o
	}
	for _, o := range i.objects {
		for _, a := range o.Aliases {
			if a == name {
				return o
			}
		}
	}
	return nil
}

// serve answers one stream until it ends.
func (i *istiod) serve(s *adsStream) {
	w := &books{adsStream: s}
	i.mu.Lock()
	i.stream = w
	i.mu.Unlock()
	for {
		select {
		case r := <-s.reqs:
			i.request(w, r)
		case <-s.s.Context().Done():
			return
		}
	}
}

func (i *istiod) request(s *books, r *discoverypb.DeltaDiscoveryRequest) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if r.TypeUrl != TypeAddress || r.ErrorDetail != nil {
		if r.ResponseNonce == "" {
			s.s.Send(policies())
		}
		return
	}
	first := s.names == nil
	if first {
		s.names = map[string]bool{}
	}
	changed := false
	asked := map[string]bool{}
	for _, n := range r.ResourceNamesSubscribe {
		changed = changed || !s.names[n]
		s.names[n], asked[n] = true, true
	}
	for n := range r.InitialResourceVersions {
		s.names[n], asked[n] = true, true
	}
	for _, n := range r.ResourceNamesUnsubscribe {
		changed = changed || s.names[n]
		delete(s.names, n)
		delete(asked, n)
	}
	if !first && !changed {
		return
	}
	for n := range i.local {
		if i.objects[n] != nil && !s.names[n] {
			asked[n] = true
		}
	}
	m := &discoverypb.DeltaDiscoveryResponse{TypeUrl: TypeAddress, Nonce: fmt.Sprint(rand.Uint64())}
	if len(asked) == 0 {
		for n := range s.names {
			m.RemovedResources = append(m.RemovedResources, n)
		}
		if len(m.RemovedResources) > 0 {
			i.wiped++
		}
	}
	for n := range asked {
		if o := i.lookup(n); o == nil {
			m.RemovedResources = append(m.RemovedResources, n)
		} else if s.names[o.Name] = true; r.InitialResourceVersions[o.Name] != o.Version {
			m.Resources = append(m.Resources, o)
		}
	}
	s.s.Send(m)
}

// set makes or ends (nil) an object, and pushes it to whom it concerns.
func (i *istiod) set(name string, o *discoverypb.Resource) {
	i.mu.Lock()
	defer i.mu.Unlock()
	m := &discoverypb.DeltaDiscoveryResponse{TypeUrl: TypeAddress, Nonce: fmt.Sprint(rand.Uint64())}
	if o == nil {
		delete(i.objects, name)
		m.RemovedResources = []string{name}
	} else {
		i.objects[name] = o
		m.Resources = []*discoverypb.Resource{o}
	}
	if s := i.stream; s != nil && s.names != nil && (s.names[name] || i.local[name]) {
		s.names[name] = true
		s.s.Send(m)
	}
}

func podWithAddress(i int, version string) *discoverypb.Resource {
	r := workloadResource(meshPod(i), version)
	return aliased(r, fmt.Sprintf("net1/10.%d.%d.%d", byte(i>>16), byte(i>>8), byte(i)))
}

// TestOnDemandLife: whatever is asked for, comes, goes and breaks, every look-up is answered, and what the control
// plane has is there. At the second look-up of an outside address istiod used to be told to forget a name and nothing
// else, and took everything back.
func TestOnDemandLife(t *testing.T) {
	defer goleak.VerifyNone(t)
	a := newADS(t)
	defer a.srv.Stop()
	own := podWithAddress(1, "1")
	i := &istiod{t: t, objects: map[string]*discoverypb.Resource{own.Name: own}, local: map[string]bool{own.Name: true}}
	var serving sync.WaitGroup
	defer serving.Wait()
	accept := func() {
		s := a.stream()
		serving.Go(func() { i.serve(s) })
	}
	r := run(t, a, onDemand, func(c *Client) {
		c.limits.demand = 3 * time.Second
		c.demands.believed = 0 // asked for each time: the worst for the books
	})
	defer r.cancel()
	accept()
	<-r.synced
	r.within("the node's own pod", func() bool { return r.view.Load().WorkloadByUID(own.Name) != nil })
	ask := func(key string) {
		t.Helper()
		if err := r.Demand(t.Context(), "ns/pod", key); err != nil {
			t.Fatalf("%s: %v", key, err)
		}
		if r.view.Load().WorkloadByUID(own.Name) == nil {
			t.Fatalf("after asking for %s the node's own pod is gone", key)
		}
	}
	for range 3 {
		ask("net1/192.0.2.1")
	}
	rng := rand.New(rand.NewPCG(1, 2))
	name := func(n int) string { return meshPod(n).Uid }
	addr := func(n int) string { return fmt.Sprintf("net1/10.0.0.%d", n) }
	for step := range 400 {
		n := 2 + rng.IntN(5)
		switch rng.IntN(8) {
		case 0, 1:
			ask(addr(n))
		case 2:
			ask(name(n))
		case 3:
			ask(fmt.Sprintf("net1/192.0.2.%d", rng.IntN(4)))
		case 4:
			i.set(name(n), podWithAddress(n, fmt.Sprint(step)))
		case 5:
			i.set(name(n), nil)
		case 6: // several at once
			wait := []<-chan error{r.ask(t.Context(), addr(n)), r.ask(t.Context(), "net1/192.0.2.9"),
				r.ask(t.Context(), addr(2+rng.IntN(5)))}
			for _, w := range wait {
				if err := r.answered(w); err != nil {
					t.Fatal(err)
				}
			}
		case 7:
			if rng.IntN(8) == 0 {
				i.mu.Lock()
				i.stream.end(errTest)
				i.stream = nil
				i.mu.Unlock()
				accept()
				r.eventually("connected", func(st ClientStats) bool { return st.Connected }) // until then the last it said holds
			}
		}
		i.mu.Lock()
		exists := i.objects[name(n)] != nil
		i.mu.Unlock()
		if exists { // asked for by address, it is there, whatever came before
			ask(addr(n))
			r.within(fmt.Sprintf("step %d: %s exists and was asked for", step, name(n)), func() bool { // pushes may be under way
				return r.view.Load().WorkloadByUID(name(n)) != nil
			})
		}
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.wiped > 0 {
		t.Errorf("took everything back %d times", i.wiped)
	}
}

// TestAbsentIsRemembered: that there is no such thing is asked for once in a while, not once per connection; a push
// ends the belief, and so does a new stream; while there is none it holds.
func TestAbsentIsRemembered(t *testing.T) {
	a := newADS(t)
	r := run(t, a, onDemand)
	s, _, _ := a.begin()
	s.accepted(policies())
	const outside = "net1/10.0.0.3"
	answer := func() {
		t.Helper()
		if err := r.answered(r.ask(t.Context(), outside)); err != nil {
			t.Fatal(err)
		}
	}
	c := r.ask(t.Context(), outside)
	s.asked(subscribe(outside))
	s.accepted(goneMessage(outside, "never/asked"))
	if err := r.answered(c); err != nil {
		t.Fatal(err)
	}
	for range 100 {
		answer()
	}
	s.quiet()
	// What nobody asked for is not remembered, whatever the server says of it.
	c = r.ask(t.Context(), "never/asked")
	s.asked(exchanged([]string{"never/asked"}, nothing))
	s.asked(exchanged([]string{nothing}, "never/asked"))
	s.accepted(goneMessage("never/asked"))
	if err := r.answered(c); err != nil {
		t.Fatal(err)
	}
	// A push says that there is such a thing now: here of a pod that the View does not find by its address.
	s.accepted(addresses(podWithAddress(3, "1")))
	answer()
	s.accepted(goneMessage(pod(3).Name))
	c = r.ask(t.Context(), outside)
	s.asked(exchanged([]string{outside}, nothing))
	s.asked(exchanged([]string{nothing}, outside))
	s.accepted(goneMessage(outside))
	if err := r.answered(c); err != nil {
		t.Fatal(err)
	}
	// Without a control plane the last it said holds, however old; the next one is asked anew.
	r.demands.mu.Lock()
	r.demands.believed = 0
	r.demands.mu.Unlock()
	a.set(func() { a.dialErr = errTest })
	s.end(nil)
	r.eventually("disconnected", func(st ClientStats) bool { return !st.Connected })
	answer()
	r.demands.mu.Lock()
	r.demands.believed = time.Hour
	r.demands.mu.Unlock()
	a.set(func() { a.dialErr = nil })
	s, _, _ = a.begin()
	s.accepted(policies())
	c = r.ask(t.Context(), outside)
	s.asked(subscribe(outside))
	s.accepted(goneMessage(outside))
	if err := r.answered(c); err != nil {
		t.Fatal(err)
	}
}

// TestAbsencesAreBounded: the oldest are forgotten, the newest never.
func TestAbsencesAreBounded(t *testing.T) {
	var a absences
	now := time.Now()
	for i := range 5 * maxAbsent {
		a.set(fmt.Sprint(i), now)
		if _, ok := a.get(fmt.Sprint(max(0, i-maxAbsent+1))); !ok {
			t.Fatal("forgotten too early:", i)
		}
	}
	if n := len(a.young) + len(a.old); n > 2*maxAbsent {
		t.Error(n)
	}
	a.set("0", now)
	a.del("0")
	if _, ok := a.get("0"); ok {
		t.Error("still there")
	}
}

// TestAskedIsBounded: names that nobody needs any more are let go when there are many, together with the next question;
// those of what is held, and of what somebody waits for, are not.
func TestAskedIsBounded(t *testing.T) {
	a := newADS(t)
	r := run(t, a, onDemand)
	s, _, _ := a.begin()
	s.accepted(policies())
	held, waits := r.ask(t.Context(), pod(3).Name), r.ask(t.Context(), "net1/10.9.9.9")
	for range 2 {
		if n := s.recv().ResourceNamesSubscribe; len(n) == 2 {
			break // both in one
		}
	}
	s.accepted(addresses(pod(3)))
	if err := r.answered(held); err != nil {
		t.Fatal(err)
	}
	var gone []string
	for i := range maxAsked {
		gone = append(gone, fmt.Sprint("gone/", i))
	}
	s.accepted(goneMessage(gone...))
	c := r.ask(t.Context(), "one/more")
	req := s.recv()
	if len(req.ResourceNamesSubscribe) != 1 || req.ResourceNamesSubscribe[0] != "one/more" ||
		len(req.ResourceNamesUnsubscribe) != maxAsked {
		t.Fatalf("subscribes to %q, lets %d names go", req.ResourceNamesSubscribe, len(req.ResourceNamesUnsubscribe))
	}
	for _, n := range req.ResourceNamesUnsubscribe {
		if n == pod(3).Name || n == "net1/10.9.9.9" {
			t.Error("let go:", n)
		}
	}
	s.accepted(goneMessage("one/more", "net1/10.9.9.9"))
	for _, c := range []<-chan error{c, waits} {
		if err := r.answered(c); err != nil {
			t.Error(err)
		}
	}
	// They are new again.
	c = r.ask(t.Context(), "gone/7")
	s.asked(subscribe("gone/7"))
	s.accepted(goneMessage("gone/7"))
	if err := r.answered(c); err != nil && !errors.Is(err, errTest) {
		t.Error(err)
	}
}

// TestRefusedIsNotAbsent: a push of something that is refused ends the belief that there is no such thing; while an
// older version is held, that is what there is.
func TestRefusedIsNotAbsent(t *testing.T) {
	a := newADS(t)
	r := run(t, a, onDemand)
	s, _, _ := a.begin()
	s.accepted(policies())
	key := pod(3).Name
	c := r.ask(t.Context(), key)
	s.asked(subscribe(key))
	s.accepted(goneMessage(key))
	if err := r.answered(c); err != nil {
		t.Fatal(err)
	}
	s.exchange(addresses(badPod(3)))
	c = r.ask(t.Context(), key)
	s.asked(exchanged([]string{key}, nothing))
	s.asked(exchanged([]string{nothing}, key))
	s.exchange(addresses(badPod(3)))
	if err := r.answered(c); !errors.Is(err, ErrUnusable) {
		t.Error(err)
	}

	st := newStore("", nil)
	feed(t, st, addresses(pod(1)))
	if a := feed(t, st, addresses(badPod(1), badPod(2))); a.refused != 2 || len(a.lost) != 1 ||
		a.lost[pod(2).Name] == nil {
		t.Errorf("lost %v", a.lost)
	}
}
