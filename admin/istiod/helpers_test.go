package istiod

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"ztun/admin/pb/citadelpb"
)

// files writes a certificate and its key.
func files(t testing.TB, c tls.Certificate) (cert, key string) {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return file(t, "cert.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]})),
		file(t, "key.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

func file(t testing.TB, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	write(t, path, data)
	return path
}

func write(t testing.TB, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// server is a control plane whose one call answers what it is told and remembers what it saw.
type server struct {
	citadelpb.UnimplementedIstioCertificateServiceServer
	addr string

	mu     sync.Mutex
	answer []string
	err    error
	md     metadata.MD
	sni    []string
	state  tls.ConnectionState
}

func (s *server) CreateCertificate(ctx context.Context, _ *citadelpb.IstioCertificateRequest) (
	*citadelpb.IstioCertificateResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.md, _ = metadata.FromIncomingContext(ctx)
	return &citadelpb.IstioCertificateResponse{CertChain: s.answer}, s.err
}

// saw returns the metadata of the last call.
func (s *server) saw(key string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Join(s.md.Get(key), "|")
}

// serve starts a server on 127.0.0.1 with this configuration, h2 added.
func serve(t testing.TB, cfg *tls.Config) *server {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &server{addr: l.Addr().String(), answer: []string{"fine"}}
	cfg = cfg.Clone()
	cfg.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.sni = append(s.sni, h.ServerName)
		return nil, nil
	}
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.state = cs
		return nil
	}
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(cfg)))
	citadelpb.RegisterIstioCertificateServiceServer(g, s)
	done := make(chan struct{})
	go func() { defer close(done); g.Serve(l) }()
	t.Cleanup(func() { g.Stop(); <-done })
	return s
}

// call makes a channel and one call on it.
func call(t testing.TB, o Options) (string, error) {
	t.Helper()
	c, err := New(o)
	if err != nil {
		return "", err
	}
	return callOn(t, c)
}

func callOn(t testing.TB, c *Connector) (string, error) {
	t.Helper()
	conn, err := c.Dial()
	if err != nil {
		return "", err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if ctx, err = c.Context(ctx); err != nil {
		return "", err
	}
	resp, err := citadelpb.NewIstioCertificateServiceClient(conn).CreateCertificate(ctx,
		&citadelpb.IstioCertificateRequest{Csr: "csr"})
	if err != nil {
		return "", said{err}
	}
	return strings.Join(resp.CertChain, ""), nil
}

// said is a call's error in words: code and message of its status, and what we know of it.
type said struct{ error }

func (e said) Unwrap() error { return e.error }
func (e said) Error() string {
	s := status.Convert(e.error)
	return fmt.Sprintf("status: %s, message: %q%s", s.Code(), s.Message(), Hint(s.Message()))
}
