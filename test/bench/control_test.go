package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/proto"

	"ztun/admin/pb/discoverypb"
	"ztun/admin/pb/workloadpb"
	"ztun/admin/xds"
	"ztun/test/lab"
)

func smallMesh() *bigMesh {
	return &bigMesh{workloads: 30, services: 4, real: lab.WorldFile{Workloads: []lab.Workload{
		{UID: "lab//v1/Pod/default/a", Name: "a", Namespace: "default", ServiceAccount: "a", TrustDomain: "cluster.local",
			Protocol: "HBONE", Node: "n1",
			WorkloadIPs: []string{"10.91.1.2", "fd91::2"}, WorkloadName: "a-deploy", WorkloadType: "deployment",
			CanonicalName: "a", CanonicalRevision: "v1"},
	}}}
}

// TestBigMesh: the file is one that ztun reads, holds what was asked for, and the resources of the control plane say
// the same.
func TestBigMesh(t *testing.T) {
	m := smallMesh()
	texts := map[int][]byte{}
	for _, generation := range []int{0, 7} {
		b, err := m.yaml(generation)
		if err != nil {
			t.Fatal(err)
		}
		texts[generation] = b
		l, err := xds.ParseLocal(b)
		if err != nil {
			t.Fatal(err)
		}
		if len(l.Workloads) != m.workloads+1 || len(l.Services) != m.services {
			t.Errorf("%d workloads, %d services", len(l.Workloads), len(l.Services))
		}
		v := l.View("n1")
		for i := range m.workloads {
			w, p := v.WorkloadByUID(m.uid(i)), m.workload(i, 0).GetWorkload()
			if w == nil {
				t.Fatalf("no workload %s", m.uid(i))
			}
			if w.Name != p.Name || w.Namespace != p.Namespace || w.Node != p.Node || w.CanonicalName != p.CanonicalName ||
				w.ServiceAccount != p.ServiceAccount ||
				!slices.Equal(w.Addresses[0].AsSlice(), p.Addresses[0]) || w.Protocol.String() != p.TunnelProtocol.String() {
				t.Errorf("workload %d: %+v, the control plane says %v", i, w, p)
			}
		}
		for s := range m.services {
			p := m.service(s).GetService()
			x := v.ServiceByNSHost(p.Namespace, p.Hostname)
			if x == nil || len(x.Endpoints) == 0 || !slices.Equal(x.VIPs[0].Addr.AsSlice(), p.Addresses[0].Address) {
				t.Errorf("service %d: %+v", s, x)
			}
		}
		a, err := actual(m.real.Workloads[0])
		if err != nil {
			t.Fatal(err)
		}
		if w := v.WorkloadByUID(resourceName(a)); w == nil || len(w.Addresses) != len(a.GetWorkload().Addresses) ||
			w.CanonicalName != "a" {
			t.Errorf("the world's own workload: %+v", w)
		}
	}
	if bytes.Equal(texts[0], texts[7]) {
		t.Error("an update changes nothing")
	}
}

// TestXDSSource: a client gets everything in one response and then what changes, and a NACK is an error.
func TestXDSSource(t *testing.T) {
	w := &lab.World{Dir: t.TempDir()}
	s, err := newXDSSource(w, smallMesh())
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer(grpc.Creds(s.creds))
	discoverypb.RegisterAggregatedDiscoveryServiceServer(g, s)
	s.servers = append(s.servers, g)
	s.serving.Go(func() { _ = g.Serve(l) })

	root, err := os.ReadFile(s.root)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(root) {
		t.Fatal("no root certificate")
	}
	conn, err := grpc.NewClient(l.Addr().String(),
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: pool})))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	stream, err := discoverypb.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	const policies = "type.googleapis.com/istio.security.Authorization"
	for _, typ := range []string{addressType, policies} {
		if err := stream.Send(&discoverypb.DeltaDiscoveryRequest{TypeUrl: typ}); err != nil {
			t.Fatal(err)
		}
	}
	next := func() *discoverypb.DeltaDiscoveryResponse {
		r, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	for _, want := range []struct {
		typ string
		n   int
	}{{addressType, 30 + 4 + 1}, {policies, 0}} {
		r := next()
		if r.TypeUrl != want.typ || len(r.Resources) != want.n {
			t.Errorf("%s with %d resources", r.TypeUrl, len(r.Resources))
		}
		if err := stream.Send(&discoverypb.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.update(); err != nil {
		t.Fatal(err)
	}
	r := next()
	var a workloadpb.Address
	if len(r.Resources) != 1 || proto.Unmarshal(r.Resources[0].Resource.Value, &a) != nil ||
		a.GetWorkload().CanonicalRevision != "v2" || r.Resources[0].Name != a.GetWorkload().Uid {
		t.Errorf("%v", r)
	}
	if err := stream.Send(&discoverypb.DeltaDiscoveryRequest{TypeUrl: addressType, ResponseNonce: r.Nonce,
		ErrorDetail: &discoverypb.Status{Message: "do not like it"}}); err != nil {
		t.Fatal(err)
	}
	for s.err() == nil {
		if ctx.Err() != nil {
			t.Fatal("a NACK went unnoticed")
		}
		time.Sleep(time.Millisecond)
	}
}

// TestProbe runs ztprobe against servers that stall, refuse and answer.
func TestProbe(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "ztprobe")
	if out, err := exec.Command("go", "build", "-buildvcs=false", "-o", bin, "./ztprobe").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	stall := make(chan struct{})
	hs := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/stall":
			<-stall
		case "/bad":
			w.WriteHeader(http.StatusInternalServerError)
		}
		fmt.Fprint(w, "hello")
	}))
	defer hs.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte{1})
			c.Close()
		}
	}()
	probe := func(args ...string) (r probeResult, code int) {
		cmd := exec.Command(bin, args...)
		out, err := cmd.Output()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		if err := json.Unmarshal(out, &r); err != nil {
			t.Fatalf("%v in %q", err, out)
		}
		return r, cmd.ProcessState.ExitCode()
	}
	if r, code := probe("http", "-url", hs.URL, "-t", "50ms"); code != 0 || r.Asked == 0 || r.Bytes != int64(5*r.Asked) ||
		r.Latency.N != uint64(r.Asked) {
		t.Errorf("one after the other: %d %+v", code, r)
	}
	if r, code := probe("http", "-url", hs.URL+"/bad", "-t", "1ms"); code != 1 || r.Failed == 0 || r.Failed != r.Asked ||
		len(r.Errors) == 0 {
		t.Errorf("a failure: %d %+v", code, r)
	}
	if r, code := probe("conns", "-to", l.Addr().String(), "-rate", "100", "-t", "100ms"); code != 0 || r.Asked != 10 ||
		r.Bytes != 10 {
		t.Errorf("connections: %d %+v", code, r)
	}
	// A stall of the server counts for every question that was due meanwhile.
	time.AfterFunc(500*time.Millisecond, func() { close(stall) })
	if r, code := probe("http", "-url", hs.URL+"/stall", "-rate", "100", "-t", "100ms"); code != 0 || r.Asked != 10 ||
		r.Latency.P50 < 100 {
		t.Errorf("a stall: %d %+v", code, r)
	}
}

// TestControlPlan: every target and reference concerns a subject that is measured, and the base of the isolation
// cases comes first.
func TestControlPlan(t *testing.T) {
	o, err := parseArgs([]string{"control"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{o: o}
	ks := b.controlCases()
	if len(ks) != 5 {
		t.Errorf("%d cases", len(ks))
	}
	for _, k := range ks {
		names := map[string]bool{}
		for _, s := range k.subjects {
			names[s.name] = true
		}
		if len(k.subjects) == 2 && k.subjects[0].name != calm || k.lasts <= 0 {
			t.Errorf("%s: %v", k.name, names)
		}
		for _, w := range k.rows {
			if (w.Target != nil || w.Reference != "") && !names[w.Subject] {
				t.Errorf("%s, %s: nobody is %q", k.name, w.Metric, w.Subject)
			}
		}
	}
	b.o.NoDaemon = true
	if ks := b.controlCases(); len(ks) != 0 {
		t.Errorf("%d cases without a daemon", len(ks))
	}
}

// TestGrowthPlan: each size has a case, with a mesh of its own; without daemons bare veth's remain.
func TestGrowthPlan(t *testing.T) {
	o, err := parseArgs([]string{"growth"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{o: o}
	ks, names := b.growthCases(), map[string]bool{}
	for _, k := range ks {
		names[k.name] = true
		if k.lasts <= 0 || len(k.subjects) == 0 {
			t.Errorf("%s: %v, %d subjects", k.name, k.lasts, len(k.subjects))
		}
	}
	if len(names) != len(heldSizes)+len(meshSizes) || b.o.Workloads != o.Workloads {
		t.Errorf("cases %v, and then %d workloads", names, b.o.Workloads)
	}
	b.o.NoDaemon = true
	if ks := b.growthCases(); len(ks) != len(heldSizes) || len(ks[0].subjects) != 1 {
		t.Errorf("%d cases without a daemon", len(ks))
	}
}

// TestOneUpdate: the measurement of one update finds its change.
func TestOneUpdate(t *testing.T) {
	b := &bench{o: options{Workloads: 200, Services: 20}}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	o, err := b.oneUpdate(ctx)
	if err != nil || o["visible after, p50"] <= 0 || o["visible after, p99"] < o["visible after, p50"] {
		t.Errorf("%v %v", o, err)
	}
}
