package xds

import (
	"context"
	"fmt"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"ztun/admin/pb/discoverypb"
	"ztun/admin/pb/securitypb"
)

// apart has a client show Views that far apart.
func apart(d time.Duration) func(*Client) { return func(c *Client) { c.limits.apart = d } }

// never is longer than any test: what waits so long waits for something else.
const never = time.Hour

// numbered is a response that brings one pod, with the pod's number as nonce.
func numbered(i int) *discoverypb.DeltaDiscoveryResponse {
	r := addresses(pod(i))
	r.Nonce = fmt.Sprint(i)
	return r
}

// first gives a client a state of one pod, after which what follows may wait.
func (r *runningClient) first(a *ads) *adsStream {
	s, _, _ := a.begin()
	s.accepted(numbered(0))
	r.next()
	s.accepted(policies())
	<-r.synced
	return s
}

// What comes within a moment of a View waits, with its replies, and is shown together: here when the stream ends.
func TestBatchIsOneView(t *testing.T) {
	a := newADS(t)
	r := run(t, a, apart(never))
	s := r.first(a)
	s.send(numbered(1))
	s.send(policies(policyResource("ns/p")))
	s.send(&discoverypb.DeltaDiscoveryResponse{TypeUrl: TypeAddress, Nonce: "x", RemovedResources: []string{pod(0).Name}})
	s.send(policies()) // changes nothing, and is not to overtake
	s.quiet()
	r.nothingPublished()
	s.end(nil)
	p := r.next()
	if w, _, n := p.v.Counts(); w != 1 || n != 1 || !p.policies || p.v.WorkloadByUID(pod(1).Name) == nil {
		t.Error(w, n, p)
	}
	a.begin()
	r.nothingPublished()
}

// As many as may wait do; then all are shown in one View and replied to in their order.
func TestBatchIsBounded(t *testing.T) {
	a := newADS(t)
	r := run(t, a, apart(never))
	s := r.first(a)
	for i := range maxBatch {
		s.send(numbered(i + 1))
	}
	for i := range maxBatch {
		if got := s.recv(); got.ResponseNonce != fmt.Sprint(i+1) || got.ErrorDetail != nil {
			t.Fatal(i, got)
		}
	}
	if w, _, _ := r.next().v.Counts(); w != maxBatch+1 {
		t.Error(w, "workloads")
	}
	r.nothingPublished()
}

// Nobody is told that something is in use before it is, however many wait, and nothing waits for ever.
func TestBatchRepliesAfterItsView(t *testing.T) {
	a := newADS(t)
	r := run(t, a)
	s := r.first(a)
	for i := range 100 {
		s.send(numbered(i + 1))
	}
	for i := range 100 {
		if got := s.recv(); got.ResponseNonce != fmt.Sprint(i+1) {
			t.Fatal(i, got)
		}
		if r.view.Load().WorkloadByUID(pod(i+1).Name) == nil {
			t.Fatal("a reply before the View", i)
		}
	}
}

// otherPolicy is a policy of the same name as policyResource's that says something else.
func otherPolicy(name string) *discoverypb.Resource {
	r := policyResource(name)
	payload, err := proto.Marshal(policyPB(&securitypb.Match{DestinationPorts: []uint32{81}}))
	if err != nil {
		panic(err)
	}
	r.Resource.Value = payload
	return r
}

// A policy that changes and changes back before it is shown is what it was last.
func TestBatchOfOnePolicy(t *testing.T) {
	for name, between := range map[string]*discoverypb.DeltaDiscoveryResponse{
		"changed": policies(otherPolicy("ns/p")),
		"removed": {TypeUrl: TypeAuthorization, RemovedResources: []string{"ns/p"}},
	} {
		t.Run(name, func(t *testing.T) {
			a := newADS(t)
			r := run(t, a, apart(never))
			s, _, _ := a.begin()
			s.accepted(numbered(0))
			r.next()
			s.accepted(policies(policyResource("ns/p")))
			was := r.next().v.Policy("ns/p")
			s.send(between)
			s.send(policies(policyResource("ns/p")))
			s.end(nil)
			now := r.next().v.Policy("ns/p")
			if now == nil || now.Rules[0][0][0].DestinationPorts[0] != was.Rules[0][0][0].DestinationPorts[0] {
				t.Error(now)
			}
		})
	}
}

// What somebody waits for does not wait for others: on-demand answers, and refusals.
func TestBatchWaitsForNobody(t *testing.T) {
	a := newADS(t)
	r := run(t, a, onDemand, apart(never))
	s, _, _ := a.begin()
	s.accepted(policies())
	<-r.synced
	for i := range 3 {
		s.send(policies(policyResource(fmt.Sprint("ns/", i)))) // may wait
		answer := r.ask(context.Background(), pod(i).Name)
		s.askedFor(t, pod(i).Name)
		s.send(numbered(i))
		if err := r.answered(answer); err != nil || r.view.Load().WorkloadByUID(pod(i).Name) == nil {
			t.Fatal(err)
		}
		if v := r.view.Load(); v.Policy(fmt.Sprint("ns/", i)) == nil {
			t.Error("what waited before it is not shown with it")
		}
	}

	a = newADS(t)
	r = run(t, a, apart(never))
	s = r.first(a)
	bad := numbered(1)
	bad.Resources = append(bad.Resources, badPod(2))
	if got := s.exchange(bad); got.ErrorDetail == nil || r.view.Load().WorkloadByUID(pod(1).Name) == nil {
		t.Error(got)
	}
}

// askedFor passes over replies until the client asks for a name.
func (s *adsStream) askedFor(t *testing.T, name string) {
	t.Helper()
	for {
		if r := s.recv(); len(r.ResourceNamesSubscribe) == 1 && r.ResourceNamesSubscribe[0] == name {
			return
		}
	}
}
