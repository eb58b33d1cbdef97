package ca

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"maps"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"ztun/admin/istiod"
	"ztun/admin/pb/citadelpb"
	"ztun/proxy/identity"
	"ztun/test/pki"
)

// TestRemoteShared: a manager that impersonates, spec/controlplane.md checklist 15, 34, 35; dataplane.md 125-127, 132.
func TestRemoteShared(t *testing.T) {
	for ttl, seconds := range map[time.Duration]int64{0: 86400, 90 * time.Minute: 5400} {
		s := newCAServer(t)
		r := s.remote(t, true, func(o *istiod.Options) {
			o.Token.Literal, o.ClusterID, o.Headers = "tok", "c1", [][2]string{{"FOO", "bar"}}
		})
		m := NewManager(ManagerOptions{Signer: r, TTL: ttl})
		runs(t, r.Run)
		runs(t, m.Run)
		who := []identity.ID{id("a"), id("b"), {TrustDomain: "other.example", Namespace: "n", ServiceAccount: "s"}}
		var all sync.WaitGroup
		for _, want := range who {
			all.Go(func() {
				c, err := m.Certificate(t.Context(), want)
				if err != nil || c.ID != want || len(c.Roots) != 1 {
					t.Errorf("%v: %v, %v", want, c, err)
				}
			})
		}
		all.Wait()
		if conns, calls := s.count(); conns != 1 || calls != 3 {
			t.Errorf("%d connections, %d calls", conns, calls)
		}
		asked := map[string]bool{}
		for _, req := range s.requests {
			if f := req.Metadata.GetFields(); req.ValidityDuration != seconds || len(f) != 1 {
				t.Errorf("%v", req)
			}
			name := req.Metadata.Fields["ImpersonatedIdentity"].GetStringValue()
			asked[name] = true
			block, _ := pem.Decode([]byte(req.Csr))
			csr, err := x509.ParseCertificateRequest(block.Bytes)
			if err != nil || len(csr.Subject.Names) != 0 || len(csr.Extensions) != 1 || !csr.Extensions[0].Critical ||
				len(csr.URIs) != 1 || csr.URIs[0].String() != name {
				t.Errorf("%+v, %v", csr, err)
			} else if key, ok := csr.PublicKey.(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P256() ||
				csr.SignatureAlgorithm != x509.ECDSAWithSHA256 {
				t.Errorf("%T %v", csr.PublicKey, csr.SignatureAlgorithm)
			}
		}
		if want := map[string]bool{who[0].String(): true, who[1].String(): true, who[2].String(): true}; !maps.Equal(
			asked, want) {
			t.Errorf("asked for %v", asked)
		}
		if got := strings.Join(append(append(s.md.Get("authorization"), s.md.Get("clusterid")...), s.md.Get("foo")...),
			"|"); got != "Bearer tok|c1|bar" {
			t.Errorf("headers %q", got)
		}
		if st := r.Stats(); st.Requests != 3 || len(st.Failures) != 0 || st.Channels != 1 || st.LastSuccess.IsZero() ||
			st.LastError != "" {
			t.Errorf("%+v", st)
		}
	}
}

// TestRemoteDedicated: no name is asked for, and what comes is taken. Checklist 35, dataplane.md 126.
func TestRemoteDedicated(t *testing.T) {
	s := newCAServer(t)
	m := NewManager(ManagerOptions{Signer: struct{ Signer }{s.remote(t, false, nil)}, AnyIdentity: true})
	runs(t, m.Run)
	c, err := m.Certificate(t.Context(), id("a"))
	if err != nil || c.ID != id("token") {
		t.Fatalf("%v, %v", c, err)
	}
	if s.requests[0].Metadata != nil {
		t.Errorf("%v", s.requests[0].Metadata)
	}
}

// TestRemoteAnswers: what an answer may not be. Checklist 35, dataplane.md 133.
func TestRemoteAnswers(t *testing.T) {
	s := newCAServer(t)
	r := s.remote(t, true, nil)
	good := func(req *citadelpb.IstioCertificateRequest) []string {
		chain, err := issueFor(id("a"), req)
		if err != nil {
			t.Error(err)
		}
		return chain
	}
	for name, c := range map[string]struct {
		answer func(*citadelpb.IstioCertificateRequest) ([]string, error)
		class  string
		want   string
	}{
		"nothing": {func(*citadelpb.IstioCertificateRequest) ([]string, error) { return nil, nil }, "answer",
			"chain returned from CA is empty for: spiffe://cluster.local/ns/default/sa/a"},
		"no root": {func(req *citadelpb.IstioCertificateRequest) ([]string, error) { return good(req)[:1], nil }, "answer",
			"no root certificate present in the chain returned from CA for: spiffe://cluster.local/ns/default/sa/a"},
		"garbage for a root": {func(req *citadelpb.IstioCertificateRequest) ([]string, error) {
			return []string{good(req)[0], "x"}, nil
		}, "answer",
			"no root certificate present in the chain returned from CA for: spiffe://cluster.local/ns/default/sa/a"},
		"garbage for a leaf": {func(req *citadelpb.IstioCertificateRequest) ([]string, error) {
			return []string{"x", good(req)[1]}, nil
		}, "answer",
			"element 0 of the chain from CA is not PEM"},
		"somebody else's": {func(req *citadelpb.IstioCertificateRequest) ([]string, error) {
			return issueFor(id("b"), req)
		}, "answer",
			"did not find expected SAN: spiffe://cluster.local/ns/default/sa/a"},
		"nobody's": {func(req *citadelpb.IstioCertificateRequest) ([]string, error) {
			chain := good(req)
			chain[0] = chain[1]
			return chain, nil
		}, "answer",
			"did not find expected SAN: spiffe://cluster.local/ns/default/sa/a"},
		"refused": {func(*citadelpb.IstioCertificateRequest) ([]string, error) {
			return nil, status.Error(codes.Unauthenticated, "request authentication failure")
		}, "Unauthenticated",
			"signing gRPC error (Unauthenticated): request authentication failure (hint: check the control plane logs for " +
				"more information)"},
		"broken": {func(*citadelpb.IstioCertificateRequest) ([]string, error) {
			return nil, status.Error(codes.Internal, "no key")
		}, "Internal",
			"signing gRPC error (Internal): no key"},
		"too long": {func(*citadelpb.IstioCertificateRequest) ([]string, error) {
			return []string{strings.Repeat("x", 4<<20)}, nil
		}, "ResourceExhausted",
			"signing gRPC error (ResourceExhausted): grpc: received message larger than max (4194309 vs. 4194304)"},
	} {
		t.Run(name, func(t *testing.T) {
			s.set(c.answer)
			before := r.Stats()
			if _, _, err := ask(t, r); err == nil || err.Error() != c.want {
				t.Errorf("got %v\nwant %s", err, c.want)
			}
			if st := r.Stats(); st.Requests != before.Requests+1 || st.Failures[c.class] != before.Failures[c.class]+1 ||
				st.LastError != c.want || st.LastErrorAt.IsZero() {
				t.Errorf("%+v", st)
			}
		})
	}
	s.set(nil)
	if _, _, err := ask(t, r); err != nil {
		t.Error(err)
	}
	// An answer that is wrong is no reason for a new connection.
	if conns, _ := s.count(); conns != 1 {
		t.Errorf("%d connections", conns)
	}
}

// TestRemoteRootBundle: dataplane.md 134, from the wire on: both roots arrive, one that does not parse is skipped.
func TestRemoteRootBundle(t *testing.T) {
	s := newCAServer(t)
	other := pki.New(t)
	s.set(func(req *citadelpb.IstioCertificateRequest) ([]string, error) {
		chain, err := issueFor(id("a"), req)
		if err != nil {
			return nil, err
		}
		bad := "-----BEGIN CERTIFICATE-----\nbm9uZQ==\n-----END CERTIFICATE-----\n"
		return []string{chain[0], string(other.PEM()), chain[1] + bad + string(other.PEM())}, nil
	})
	chain, roots, err := ask(t, s.remote(t, true, nil))
	if err != nil || len(chain) != 2 || len(roots) != 2 || !roots[1].Equal(other.Cert) {
		t.Errorf("%d, %d, %v", len(chain), len(roots), err)
	}
}

// TestRemoteOwnFaults: what is wrong on our side names the file, and nobody is asked.
func TestRemoteOwnFaults(t *testing.T) {
	s := newCAServer(t)
	token := filepath.Join(t.TempDir(), "istio-token")
	writeFile(t, token, nil)
	r := s.remote(t, true, func(o *istiod.Options) { o.Token.File = token })
	if _, _, err := ask(t, r); err == nil || err.Error() != "asking the CA: token file "+token+" is empty" {
		t.Error(err)
	}
	writeFile(t, token, []byte("now\n"))
	if _, _, err := ask(t, r); err != nil {
		t.Error(err)
	}
	missing := filepath.Join(t.TempDir(), "none.pem")
	r = s.remote(t, true, func(o *istiod.Options) { o.Roots = istiod.Roots{File: missing} })
	if _, _, err := ask(t, r); err == nil || err.Error() != "asking the CA: control plane "+s.addr+
		": root certificates: open "+missing+": no such file or directory" {
		t.Error(err)
	}
	if st := r.Stats(); st.Failures["local"] != 1 || st.Channels != 0 {
		t.Errorf("%+v", st)
	}
	if _, calls := s.count(); calls != 1 {
		t.Errorf("%d calls", calls)
	}
	r.Close()
	if _, _, err := ask(t, r); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
}

// TestRemoteRootReplaced: checklist 36, by rename and by Kubernetes' swap; a file that is no good leaves what works.
func TestRemoteRootReplaced(t *testing.T) {
	s := newCAServer(t)
	v := newVolume(t, "root-cert.pem", s.root.PEM())
	plain := filepath.Join(t.TempDir(), "root-cert.pem")
	writeFile(t, plain, s.root.PEM())
	for name, c := range map[string]struct {
		path string
		put  func([]byte)
	}{
		"rename":     {plain, func(b []byte) { writeFile(t, plain, b) }},
		"Kubernetes": {v.path(), func(b []byte) { v.swap(t, b) }},
	} {
		t.Run(name, func(t *testing.T) {
			c.put(s.root.PEM())
			r := s.remote(t, true, func(o *istiod.Options) { o.Roots = istiod.Roots{File: c.path} })
			ok := func() {
				t.Helper()
				if _, _, err := ask(t, r); err != nil {
					t.Fatal(err)
				}
			}
			marked := func() bool {
				r.mu.Lock()
				defer r.mu.Unlock()
				return r.stale
			}
			runs(t, r.Run)
			ok()
			eventually(t, "the watch to begin", func() bool { ok(); return r.Stats().Channels >= 1 && !marked() })
			ok()
			channels := r.Stats().Channels

			next := pki.New(t)
			s.use(t, next)
			ok() // nothing has changed here: the channel is the old one
			if st := r.Stats(); st.Channels != channels {
				t.Fatalf("%+v", st)
			}
			conns, _ := s.count()
			c.put(next.PEM())
			eventually(t, "the change to be seen", marked)
			ok()
			if now, _ := s.count(); now != conns+1 || r.Stats().Channels != channels+1 {
				t.Errorf("%d connections after %d, %+v", now, conns, r.Stats())
			}
			ok()
			c.put([]byte("garbage"))
			eventually(t, "the change to be seen", marked)
			ok()
			ok()
			if st := r.Stats(); st.Kept != 2 || st.Channels != channels+1 || len(st.Failures) != 0 || !marked() {
				t.Errorf("%+v", st)
			}
			c.put(next.PEM())
			eventually(t, "a new channel", func() bool { ok(); return r.Stats().Channels == channels+2 })
		})
	}
}

// TestRemoteRecovers: a CA that was down is asked anew at each fetch, on a connection of its own, with the roots of
// then.
func TestRemoteRecovers(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	path := filepath.Join(t.TempDir(), "roots.pem")
	writeFile(t, path, pki.New(t).PEM())
	c, err := istiod.New(istiod.Options{Address: addr, Roots: istiod.Roots{File: path}})
	if err != nil {
		t.Fatal(err)
	}
	r := NewRemote(RemoteOptions{Connector: c, Impersonate: true})
	defer r.Close()
	for range 3 {
		want := `signing gRPC error (Unavailable): connection error: desc = "transport: Error while dialing: dial tcp ` +
			addr + `: connect: connection refused"`
		if _, _, err := ask(t, r); err == nil || err.Error() != want {
			t.Fatalf("got  %v\nwant %s", err, want)
		}
	}
	s := startCAServer(t, addr)
	want :=
		`signing gRPC error (Unavailable): connection error: desc = "transport: authentication handshake failed: tls: failed to verify certificate: x509: certificate signed by unknown authority`
	if _, _, err := ask(t, r); err == nil || !strings.HasPrefix(err.Error(), want) ||
		!strings.HasSuffix(err.Error(), "(not trusted by "+path+`)"`) {
		t.Fatalf("got  %v\nwant %s", err, want)
	}
	writeFile(t, path, s.root.PEM())
	if _, _, err := ask(t, r); err != nil {
		t.Fatal(err)
	}
	if st := r.Stats(); st.Failures["Unavailable"] != 4 || st.Channels != 5 {
		t.Errorf("%+v", st)
	}
}

// TestRemoteCallOutlivesChannel: a call under way is not cut because a later one uses a new channel.
func TestRemoteCallOutlivesChannel(t *testing.T) {
	s := newCAServer(t)
	r := s.remote(t, true, nil)
	entered, goOn := make(chan struct{}), make(chan struct{})
	s.set(func(req *citadelpb.IstioCertificateRequest) ([]string, error) {
		entered <- struct{}{}
		<-goOn
		return issueFor(id("a"), req)
	})
	slow := make(chan error)
	go func() {
		_, _, err := ask(t, r)
		slow <- err
	}()
	<-entered
	s.set(nil)
	r.mu.Lock()
	r.stale = true
	r.mu.Unlock()
	if _, _, err := ask(t, r); err != nil {
		t.Error(err)
	}
	close(goOn)
	if err := <-slow; err != nil {
		t.Error(err)
	}
	if st := r.Stats(); st.Channels != 2 {
		t.Errorf("%+v", st)
	}
}

// TestRemoteHung: a CA that never answers ends with the caller's time, and one fetch that is forgotten with it.
func TestRemoteHung(t *testing.T) {
	s := newCAServer(t)
	r := s.remote(t, true, nil)
	goOn := make(chan struct{})
	defer close(goOn)
	s.set(func(*citadelpb.IstioCertificateRequest) ([]string, error) { <-goOn; return nil, nil })
	_, csr, err := NewRequest(id("a"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	var se *SigningError
	if _, _, err := r.Sign(ctx, id("a"), csr, time.Hour); !errors.As(err, &se) || se.Code != codes.DeadlineExceeded ||
		!strings.HasPrefix(err.Error(), "signing gRPC error (DeadlineExceeded): ") {
		t.Error(err)
	}
}

// TestRemoteTalkative: what a CA says is bounded before it is logged and given to connections.
func TestRemoteTalkative(t *testing.T) {
	s := newCAServer(t)
	r := s.remote(t, true, nil)
	s.set(func(*citadelpb.IstioCertificateRequest) ([]string, error) {
		return nil, status.Error(codes.Internal, "no\xff"+strings.Repeat("!", 100_000))
	})
	_, csr, err := NewRequest(id("a"))
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = r.Sign(t.Context(), id("a"), csr, time.Hour)
	if err == nil || len(err.Error()) > 2200 || !strings.HasPrefix(err.Error(), "signing gRPC error (Internal): no") ||
		!utf8.ValidString(err.Error()) {
		t.Errorf("%.100q", err)
	}
	if text := r.Stats().LastError; len(text) > 2200 {
		t.Errorf("%d bytes", len(text))
	}
}
