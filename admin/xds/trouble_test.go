package xds

import (
	"context"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"ztun/admin/backoff"
	"ztun/admin/pb/discoverypb"
	"ztun/proxy/state"
)

// A server that accepts streams and says nothing, or only half of it: the stream
// is given up and tried again, and the last View stays.
func TestStall(t *testing.T) {
	defer goleak.VerifyNone(t)
	a := newADS(t)
	defer a.srv.Stop()
	r := run(t, a, func(c *Client) { c.limits.first = time.Second })
	defer r.cancel()
	// On a busy machine more streams are given up than the test means to be: each loop goes on with the newest.
	a.begin() // mute
	s, _, _ := a.begin()
	if st := r.Stats(); st.Stalls < 1 || st.Terminations["ConnectionError"] < 1 ||
		!strings.Contains(st.LastError, "no response for "+TypeAddress+" and "+TypeAuthorization) {
		t.Errorf("%+v", st)
	}
	var addr *discoverypb.DeltaDiscoveryRequest
	for half := "no response for " + TypeAuthorization + " within"; !strings.Contains(r.Stats().LastError, half); {
		s.s.Send(addresses(pod(0)))
		s, addr, _ = a.begin()
	}
	if st := r.Stats(); st.Stalls < 2 || st.Terminations["Error"] < 1 {
		t.Errorf("%+v", st)
	}
	if len(addr.InitialResourceVersions) != 1 || r.view.Load().WorkloadByUID(pod(0).Name) == nil {
		t.Error("state lost")
	}
	for synced := false; !synced; {
		s.s.Send(policies())
		select {
		case <-r.synced:
			synced = true
		case s = <-a.streams:
			s.recv()
			s.recv()
		case <-time.After(soon):
			t.Fatal("never synced")
		}
	}
	s.recv()
	// Everything has been heard of: silence is a quiet mesh.
	before := r.Stats().Stalls
	time.Sleep(r.limits.first * 3 / 2)
	s.accepted(addresses(pod(1)))
	if st := r.Stats(); st.Stalls != before || !st.Connected {
		t.Errorf("%+v", st)
	}
}

// Silence without end: one day the client looks anew.
func TestSilence(t *testing.T) {
	a := newADS(t)
	r := run(t, a, func(c *Client) { c.limits.silence = 100 * time.Millisecond })
	s, _, _ := a.begin()
	s.send(addresses(pod(0)))
	s.send(policies())
	<-r.synced
	_, addr, _ := a.begin()
	if st := r.Stats(); st.Terminations["Reconnect"] < 1 || st.Stalls != 0 || len(addr.InitialResourceVersions) != 1 {
		t.Errorf("%+v", st)
	}
}

// dialer is a Connector to whatever answers.
type dialer func() (net.Conn, error)

func (d dialer) Dial() (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///x", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return d() }))
}

func (d dialer) Context(ctx context.Context) (context.Context, error) { return ctx, nil }

// Something that takes connections and never answers, and something that speaks
// another protocol.
func TestNotAServer(t *testing.T) {
	for name, answer := range map[string]func(net.Conn){
		"mute":    func(c net.Conn) { io.Copy(io.Discard, c) },
		"HTTP":    func(c net.Conn) { io.WriteString(c, "HTTP/1.1 400 Bad Request\r\n\r\n"); c.Close() },
		"garbage": func(c net.Conn) { c.Write(make([]byte, 1<<16)); c.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			c := NewClient(ClientOptions{Connector: dialer(func() (net.Conn, error) {
				mine, theirs := net.Pipe()
				go io.Copy(io.Discard, theirs) // the client's own greeting
				go answer(theirs)
				return mine, nil
			})})
			if c.limits.open = soon; name == "mute" {
				c.limits.open = 100 * time.Millisecond
			}
			var pauses atomic.Int32
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			c.pause = func(context.Context, time.Duration, <-chan struct{}) {
				if pauses.Add(1) == 3 {
					cancel()
				}
			}
			done := make(chan error)
			go func() { done <- c.Run(ctx) }()
			select {
			case err := <-done:
				if err != nil {
					t.Fatal(err)
				}
			case <-time.After(soon):
				t.Fatal("hangs")
			}
			if st := c.Stats(); st.Terminations["ConnectionError"] != 3 || (name == "mute") != (st.Stalls == 3) {
				t.Errorf("%+v", st)
			}
		})
	}
}

// A server that does not take requests: the client does not wait for ever.
func TestServerDoesNotRead(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
		<-s.Context().Done()
		return nil
	}))
	go srv.Serve(lis)
	defer srv.Stop()
	c := NewClient(ClientOptions{Connector: dialer(func() (net.Conn, error) {
		return net.Dial("tcp", lis.Addr().String())
	})})
	c.limits.send = 100 * time.Millisecond
	for i := range 5000 {
		c.store.kept[TypeAddress].set(fmt.Sprint(i, strings.Repeat("x", 200)), nil)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	c.pause = func(context.Context, time.Duration, <-chan struct{}) { cancel() }
	if err := c.Run(ctx); err != nil {
		t.Fatal(err)
	}
	if st := c.Stats(); st.Stalls != 1 || !strings.Contains(st.LastError, "did not take a request") {
		t.Errorf("%+v", st)
	}
}

// rawCodec lets a server send bytes as they are.
type rawCodec struct{}

func (rawCodec) Name() string { return "raw" }
func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	if b, ok := v.([]byte); ok {
		return mem.BufferSlice{mem.SliceBuffer(b)}, nil
	}
	b, err := proto.Marshal(v.(proto.Message))
	return mem.BufferSlice{mem.SliceBuffer(b)}, err
}
func (rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	return proto.Unmarshal(data.Materialize(), v.(proto.Message))
}

// Messages that are no messages end the stream; what was known stays.
func TestGarbage(t *testing.T) {
	valid := marshal(t, addresses(pod(0)))
	for name, junk := range map[string][]byte{
		"zeros": make([]byte, 100), "cut off": valid[:len(valid)-1], "text": []byte("HTTP/1.1 404 Not Found\r\n"),
		"length": {0x12, 0xff, 0xff, 0xff, 0xff, 0x7f}, "type not text": {0x22, 2, 0xff, 0xfe},
	} {
		t.Run(name, func(t *testing.T) {
			a := newADS(t, grpc.ForceServerCodecV2(rawCodec{}))
			r := run(t, a)
			s, _, _ := a.begin()
			s.accepted(addresses(pod(0)))
			r.next()
			if err := s.s.SendMsg(junk); err != nil {
				t.Fatal(err)
			}
			s, addr, _ := a.begin()
			if st := r.Stats(); st.Terminations["Error"] != 1 ||
				!strings.Contains(st.LastError, "not a DeltaDiscoveryResponse") || st.Panics != 0 {
				t.Errorf("%+v", st)
			}
			if len(addr.InitialResourceVersions) != 1 {
				t.Error(addr)
			}
			r.nothingPublished()
			s.accepted(addresses(pod(1)))
			if w, _, _ := r.next().v.Counts(); w != 2 {
				t.Error(w)
			}
		})
	}
}

// checklist 33: 150 MiB are accepted, more than the bound ends the stream.
func TestLargeMessages(t *testing.T) {
	// Blown up by a field that nobody reads.
	big := func(n int) []byte {
		b := marshal(t, addresses(pod(0)))
		b = protowire.AppendVarint(protowire.AppendTag(b, 1, protowire.BytesType), uint64(n))
		return append(b, make([]byte, n)...)
	}
	a := newADS(t, grpc.ForceServerCodecV2(rawCodec{}))
	r := run(t, a)
	s, _, _ := a.begin()
	if err := s.s.SendMsg(big(150 << 20)); err != nil {
		t.Fatal(err)
	}
	if got := s.recv(); got.ErrorDetail != nil || got.ResponseNonce != "n" {
		t.Fatal(got)
	}
	r.next()
	go s.s.SendMsg(big(201 << 20)) // fails when the client has hung up
	s, _, _ = a.begin()
	if st := r.Stats(); st.Terminations["Error"] != 1 || !strings.Contains(st.LastError, "(hint: the mesh is larger") {
		t.Errorf("%+v", st)
	}
	s.accepted(addresses(pod(1)))
	if w, _, _ := r.next().v.Counts(); w != 2 {
		t.Error(w)
	}
}

// While nobody takes the Views nothing is read, so that a server that floods has
// to wait; then everything arrives.
func TestFlood(t *testing.T) {
	a := newADS(t)
	gate := make(chan struct{})
	var latest atomic.Pointer[state.View]
	r := run(t, a, func(c *Client) {
		c.o.Publish = func(v *state.View, _ bool) {
			<-gate
			latest.Store(v)
		}
	})
	s, _, _ := a.begin()
	const n = 200
	payload := strings.Repeat("x", 256<<10)
	var sent atomic.Int32
	done := make(chan error, 1)
	go func() {
		for i := range n {
			w := meshPod(i)
			w.Hostname = payload
			if err := s.s.Send(addresses(workloadResource(w, "1"))); err != nil {
				done <- err
				return
			}
			sent.Add(1)
		}
		done <- nil
	}()
	// 50 MiB want in; windows are at most 16 MiB.
	for before := int32(-1); before != sent.Load() || before == 0; time.Sleep(200 * time.Millisecond) {
		before = sent.Load()
	}
	if got := sent.Load(); got == n || got == 0 {
		t.Errorf("%d messages taken while nobody uses them", got)
	}
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	t.Logf("%d of %d messages on their way, heap %d MiB", sent.Load(), n, m.HeapAlloc>>20)
	close(gate)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	r.eventually("everything arrives", func(st ClientStats) bool { return st.Messages[TypeAddress] == n })
	for range n {
		if s.recv().ErrorDetail != nil {
			t.Fatal("refused")
		}
	}
	if w, _, _ := latest.Load().Counts(); w != n {
		t.Error(w)
	}
}

// Many tiny resources cost time in proportion to their bytes, not memory.
func TestTinyResources(t *testing.T) {
	raw := marshal(t, &discoverypb.DeltaDiscoveryResponse{TypeUrl: TypeAddress, Nonce: "n"})
	for range 1 << 20 {
		raw = append(raw, 0x12, 0) // a resource without anything
	}
	m, err := parseMessage(raw)
	if err != nil {
		t.Fatal(err)
	}
	s := newStore("", nil)
	before := heap()
	a := s.apply(&m)
	if grown := int64(heap()) - int64(before); grown > 2<<20 || a.refused != 1<<20 || len(a.nack) > maxNack+4096 {
		t.Errorf("%d bytes, %d refused, NACK of %d bytes", grown, a.refused, len(a.nack))
	}
}

// A panic while a response is taken over: the stream is dropped, the last View
// stays until all has arrived again, then all of it is there.
func TestPanic(t *testing.T) {
	a := newADS(t)
	var boom atomic.Bool
	r := run(t, a, func(c *Client) {
		publish := c.o.Publish
		c.o.Publish = func(v *state.View, policies bool) {
			if boom.Swap(false) {
				panic("boom")
			}
			publish(v, policies)
		}
	})
	s, _, _ := a.begin()
	s.accepted(addresses(pod(0), pod(1)))
	s.accepted(policies(policyResource("ns/p")))
	r.next()
	before := r.next().v
	<-r.synced
	boom.Store(true)
	s.send(addresses(pod(2)))
	s, addr, pol := a.begin()
	if st := r.Stats(); st.Panics != 1 || st.Terminations["Error"] != 1 || !strings.Contains(st.LastError, "panic: boom") {
		t.Errorf("%+v", st)
	}
	if r.view.Load() != before {
		t.Error("the last View did not stay")
	}
	// Everything is asked for again, by name.
	for name, v := range addr.InitialResourceVersions {
		if v != "" {
			t.Error(name, v)
		}
	}
	if len(addr.InitialResourceVersions) != 3 || len(pol.InitialResourceVersions) != 1 {
		t.Error(addr, pol)
	}
	// Workloads without their policies are not shown.
	s.accepted(&discoverypb.DeltaDiscoveryResponse{TypeUrl: TypeAddress, Nonce: "n",
		Resources: []*discoverypb.Resource{pod(0), pod(2)}, RemovedResources: []string{pod(1).Name}})
	r.nothingPublished()
	s.accepted(policies(policyResource("ns/p")))
	p := r.next()
	if w, _, n := p.v.Counts(); w != 2 || n != 1 || !p.policies {
		t.Error(w, n, p.policies)
	}
	s.accepted(addresses(pod(3)))
	if w, _, _ := r.next().v.Counts(); w != 3 {
		t.Error(w)
	}
	select {
	case <-r.synced:
		t.Error("Synced twice")
	default:
	}
}

// A Connector that panics costs its attempt only.
func TestConnectorPanics(t *testing.T) {
	a := newADS(t)
	n := 0
	r := run(t, a, func(c *Client) { c.o.Connector = panicking{a, &n} })
	s, _, _ := a.begin()
	s.accepted(addresses(pod(0)))
	if st := r.Stats(); st.Panics != 1 {
		t.Errorf("%+v", st)
	}
}

type panicking struct {
	*ads
	n *int
}

func (p panicking) Dial() (*grpc.ClientConn, error) {
	if *p.n++; *p.n == 1 {
		panic("boom")
	}
	return p.ads.Dial()
}

// Run ends while the client waits in whatever state.
func TestRunEnds(t *testing.T) {
	defer goleak.VerifyNone(t)
	for name, until := range map[string]func(a *ads, r *runningClient){
		"at once": func(*ads, *runningClient) {},
		"mute":    func(a *ads, _ *runningClient) { a.begin() },
		"at work": func(a *ads, _ *runningClient) { s, _, _ := a.begin(); s.accepted(addresses(pod(0))) },
		"waiting": func(a *ads, r *runningClient) {
			a.stream().end(errTest)
			r.eventually("waits", func(st ClientStats) bool { return st.Terminations["ConnectionError"] > 0 })
		},
	} {
		a := newADS(t)
		r := run(t, a, func(c *Client) {
			c.pause = func(ctx context.Context, _ time.Duration, _ <-chan struct{}) { sleep(ctx, time.Hour, nil) }
		})
		until(a, r)
		r.cancel()
		if r.Stats().Connected {
			t.Error(name, "still connected")
		}
		a.srv.Stop()
	}
}

// TestWokenPause: who needs the control plane now does not wait for the end of a long pause, and cannot make it a short
// one either.
func TestWokenPause(t *testing.T) {
	for _, c := range []struct {
		name           string
		pause, at, end time.Duration
	}{
		{"nobody", backoff.Max, -1, backoff.Max},
		{"at once", backoff.Max, 0, wokenPause},
		{"later", backoff.Max, 7 * time.Second, 7 * time.Second},
		{"a short one", 20 * time.Millisecond, time.Millisecond, 20 * time.Millisecond},
	} {
		synctest.Test(t, func(t *testing.T) {
			client := NewClient(ClientOptions{})
			if c.at >= 0 {
				time.AfterFunc(c.at, client.Retry)
			}
			start := time.Now()
			client.pause(t.Context(), c.pause, client.demands.kick)
			if d := time.Since(start); d != c.end {
				t.Errorf("%s: %v, want %v", c.name, d, c.end)
			}
		})
	}
}
