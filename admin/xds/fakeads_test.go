package xds

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"

	"ztun/admin/pb/discoverypb"
	"ztun/proxy/state"
)

// soon is how long tests wait for what should happen at once.
const soon = time.Minute

// ads is a scripted control plane: the test says what happens on each stream.
type ads struct {
	discoverypb.UnimplementedAggregatedDiscoveryServiceServer
	t       testing.TB
	lis     *bufconn.Listener
	srv     *grpc.Server
	streams chan *adsStream
	maxRecv int // of the client

	mu      sync.Mutex
	dialErr error
	ctxErr  error
	token   string
	conns   []net.Conn // the client's ends
	dials   int
}

// adsStream is one stream, in the hands of the test.
type adsStream struct {
	t    testing.TB
	s    grpc.BidiStreamingServer[discoverypb.DeltaDiscoveryRequest, discoverypb.DeltaDiscoveryResponse]
	reqs chan *discoverypb.DeltaDiscoveryRequest
	over chan error
}

func newADS(t testing.TB, o ...grpc.ServerOption) *ads {
	a := &ads{t: t, lis: bufconn.Listen(1 << 20), streams: make(chan *adsStream, 10), maxRecv: 200 << 20}
	a.srv = grpc.NewServer(o...)
	discoverypb.RegisterAggregatedDiscoveryServiceServer(a.srv, a)
	done := make(chan struct{})
	go func() { defer close(done); a.srv.Serve(a.lis) }()
	t.Cleanup(func() { a.srv.Stop(); <-done })
	return a
}

func (a *ads) DeltaAggregatedResources(s grpc.BidiStreamingServer[discoverypb.DeltaDiscoveryRequest,
	discoverypb.DeltaDiscoveryResponse]) error {
	st := &adsStream{t: a.t, s: s, reqs: make(chan *discoverypb.DeltaDiscoveryRequest, 1000), over: make(chan error, 1)}
	go func() { // ends with the stream
		for {
			r, err := s.Recv()
			if err != nil {
				return
			}
			select {
			case st.reqs <- r:
			case <-s.Context().Done():
				return
			}
		}
	}()
	select {
	case a.streams <- st:
	case <-s.Context().Done():
		return s.Context().Err()
	}
	select {
	case err := <-st.over:
		return err
	case <-s.Context().Done():
		return s.Context().Err()
	}
}

// Dial and Context make it a Connector.
func (a *ads) Dial() (*grpc.ClientConn, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.dials++
	if a.dialErr != nil {
		return nil, a.dialErr
	}
	return grpc.NewClient("passthrough:///bufnet", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			c, err := a.lis.DialContext(ctx)
			if err == nil {
				a.mu.Lock()
				a.conns = append(a.conns, c)
				a.mu.Unlock()
			}
			return c, err
		}), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(a.maxRecv)))
}

func (a *ads) Context(ctx context.Context) (context.Context, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.ctxErr != nil {
		return nil, a.ctxErr
	}
	if a.token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+a.token, "clusterid", "c1")
	}
	return ctx, nil
}

func (a *ads) set(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
}

// stream waits for the next stream.
func (a *ads) stream() *adsStream {
	a.t.Helper()
	select {
	case s := <-a.streams:
		return s
	case <-time.After(soon):
		a.t.Fatal("no stream")
		return nil
	}
}

// begin waits for the next stream and its two first requests.
func (a *ads) begin() (s *adsStream, address, policy *discoverypb.DeltaDiscoveryRequest) {
	a.t.Helper()
	s = a.stream()
	return s, s.recv(), s.recv()
}

func (s *adsStream) recv() *discoverypb.DeltaDiscoveryRequest {
	s.t.Helper()
	select {
	case r := <-s.reqs:
		return r
	case <-time.After(soon):
		s.t.Fatal("no request")
		return nil
	}
}

// quiet checks that no request comes for a moment.
func (s *adsStream) quiet() {
	s.t.Helper()
	select {
	case r := <-s.reqs:
		s.t.Fatal("a request too many:", r)
	case <-time.After(50 * time.Millisecond):
	}
}

func (s *adsStream) send(r *discoverypb.DeltaDiscoveryResponse) {
	s.t.Helper()
	if err := s.s.Send(r); err != nil {
		s.t.Fatal(err)
	}
}

// exchange sends a response and returns the reply.
func (s *adsStream) exchange(r *discoverypb.DeltaDiscoveryResponse) *discoverypb.DeltaDiscoveryRequest {
	s.t.Helper()
	s.send(r)
	return s.recv()
}

// accepted sends a response and checks that it is ACKed.
func (s *adsStream) accepted(r *discoverypb.DeltaDiscoveryResponse) {
	s.t.Helper()
	got := s.exchange(r)
	if got.ErrorDetail != nil || got.TypeUrl != r.TypeUrl || got.ResponseNonce != r.Nonce {
		s.t.Fatalf("%v in reply to %v", got, r.Nonce)
	}
}

func (s *adsStream) end(err error) { s.over <- err }

// runningClient is a client at work.
type runningClient struct {
	*Client
	t      testing.TB
	views  chan published
	synced chan struct{}
	cancel func()

	mu     sync.Mutex
	pauses []time.Duration
}

type published struct {
	v        *state.View
	policies bool
}

// run starts a client that does not really wait between streams.
func run(t testing.TB, a *ads, change ...func(*Client)) *runningClient {
	r := &runningClient{t: t, views: make(chan published, 1000), synced: make(chan struct{}, 10)}
	r.Client = NewClient(ClientOptions{
		Connector: a, Node: NewNode(NodeInfo{IP: "10.0.0.9", Pod: "zt", Namespace: "istio-system", NodeName: "node-1"}),
		Publish: func(v *state.View, policies bool) { r.views <- published{v, policies} },
		Synced:  func() { r.synced <- struct{}{} },
	})
	r.pause = func(ctx context.Context, d time.Duration, _ <-chan struct{}) {
		r.mu.Lock()
		r.pauses = append(r.pauses, d)
		r.mu.Unlock()
		sleep(ctx, time.Millisecond, nil)
	}
	r.Client.pauses = newPauses(func(int64) int64 { return 0 })
	for _, f := range change {
		f(r.Client)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- r.Run(ctx) }()
	r.cancel = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(soon):
			t.Error("Run does not end")
		}
	})
	t.Cleanup(r.cancel)
	return r
}

// view waits for the next View.
func (r *runningClient) next() published {
	r.t.Helper()
	select {
	case p := <-r.views:
		return p
	case <-time.After(soon):
		r.t.Fatal("no view")
		return published{}
	}
}

func (r *runningClient) nothingPublished() {
	r.t.Helper()
	select {
	case p := <-r.views:
		w, s, n := p.v.Counts()
		r.t.Fatalf("published %d workloads, %d services, %d policies", w, s, n)
	case <-time.After(50 * time.Millisecond):
	}
}

func (r *runningClient) waited() []time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]time.Duration(nil), r.pauses...)
}

// eventually waits until something is so.
func (r *runningClient) eventually(what string, f func(ClientStats) bool) {
	r.t.Helper()
	r.within(what, func() bool { return f(r.Stats()) })
}

func (r *runningClient) within(what string, f func() bool) {
	r.t.Helper()
	for end := time.Now().Add(soon); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatalf("%s: %+v", what, r.Stats())
		}
	}
}

var errTest = errors.New("made by the test")
