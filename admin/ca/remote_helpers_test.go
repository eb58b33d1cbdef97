package ca

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"ztun/admin/istiod"
	"ztun/admin/pb/citadelpb"
	"ztun/proxy/identity"
	"ztun/test/pki"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func certPEM(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

// caServer is an istiod that issues from the fake CA, or answers what it is told.
type caServer struct {
	citadelpb.UnimplementedIstioCertificateServiceServer
	addr string
	root *pki.Authority

	mu       sync.Mutex
	cert     *tls.Certificate
	answer   func(*citadelpb.IstioCertificateRequest) ([]string, error) // nil: issue
	requests []*citadelpb.IstioCertificateRequest
	md       metadata.MD
	conns    int
}

func (s *caServer) CreateCertificate(ctx context.Context, req *citadelpb.IstioCertificateRequest) (
	*citadelpb.IstioCertificateResponse, error) {
	s.mu.Lock()
	s.requests = append(s.requests, proto.Clone(req).(*citadelpb.IstioCertificateRequest))
	s.md, _ = metadata.FromIncomingContext(ctx)
	answer := s.answer
	s.mu.Unlock()
	if answer == nil {
		answer = s.issue
	}
	chain, err := answer(req)
	return &citadelpb.IstioCertificateResponse{CertChain: chain}, err
}

// issue signs for the impersonated identity, or for sa "token" if there is none.
func (s *caServer) issue(req *citadelpb.IstioCertificateRequest) ([]string, error) {
	who, err := identity.Parse(req.GetMetadata().GetFields()["ImpersonatedIdentity"].GetStringValue())
	if err != nil {
		who = id("token")
	}
	return issueFor(who, req)
}

// issueFor signs for who, to the request's key.
func issueFor(who identity.ID, req *citadelpb.IstioCertificateRequest) ([]string, error) {
	block, rest := pem.Decode([]byte(req.Csr))
	if block == nil || block.Type != "CERTIFICATE REQUEST" || len(rest) != 0 {
		return nil, errors.New("no PEM request")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, err
	}
	san, err := identity.SANExtension(who)
	if err != nil {
		return nil, err
	}
	fake := NewFake()
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Duration(req.ValidityDuration) * time.Second),
		ExtraExtensions: []pkix.Extension{san},
	}, fake.cert, csr.PublicKey, fake.key)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return []string{string(certPEM(leaf)), string(certPEM(fake.cert))}, nil
}

// count is how many connections (TLS handshakes) and calls there were.
func (s *caServer) count() (conns, calls int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.conns, len(s.requests)
}

func (s *caServer) set(answer func(*citadelpb.IstioCertificateRequest) ([]string, error)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answer = answer
}

// use changes the root that the server's certificate comes from.
func (s *caServer) use(t testing.TB, r *pki.Authority) {
	cert := r.Issue(t, time.Hour, "127.0.0.1")
	s.mu.Lock()
	defer s.mu.Unlock()
	s.root, s.cert = r, &cert
}

func newCAServer(t testing.TB) *caServer {
	t.Helper()
	return startCAServer(t, "127.0.0.1:0")
}

func startCAServer(t testing.TB, addr string) *caServer {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	s := &caServer{addr: l.Addr().String()}
	s.use(t, pki.New(t))
	cfg := &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.conns++
		return s.cert, nil
	}}
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(cfg)))
	citadelpb.RegisterIstioCertificateServiceServer(g, s)
	done := make(chan struct{})
	go func() { defer close(done); g.Serve(l) }()
	t.Cleanup(func() { g.Stop(); <-done })
	return s
}

// remote makes a client of the server; more changes the way there. It looks at its files often.
func (s *caServer) remote(t testing.TB, impersonate bool, more func(*istiod.Options)) *Remote {
	t.Helper()
	o := istiod.Options{Address: s.addr, Roots: istiod.Roots{PEM: s.root.PEM()}}
	if more != nil {
		more(&o)
	}
	c, err := istiod.New(o)
	if err != nil {
		t.Fatal(err)
	}
	r := NewRemote(RemoteOptions{Connector: c, Impersonate: impersonate})
	r.wait.settle, r.wait.poll = 10*time.Millisecond, 50*time.Millisecond
	t.Cleanup(func() { r.Close() })
	return r
}

// ask asks for a certificate of an hour for sa "a".
func ask(t testing.TB, r *Remote) ([]*x509.Certificate, []*x509.Certificate, error) {
	t.Helper()
	_, csr, err := NewRequest(id("a"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	return r.Sign(ctx, id("a"), csr, time.Hour)
}

// runs does something in the background until the test ends.
func runs(t testing.TB, run func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// eventually waits for something that takes a moment.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("in vain waited for: %s", what)
		}
	}
}

func writeFile(t testing.TB, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// volume is a directory as Kubernetes mounts it: name -> ..data/name, ..data -> a directory that is swapped.
type volume struct {
	dir, name string
	n         int
}

func newVolume(t testing.TB, name string, data []byte) *volume {
	t.Helper()
	v := &volume{dir: t.TempDir(), name: name}
	v.swap(t, data)
	if err := os.Symlink(filepath.Join("..data", name), v.path()); err != nil {
		t.Fatal(err)
	}
	return v
}

func (v *volume) path() string { return filepath.Join(v.dir, v.name) }

func (v *volume) swap(t testing.TB, data []byte) {
	t.Helper()
	v.n++
	real := "..v" + string(rune('0'+v.n))
	err := os.Mkdir(filepath.Join(v.dir, real), 0o700)
	if err == nil {
		err = os.WriteFile(filepath.Join(v.dir, real, v.name), data, 0o600)
	}
	if err == nil {
		err = os.Symlink(real, filepath.Join(v.dir, "..data_tmp"))
	}
	if err == nil {
		err = os.Rename(filepath.Join(v.dir, "..data_tmp"), filepath.Join(v.dir, "..data"))
	}
	if err != nil {
		t.Fatal(err)
	}
}
