package xds

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/anypb"

	"ztun/admin/pb/discoverypb"
	"ztun/admin/pb/securitypb"
	"ztun/admin/pb/workloadpb"
)

func policies(rs ...*discoverypb.Resource) *discoverypb.DeltaDiscoveryResponse {
	return &discoverypb.DeltaDiscoveryResponse{TypeUrl: TypeAuthorization, Nonce: "p", Resources: rs}
}

func policyResource(name string) *discoverypb.Resource {
	x := policyPB(&securitypb.Match{DestinationPorts: []uint32{80}})
	payload, err := proto.Marshal(x)
	if err != nil {
		panic(err)
	}
	return &discoverypb.Resource{Name: name, Resource: &anypb.Any{TypeUrl: TypeAuthorization, Value: payload}}
}

func pod(i int) *discoverypb.Resource     { return workloadResource(meshPod(i), fmt.Sprintf("%x", i+1)) }
func service(i int) *discoverypb.Resource { return serviceResource(meshService(i), "5") }

// badPod has a reason: tunnel_protocol.
func badPod(i int) *discoverypb.Resource {
	p := meshPod(i)
	p.TunnelProtocol = workloadpb.TunnelProtocol_LEGACY_ISTIO_MTLS
	return workloadResource(p, "bad")
}

// checklist 18, 19, 20 and the order in which metadata is overridden.
func TestNode(t *testing.T) {
	n := NewNode(NodeInfo{
		IP: "10.0.0.9", Pod: "zt", Namespace: "istio-system", NodeName: "node-1",
		Metadata: map[string]string{"CLUSTER_ID": "c1", "NAME": "other", "LABELS": "text", "RAW": "a\xffb"},
		JSON: map[string]json.RawMessage{"LABELS": json.RawMessage(`{"a":1,"b":[true,null,"x"]}`),
			"BAD": json.RawMessage(`{`)},
	})
	if n.ID != "ztunnel~10.0.0.9~zt.istio-system~istio-system.svc.cluster.local" {
		t.Error(n.ID)
	}
	if len(n.Problems) != 1 || !strings.Contains(n.Problems[0], "ISTIO_METAJSON_BAD") {
		t.Error(n.Problems)
	}
	w := n.wire()
	if _, err := proto.Marshal(w); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{"NAME": "other", "NAMESPACE": "istio-system", "INSTANCE_IPS": "10.0.0.9", "NODE_NAME": "node-1",
		"CLUSTER_ID": "c1", "RAW": "a?b", "LABELS": map[string]any{"a": 1.0, "b": []any{true, nil, "x"}}}
	if diff := cmp.Diff(want, w.Metadata.AsMap()); diff != "" || w.Id != n.ID || w.Cluster != "" {
		t.Error(diff)
	}

	n = NewNode(NodeInfo{})
	if n.ID != "ztunnel~1.1.1.1~.~.svc.cluster.local" {
		t.Error(n.ID)
	}
	want = map[string]any{"NAME": "", "NAMESPACE": "", "INSTANCE_IPS": "1.1.1.1", "NODE_NAME": ""}
	if diff := cmp.Diff(want, n.wire().Metadata.AsMap()); diff != "" {
		t.Error(diff)
	}
}

// checklist 16, 17, 21 (wildcard half), 22, 27, 28, 31, 32: a stream from its
// start over updates to a reconnect.
func TestStream(t *testing.T) {
	defer goleak.VerifyNone(t)
	a := newADS(t)
	defer a.srv.Stop()
	r := run(t, a)
	defer r.cancel()
	s, addr, pol := a.begin()
	if m, _ := grpc.MethodFromServerStream(s.s); m !=
		"/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources" {
		t.Error("checklist 16:", m)
	}
	for want, got := range map[string]*discoverypb.DeltaDiscoveryRequest{TypeAddress: addr, TypeAuthorization: pol} {
		// checklist 17
		if diff := cmp.Diff(&discoverypb.DeltaDiscoveryRequest{TypeUrl: want, Node: r.o.Node.wire()}, got,
			protocmp.Transform()); diff != "" {
			t.Error(diff)
		}
	}
	if md, _ := metadata.FromIncomingContext(s.s.Context()); !slices.Equal(md["content-type"],
		[]string{"application/grpc"}) || md["authorization"] != nil || md["clusterid"] != nil {
		t.Error(md)
	}

	s.send(&discoverypb.DeltaDiscoveryResponse{TypeUrl: TypeAddress, Nonce: "n1",
		Resources: []*discoverypb.Resource{pod(0), pod(1), service(0)}})
	// checklist 22
	if diff := cmp.Diff(&discoverypb.DeltaDiscoveryRequest{TypeUrl: TypeAddress, ResponseNonce: "n1"}, s.recv(),
		protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	if p := r.next(); p.policies || len(p.v.ServiceByNSHost("ns-0", meshService(0).Hostname).Endpoints) != 2 {
		t.Error(p)
	}
	select {
	case <-r.synced:
		t.Error("in sync without policies")
	default:
	}
	// checklist 31: empty is fine.
	s.accepted(policies())
	<-r.synced
	r.nothingPublished()
	s.accepted(policies(policyResource("ns/p")))
	if p := r.next(); !p.policies || p.v.Policy("ns/p") == nil {
		t.Error(p)
	}
	// checklist 27, 28: the update of pod 2 comes before its removal, whatever the order of names.
	s.accepted(&discoverypb.DeltaDiscoveryResponse{TypeUrl: TypeAddress, Nonce: "n2",
		Resources:        []*discoverypb.Resource{pod(2)},
		RemovedResources: []string{pod(2).Name, pod(1).Name, service(0).Name, "nobody", "no/body", "a/b/c", ""}})
	p := r.next()
	if w, n, _ := p.v.Counts(); w != 1 || n != 0 {
		t.Error(w, n)
	}
	st := r.Stats()
	if !st.Connected || st.Messages[TypeAddress] != 2 || st.Messages[TypeAuthorization] != 2 || st.LastMessage.IsZero() ||
		st.Nacks != 0 || st.Retained[TypeAddress] != 1 || len(st.Pending) != 0 {
		t.Errorf("%+v", st)
	}
	want := 0
	for _, x := range []*discoverypb.Resource{pod(0), pod(1), service(0), pod(2)} {
		want += len(x.Resource.Value)
	}
	if st.MessageBytes[TypeAddress] != uint64(want) {
		t.Error(st.MessageBytes, want)
	}

	// checklist 32: what is known survives; it is echoed.
	s.end(nil)
	s, addr, pol = a.begin()
	if diff := cmp.Diff(map[string]string{pod(0).Name: "1"}, addr.InitialResourceVersions); diff != "" ||
		addr.Node == nil {
		t.Error(diff)
	}
	if diff := cmp.Diff(map[string]string{"ns/p": ""}, pol.InitialResourceVersions); diff != "" || pol.Node == nil {
		t.Error(diff)
	}
	if w, _, n := r.view.Load().Counts(); w != 1 || n != 1 {
		t.Error(w, n)
	}
	// The server says what went while it was away.
	s.accepted(&discoverypb.DeltaDiscoveryResponse{TypeUrl: TypeAddress, Nonce: "n3",
		Resources: []*discoverypb.Resource{pod(5)}, RemovedResources: []string{pod(0).Name}})
	p = r.next()
	if w := p.v.Workloads(); len(w) != 1 || w[0].UID != pod(5).Name {
		t.Error(w)
	}
	s.accepted(policies(policyResource("ns/p"))) // again, unchanged
	r.nothingPublished()
	select {
	case <-r.synced:
		t.Error("Synced twice")
	default:
	}
	if st := r.Stats(); st.Terminations["Complete"] != 1 || st.Streams != 2 {
		t.Errorf("%+v", st)
	}
}

// checklist 23, 24, 25, 31: refused resources.
func TestNACK(t *testing.T) {
	a := newADS(t)
	r := run(t, a)
	s, _, _ := a.begin()
	got := s.exchange(&discoverypb.DeltaDiscoveryResponse{TypeUrl: TypeAddress, Nonce: "n1",
		Resources: []*discoverypb.Resource{pod(0), badPod(1), pod(2)}})
	want := &discoverypb.DeltaDiscoveryRequest{TypeUrl: TypeAddress, ResponseNonce: "n1", ErrorDetail: &discoverypb.Status{
		Message: pod(1).Name + ": tunnel_protocol LEGACY_ISTIO_MTLS is not supported"}}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Error("checklist 23:", diff)
	}
	if w, _, _ := r.next().v.Counts(); w != 2 {
		t.Error("checklist 23:", w, "workloads")
	}
	s.accepted(policies())
	// checklist 24: what was understood and refused goes before what could not be read.
	got = s.exchange(&discoverypb.DeltaDiscoveryResponse{TypeUrl: TypeAddress, Nonce: "n2",
		Resources: []*discoverypb.Resource{
			{Name: "none"}, {Name: "junk", Resource: &anypb.Any{Value: []byte{0xff}}}, badPod(3),
			{Name: "empty", Resource: &anypb.Any{}}}})
	msg := got.ErrorDetail.GetMessage()
	items := strings.Split(msg, "; ")
	if len(items) != 4 || !strings.HasPrefix(items[0], pod(3).Name+": ") ||
		items[1] != "empty: neither a workload nor a service" ||
		items[2] != "none: resource without content" || !strings.HasPrefix(items[3], "junk: cannot decode: ") {
		t.Errorf("%q", msg)
	}
	select {
	case <-r.synced:
		t.Error("checklist 31: in sync by a NACKed response")
	default:
	}
	st := r.Stats()
	if st.Nacks != 2 || st.Refused[TypeAddress] != 5 || st.Rejected[TypeAddress][pod(1).Name] == "" ||
		!slices.Equal(st.Pending, []string{TypeAddress}) {
		t.Errorf("%+v", st)
	}

	// checklist 25
	s.end(nil)
	s, addr, _ := a.begin()
	if diff := cmp.Diff(map[string]string{pod(0).Name: "1", pod(2).Name: "3"}, addr.InitialResourceVersions); diff != "" {
		t.Error("checklist 25:", diff)
	}
	// A name that was refused keeps what it was: version and content.
	got = s.exchange(addresses(badPod(0)))
	if got.ErrorDetail == nil {
		t.Error("accepted")
	}
	s.accepted(addresses(pod(1), pod(3)))
	<-r.synced // by the first that is accepted
	if r.next().v.WorkloadByUID(pod(0).Name) == nil {
		t.Error("gone")
	}
	st = r.Stats()
	if _, still := st.Rejected[TypeAddress][pod(1).Name]; still || st.Rejected[TypeAddress][pod(0).Name] == "" {
		t.Errorf("%+v", st.Rejected)
	}
	if st.Refused[TypeAddress] != 6 {
		t.Error("a counter that falls, or does not count:", st.Refused)
	}
	s.end(nil)
	_, addr, _ = a.begin()
	if addr.InitialResourceVersions[pod(0).Name] != "1" {
		t.Error(addr.InitialResourceVersions)
	}
}

// checklist 26: an unknown type is ACKed, noted, and does no harm.
func TestUnknownType(t *testing.T) {
	a := newADS(t)
	r := run(t, a)
	s, _, _ := a.begin()
	for i := range 3 * maxURLs {
		s.accepted(&discoverypb.DeltaDiscoveryResponse{TypeUrl: fmt.Sprintf("type.example/%d", i), Nonce: "x",
			Resources: []*discoverypb.Resource{pod(0)}, RemovedResources: []string{"a/b"}})
	}
	r.nothingPublished()
	st := r.Stats()
	if st.UnknownTypes != 3*maxURLs || len(st.Messages) != maxURLs+1 || st.Messages["other"] != 2*maxURLs ||
		st.MessageBytes["other"] == 0 {
		t.Errorf("%+v", st)
	}
}

// checklist 34: whatever the Connector puts into the context is sent, and it is
// asked for every stream.
func TestHeaders(t *testing.T) {
	a := newADS(t)
	a.token = "one"
	r := run(t, a)
	for _, want := range []string{"one", "two"} {
		s, _, _ := a.begin()
		md, _ := metadata.FromIncomingContext(s.s.Context())
		if !slices.Equal(md["authorization"], []string{"Bearer " + want}) || !slices.Equal(md["clusterid"], []string{"c1"}) {
			t.Error(md)
		}
		a.set(func() { a.token = "two" })
		s.end(nil)
	}
	if n := r.Stats().Terminations["Complete"]; n == 0 {
		t.Error(r.Stats())
	}
}

// Section 2.5, checklist 29, 30: how streams end, and what follows.
func TestEndings(t *testing.T) {
	hello := func(s *adsStream) { s.accepted(addresses()) }
	for _, c := range []struct {
		name   string
		end    func(a *ads, s *adsStream)
		reason string
		wait   time.Duration
	}{
		{"clean", func(_ *ads, s *adsStream) { hello(s); s.end(nil) }, "Complete", 0},
		{"clean before headers", func(_ *ads, s *adsStream) { s.end(nil) }, "Complete", 0},
		{"unknown", func(_ *ads, s *adsStream) { hello(s); s.end(errTest) }, "Reconnect", 10 * time.Millisecond},
		{"cancelled", func(_ *ads, s *adsStream) {
			hello(s)
			s.end(status.Error(codes.Canceled, "x"))
		}, "Reconnect", 10 * time.Millisecond},
		{"deadline", func(_ *ads, s *adsStream) {
			hello(s)
			s.end(status.Error(codes.DeadlineExceeded, "x"))
		}, "Reconnect", 10 * time.Millisecond},
		{"closing", func(_ *ads, s *adsStream) {
			hello(s)
			s.end(status.Error(codes.Unavailable, "the transport is closing"))
		}, "Reconnect", 10 * time.Millisecond},
		{"goaway", func(_ *ads, s *adsStream) {
			hello(s)
			s.end(status.Error(codes.Unavailable, "x, received prior goaway: y"))
		}, "Reconnect", 10 * time.Millisecond},
		{"unavailable", func(_ *ads, s *adsStream) {
			hello(s)
			s.end(status.Error(codes.Unavailable, "busy"))
		}, "Error", 20 * time.Millisecond},
		{"internal", func(_ *ads, s *adsStream) {
			hello(s)
			s.end(status.Error(codes.Internal, "x"))
		}, "Error", 20 * time.Millisecond},
		{"before headers", func(_ *ads, s *adsStream) {
			s.end(status.Error(codes.Unauthenticated, "authentication failure"))
		}, "ConnectionError", 20 * time.Millisecond},
		{"unknown before headers", func(_ *ads, s *adsStream) { s.end(errTest) }, "ConnectionError", 20 * time.Millisecond},
		{"connection lost", func(a *ads, s *adsStream) {
			hello(s)
			a.set(func() { a.conns[0].Close() })
		}, "Error", 20 * time.Millisecond},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := newADS(t)
			r := run(t, a)
			s, _, _ := a.begin()
			c.end(a, s)
			a.stream()
			st := r.Stats()
			if diff := cmp.Diff(map[string]uint64{c.reason: 1}, st.Terminations); diff != "" {
				t.Error(diff, st.LastError)
			}
			if st.Backoff != c.wait {
				t.Errorf("waited %v, want %v", st.Backoff, c.wait)
			}
			if c.name == "before headers" && !strings.Contains(st.LastError, "(hint: is the token") {
				t.Error(st.LastError)
			}
		})
	}
}

// checklist 29 and spec 12.21: nothing to connect to, an unreadable root file and
// an unreadable token make no hot loop, and recovery is by itself.
func TestCannotConnect(t *testing.T) {
	for name, c := range map[string]struct {
		set    func(*ads, error)
		reason string
	}{
		"refused": {func(a *ads, err error) {
			if err != nil {
				a.lis.Close()
			}
		}, "ConnectionError"},
		"roots": {func(a *ads, err error) { a.dialErr = err }, "Error"},
		"token": {func(a *ads, err error) { a.ctxErr = err }, "ConnectionError"},
	} {
		t.Run(name, func(t *testing.T) {
			a := newADS(t)
			a.set(func() { c.set(a, errTest) })
			r := run(t, a)
			r.eventually("retries", func(st ClientStats) bool { return st.Terminations[c.reason] >= 13 })
			var want []time.Duration
			for d := 20 * time.Millisecond; len(want) < 12; d *= 2 {
				want = append(want, min(d, 15*time.Second))
			}
			if got := r.waited(); !slices.Equal(got[:12], want) {
				t.Error("checklist 29:", got)
			}
			if name == "refused" {
				return
			}
			a.set(func() { c.set(a, nil) })
			s, _, _ := a.begin()
			s.accepted(addresses(pod(0)))
			r.next()
			if st := r.Stats(); !st.Connected || !strings.Contains(st.LastError, errTest.Error()) {
				t.Errorf("%+v", st)
			}
		})
	}
}

// The schedule by itself: jitter, reset after a healthy life, and a server that
// accepts and hangs up.
func TestBackoff(t *testing.T) {
	zero := func(int64) int64 { return 0 }
	most := func(n int64) int64 { return n - 1 }
	fail := ending{step: stepFailed}
	ms := func(n float64) time.Duration { return time.Duration(n * float64(time.Millisecond)) }
	for _, c := range []struct {
		name   string
		random func(int64) int64
		ends   []ending
		want   []time.Duration
	}{
		{"failures", zero, slices.Repeat([]ending{fail}, 12),
			[]time.Duration{ms(20), ms(40), ms(80), ms(160), ms(320), ms(640), ms(1280), ms(2560), ms(5120), ms(10240),
				ms(15000), ms(15000)}},
		{"jitter", most, slices.Repeat([]ending{fail}, 12),
			[]time.Duration{ms(25), ms(50), ms(100), ms(200), ms(400), ms(800), ms(1600), ms(3200), ms(6400), ms(12800),
				ms(11250), ms(11250)}},
		{"12.22: a healthy life", zero,
			[]ending{fail, fail, fail, {step: stepFailed, lived: time.Second, messages: 1, healthy: true}, fail},
			[]time.Duration{ms(20), ms(40), ms(80), ms(20), ms(40)}},
		{"answers and breaks, again and again", zero,
			slices.Repeat([]ending{{step: stepFailed, messages: 2, healthy: true}}, 6),
			[]time.Duration{ms(20), ms(20), ms(20), ms(40), ms(80), ms(160)}},
		{"long but mute", zero, []ending{fail, fail, {step: stepFailed, lived: time.Hour}},
			[]time.Duration{ms(20), ms(40), ms(80)}},
		{"short and busy", zero, []ending{fail, fail, {step: stepFailed, lived: time.Second, messages: 9}},
			[]time.Duration{ms(20), ms(40), ms(80)}},
		{"other ends reset", zero, []ending{fail, fail, {step: stepSoon, lived: time.Minute}, fail, fail,
			{step: stepNow, lived: time.Minute}, fail},
			[]time.Duration{ms(20), ms(40), ms(10), ms(20), ms(40), 0, ms(20)}},
		{"hangs up at once", zero, append(slices.Repeat([]ending{{step: stepNow, messages: 1}}, 6),
			ending{step: stepNow, lived: time.Minute}, ending{step: stepNow}),
			[]time.Duration{0, 0, 0, ms(20), ms(40), ms(80), 0, 0}},
	} {
		b := newPauses(c.random)
		var got []time.Duration
		for _, e := range c.ends {
			got = append(got, b.next(e))
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

// The base is there before the control plane is, and both are one.
func TestBase(t *testing.T) {
	base, err :=
		ParseLocal([]byte(`{workloads: [{uid: local, workloadIps: [10.9.9.9], namespace: n, name: l, services: {}}]}`))
	if err != nil {
		t.Fatal(err)
	}
	a := newADS(t)
	r := run(t, a, func(c *Client) { c.o.Base = base; c.store = newStore("", base) })
	if p := r.next(); p.v.WorkloadByUID("local") == nil || !p.policies {
		t.Fatal(p)
	}
	s, addr, _ := a.begin()
	if len(addr.InitialResourceVersions) != 0 {
		t.Error("the base is not the server's", addr)
	}
	s.accepted(addresses(pod(0)))
	if w, _, _ := r.next().v.Counts(); w != 2 {
		t.Error(w)
	}
}

// More names than a gRPC server takes: they are left out, and what went away in
// the meantime is found out all the same.
func TestTooManyNames(t *testing.T) {
	a := newADS(t, grpc.MaxRecvMsgSize(maxRequest))
	r := run(t, a)
	s, _, _ := a.begin()
	const n = 3000
	long := strings.Repeat("x", 2000)
	all := addresses()
	for i := range n {
		all.Resources = append(all.Resources,
			workloadResource(&workloadpb.Workload{Uid: fmt.Sprint(i, long), Name: fmt.Sprint(i)}, "1"))
	}
	s.accepted(all)
	s.accepted(policies(policyResource("ns/p"), policyResource("ns/q")))
	r.next()
	r.next()
	s.end(nil)
	// This one fails within gRPC, perhaps before it is seen as a stream here.
	var addr, pol *discoverypb.DeltaDiscoveryRequest
	for pol == nil {
		s = a.stream()
		select {
		case addr = <-s.reqs:
			pol = s.recv()
		case <-s.s.Context().Done():
		}
	}
	if len(addr.InitialResourceVersions)+len(pol.InitialResourceVersions) != 0 ||
		r.Stats().Terminations["ConnectionError"] != 1 {
		t.Fatal(len(addr.InitialResourceVersions), r.Stats())
	}
	all.Resources = append(all.Resources[10:], pod(0))
	s.accepted(all)
	if w, _, p := r.next().v.Counts(); w != n-10+1 || p != 2 {
		t.Error(w, p)
	}
	s.accepted(policies(policyResource("ns/q")))
	if p := r.next(); p.v.Policy("ns/p") != nil || p.v.Policy("ns/q") == nil || !p.policies {
		t.Error("policies", p.v.Policies())
	}
	s.accepted(addresses(pod(1))) // from now on responses are changes again
	if w, _, _ := r.next().v.Counts(); w != n-10+2 {
		t.Error(w)
	}
	if got := r.Stats().Retained[TypeAddress]; got != n-10+2 {
		t.Error(got)
	}
}

// Why there is no complete state yet can be told: the end of a stream, and what of a response was refused.
func TestTrouble(t *testing.T) {
	a := newADS(t)
	heard := make(chan error, 10)
	r := run(t, a, func(c *Client) { c.o.Trouble = func(err error) { heard <- err } })
	s, _, _ := a.begin()
	s.end(status.Error(codes.PermissionDenied,
		`no identities of the caller matched (NODE_NAME must be what was given to ztun control join)`))
	if err := <-heard; !strings.HasSuffix(err.Error(), "ztun control join)") { // no hint of ours after one of theirs
		t.Error(err)
	}
	s, _, _ = a.begin()
	s.send(&discoverypb.DeltaDiscoveryResponse{TypeUrl: TypeAddress, Nonce: "1",
		Resources: []*discoverypb.Resource{badPod(0)}})
	if err := <-heard; !strings.Contains(err.Error(), "LEGACY_ISTIO_MTLS is not supported") {
		t.Error(err)
	}
	if st := r.Stats(); len(st.Pending) != 2 {
		t.Error(st.Pending)
	}
}

// That a server has no room for one more stream says nothing about the list of names.
func TestExhaustedIsNotTooLarge(t *testing.T) {
	for text, want := range map[string]bool{
		"grpc: received message larger than max (5000000 vs. 4194304)": true,
		"node n1 has 4 streams already":                                false,
		"request rate limit exceeded: would wait":                      false,
	} {
		c := NewClient(ClientOptions{})
		s := session{c: c, large: true}
		s.end(t.Context(), received{err: status.Error(codes.ResourceExhausted, text)})
		if c.noNames != want {
			t.Errorf("%q: the list is left out: %v", text, c.noNames)
		}
	}
}

// A state that comes in parts has arrived with the last of them; only then is gone what no part has named.
func TestParts(t *testing.T) {
	a := newADS(t)
	r := run(t, a, func(c *Client) { c.noNames = true })
	s, _, _ := a.begin()
	part := func(last bool, rs ...*discoverypb.Resource) *discoverypb.DeltaDiscoveryResponse {
		m := addresses(rs...)
		if m.SystemVersionInfo = "7"; !last {
			m.SystemVersionInfo += MoreFollows
		}
		return m
	}
	s.accepted(policies())
	s.accepted(part(false, pod(0), pod(1)))
	r.next()
	if st := r.Stats(); !slices.Equal(st.Pending, []string{TypeAddress}) {
		t.Error("after the first part", st.Pending)
	}
	s.accepted(part(true, pod(2)))
	r.next()
	select {
	case <-r.synced:
	case <-time.After(soon):
		t.Fatal("not in sync after the last part")
	}
	// Without names: what has gone meanwhile is found out at the end, and nothing is missing before.
	s.end(status.Error(codes.Unavailable, "transport is closing"))
	s, _, _ = a.begin()
	s.accepted(part(false, pod(0)))
	if w, _, _ := r.next().v.Counts(); w != 3 {
		t.Error("after the first part", w)
	}
	s.accepted(part(true, pod(2)))
	if v := r.next().v; v.WorkloadByUID(meshPod(1).Uid) != nil || v.WorkloadByUID(meshPod(0).Uid) == nil ||
		v.WorkloadByUID(meshPod(2).Uid) == nil {
		t.Error("in the end", v.Workloads())
	}
}
