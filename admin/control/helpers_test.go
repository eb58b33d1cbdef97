package control

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"ztun/admin/pb/discoverypb"
	"ztun/admin/xds"
	"ztun/proxy/state"
	"ztun/tun/replace"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what has to happen: long, the machine may be busy.
const patience = 20 * time.Second

// quiet is how long a test waits to see that nothing happens.
const quiet = 150 * time.Millisecond

// eventually waits for a condition.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// logBuffer collects log lines.
type logBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// world is a control plane on loopback with node-a and node-b joined.
type world struct {
	t    *testing.T
	dir  string
	srv  *Server
	addr string
	log  *logBuffer
	stop func() error
}

// start makes a control plane with these files below mesh/.
func start(t *testing.T, files map[string]string, change func(*limits)) *world {
	t.Helper()
	w := &world{t: t, dir: filepath.Join(t.TempDir(), "c"), log: &logBuffer{}}
	check(t, Init(w.dir, "cluster.local"))
	check(t, os.Remove(filepath.Join(w.dir, meshDir, "example.yaml")))
	for name, text := range files {
		w.write(name, text)
	}
	w.join("node-a")
	w.join("node-b")
	l := defaultLimits()
	l.rescan = 50 * time.Millisecond
	if change != nil {
		change(&l)
	}
	w.serve(l, "127.0.0.1:0")
	t.Cleanup(func() { check(t, w.stop()) })
	return w
}

// serve starts the server.
func (w *world) serve(l limits, listen string) {
	w.t.Helper()
	srv, err := newServer(w.t.Context(), Options{
		Dir: w.dir, Listen: []string{listen}, Hosts: []string{"control.test"}, Admin: "127.0.0.1:0",
		Logger: slog.New(slog.NewTextHandler(w.log, nil)),
	}, l)
	check(w.t, err)
	srv.source.settle, srv.source.poll = 10*time.Millisecond, 100*time.Millisecond
	w.srv, w.addr = srv, srv.Addrs()[0].String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Run(ctx) }()
	w.stop = sync.OnceValue(func() error {
		cancel()
		return <-done
	})
}

func (w *world) write(name, text string) {
	w.t.Helper()
	path := filepath.Join(w.dir, meshDir, name)
	check(w.t, os.MkdirAll(filepath.Dir(path), 0o755))
	check(w.t, replace.File(path, 0o644, []byte(text)))
}

func (w *world) creds(node string) string { return filepath.Join(w.dir, "creds", node) }

func (w *world) join(node string) {
	w.t.Helper()
	_, err := Join(w.t.Context(), JoinOptions{Dir: w.dir, Node: node, Out: w.creds(node), Renew: true})
	check(w.t, err)
}

func (w *world) token(node string) string {
	w.t.Helper()
	b, err := os.ReadFile(filepath.Join(w.creds(node), TokenFile))
	check(w.t, err)
	return string(b)
}

// tls is a client's configuration; with a node's name it presents that node's certificate.
func (w *world) tls(node string) *tls.Config {
	w.t.Helper()
	roots, err := os.ReadFile(filepath.Join(w.dir, caDir, RootFile))
	check(w.t, err)
	c := &tls.Config{RootCAs: x509.NewCertPool()}
	c.RootCAs.AppendCertsFromPEM(roots)
	if node != "" {
		pair, err := tls.LoadX509KeyPair(filepath.Join(w.creds(node), CertFile), filepath.Join(w.creds(node), KeyFile))
		check(w.t, err)
		c.Certificates = []tls.Certificate{pair}
	}
	return c
}

func (w *world) dial(c *tls.Config, o ...grpc.DialOption) *grpc.ClientConn {
	w.t.Helper()
	cc, err := grpc.NewClient(w.addr, append(o, grpc.WithTransportCredentials(credentials.NewTLS(c)))...)
	check(w.t, err)
	w.t.Cleanup(func() { cc.Close() })
	return cc
}

// withToken adds a token to a call.
func withToken(ctx context.Context, token string) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
}

// client drives one stream by hand.
type client struct {
	t      *testing.T
	rpc    grpc.BidiStreamingClient[discoverypb.DeltaDiscoveryRequest, discoverypb.DeltaDiscoveryResponse]
	cancel context.CancelFunc
	node   *discoverypb.Node
	got    chan *discoverypb.DeltaDiscoveryResponse
	err    chan error
}

func nodeOf(name string) *discoverypb.Node {
	return &discoverypb.Node{Id: "ztunnel~10.0.0.9~zt.istio-system~istio-system.svc.cluster.local",
		Metadata: &structpb.Struct{
			Fields: map[string]*structpb.Value{"NODE_NAME": structpb.NewStringValue(name)},
		}}
}

// connect opens a stream of a node, by token.
func (w *world) connect(node string) *client {
	w.t.Helper()
	return w.open(w.dial(w.tls("")), withToken(context.Background(), w.token(node)), node)
}

func (w *world) open(cc *grpc.ClientConn, ctx context.Context, node string) *client {
	w.t.Helper()
	ctx, cancel := context.WithCancel(ctx)
	rpc, err := discoverypb.NewAggregatedDiscoveryServiceClient(cc).DeltaAggregatedResources(ctx)
	check(w.t, err)
	c := &client{t: w.t, rpc: rpc, cancel: cancel, node: nodeOf(node), got: make(chan *discoverypb.DeltaDiscoveryResponse),
		err: make(chan error, 1)}
	go func() {
		for {
			m, err := rpc.Recv()
			if err != nil {
				c.err <- err
				return
			}
			select {
			case c.got <- m:
			case <-ctx.Done():
				c.err <- ctx.Err()
				return
			}
		}
	}()
	w.t.Cleanup(cancel)
	return c
}

func (c *client) send(req *discoverypb.DeltaDiscoveryRequest) {
	c.t.Helper()
	if err := c.rpc.Send(req); err != nil && !errors.Is(err, io.EOF) { // EOF: the error is Recv's
		c.t.Fatal(err)
	}
}

// begin sends the first request of a type.
func (c *client) begin(url string, initial map[string]string) {
	c.t.Helper()
	c.send(&discoverypb.DeltaDiscoveryRequest{Node: c.node, TypeUrl: url, InitialResourceVersions: initial})
}

func (c *client) recv() *discoverypb.DeltaDiscoveryResponse {
	c.t.Helper()
	select {
	case m := <-c.got:
		return m
	case err := <-c.err:
		c.t.Fatalf("the stream ended: %v", err)
	case <-time.After(patience):
		c.t.Fatal("no message")
	}
	return nil
}

func (c *client) ack(m *discoverypb.DeltaDiscoveryResponse) {
	c.t.Helper()
	c.send(&discoverypb.DeltaDiscoveryRequest{TypeUrl: m.TypeUrl, ResponseNonce: m.Nonce})
}

func (c *client) nack(m *discoverypb.DeltaDiscoveryResponse, text string) {
	c.t.Helper()
	c.send(&discoverypb.DeltaDiscoveryRequest{TypeUrl: m.TypeUrl, ResponseNonce: m.Nonce,
		ErrorDetail: &discoverypb.Status{Message: text}})
}

// silent fails if a message arrives.
func (c *client) silent() {
	c.t.Helper()
	select {
	case m := <-c.got:
		c.t.Fatalf("unexpected message: %v", m)
	case err := <-c.err:
		c.t.Fatalf("the stream ended: %v", err)
	case <-time.After(quiet):
	}
}

// fails waits for the end of the stream with a code and a text.
func (c *client) fails(code codes.Code, text string) {
	c.t.Helper()
	select {
	case m := <-c.got:
		c.t.Fatalf("a message instead of the error %v: %v", code, m)
	case err := <-c.err:
		wantStatus(c.t, err, code, text)
	case <-time.After(patience):
		c.t.Fatalf("no error, want %v", code)
	}
}

func wantStatus(t *testing.T, err error, code codes.Code, text string) {
	t.Helper()
	if s := status.Convert(err); s.Code() != code || !strings.Contains(s.Message(), text) {
		t.Fatalf("got %v: %s; want %v: ...%s...", s.Code(), s.Message(), code, text)
	}
}

func names(m *discoverypb.DeltaDiscoveryResponse) string {
	var l []string
	for _, r := range m.Resources {
		l = append(l, r.Name)
	}
	slices.Sort(l)
	return strings.Join(l, " ")
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func equal[T comparable](t testing.TB, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Fatalf("%s: got %v, want %v", what, got, want)
	}
}

func parse(t testing.TB, text string) *xds.Local {
	t.Helper()
	l, err := xds.ParseLocal([]byte(text))
	check(t, err)
	return l
}

// fromLocal makes a file of values. It takes l over.
func fromLocal(t testing.TB, name string, l *xds.Local) *file {
	t.Helper()
	f := &file{path: name, local: l, lines: map[string][]int{}}
	check(t, f.encode(defaultTrustDomain))
	return f
}

// snapshotOf builds a snapshot that has to be good.
func snapshotOf(t testing.TB, prev *snapshot, files ...*file) *snapshot {
	t.Helper()
	s, errs, _ := build(files, prev, defaultTrustDomain, 3<<20, nil)
	if errs.count > 0 {
		t.Fatal(errs.list)
	}
	return s
}

// workloadsYAML is a file with one workload per name:ip:node.
func workloadsYAML(specs ...string) string {
	b := &strings.Builder{}
	b.WriteString("workloads:\n")
	for _, s := range specs {
		p := strings.Split(s, ":")
		fmt.Fprintf(b, "- {uid: u/%s, name: %s, namespace: ns, serviceAccount: sa-%s, workloadIps: [%s], node: %s, "+
			"protocol: HBONE, services: {}}\n", p[0], p[0], p[0], p[1], p[2])
	}
	return b.String()
}

// crowd makes n workloads and n/10 services.
func crowd(n int) *xds.Local {
	l := &xds.Local{}
	for i := range n / 10 {
		l.Services = append(l.Services, &state.Service{
			Name: fmt.Sprint("svc-", i), Namespace: "crowd", Hostname: fmt.Sprintf("svc-%d.crowd.svc.cluster.local", i),
			VIPs: []state.NetworkAddress{{Addr: addr4(0x0ac80000 + i)}}, Ports: state.PortMap{{Service: 80, Target: 8080}},
		})
	}
	for i := range n {
		name := fmt.Sprintf("pod-%d-7d9f6c5b8-x2k4z", i)
		l.Workloads = append(l.Workloads, &state.Workload{
			UID: "Kubernetes//Pod/crowd/" + name, Name: name, Namespace: "crowd", ServiceAccount: fmt.Sprint("sa-", i%50),
			Node:         fmt.Sprint("node-", i%500),
			WorkloadName: "deployment-name", CanonicalName: "deployment-name", CanonicalRevision: "latest",
			Protocol: state.HBONE, Capacity: 1,
			Addresses: nil, Locality: state.Locality{Region: "region-1", Zone: "zone-a"},
			Services: []state.WorkloadService{
				{Service: state.ServiceKey{Namespace: "crowd", Hostname: fmt.Sprintf("svc-%d.crowd.svc.cluster.local",
					i/10%max(1, n/10))}, Ports: state.PortMap{{Service: 80, Target: 8080}}}},
		})
		l.Workloads[i].Addresses = append(l.Workloads[i].Addresses, addr4(0x0a000000+i))
	}
	return l
}
