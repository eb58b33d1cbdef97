package ca

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"ztun/proxy/identity"
)

func id(name string) identity.ID {
	return identity.ID{TrustDomain: "cluster.local", Namespace: "default", ServiceAccount: name}
}

// fakeSigner is a CA that takes its time and fails on demand. It issues without backdating, unlike Local, so that the
// half-life of a certificate is half of what was asked for.
type fakeSigner struct {
	latency time.Duration

	mu     sync.Mutex
	order  []string // service accounts in order of arrival
	at     []time.Time
	now    int // calls under way
	most   int
	fail   error
	answer func(id identity.ID, csr []byte, ttl time.Duration) ([]*x509.Certificate, []*x509.Certificate, error)
}

func (f *fakeSigner) set(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = err
}

func (f *fakeSigner) calls() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.order)
}

func (f *fakeSigner) Sign(ctx context.Context, id identity.ID, csr []byte, ttl time.Duration) ([]*x509.Certificate,
	[]*x509.Certificate, error) {
	f.mu.Lock()
	f.order = append(f.order, id.ServiceAccount)
	f.at = append(f.at, time.Now())
	f.now++
	f.most = max(f.most, f.now)
	fail, answer, latency := f.fail, f.answer, f.latency
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		f.now--
		f.mu.Unlock()
	}()
	select {
	case <-time.After(latency):
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
	switch {
	case fail != nil:
		return nil, nil, fail
	case answer != nil:
		return answer(id, csr, ttl)
	}
	return issue(id, csr, time.Now(), time.Now().Add(ttl))
}

// issue signs with the fake CA's key, with these very times.
func issue(id identity.ID, csr []byte, notBefore, notAfter time.Time) ([]*x509.Certificate, []*x509.Certificate,
	error) {
	ca := NewFake()
	req, err := checkRequest(id, csr)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		NotBefore: notBefore, NotAfter: notAfter, ExtraExtensions: req.Extensions,
	}, ca.cert, req.PublicKey, ca.key)
	if err != nil {
		return nil, nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	return []*x509.Certificate{leaf}, ca.roots, err
}

// bubble runs f with a running Manager in a synctest bubble. Unless o says otherwise there is no jitter: renewals at
// exactly half-life, retries at 0.8 of their nominal delay.
func bubble(t *testing.T, o ManagerOptions, f func(t *testing.T, m *Manager)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		if o.Rand == nil {
			o.Rand = func() float64 { return 0 }
		}
		m := NewManager(o)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- m.Run(ctx) }()
		defer func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}()
		f(t, m)
	})
}

// must gets a certificate now.
func must(t *testing.T, m *Manager, name string) *identity.Certificate {
	t.Helper()
	c, err := m.Certificate(t.Context(), id(name))
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return c
}

// same fails unless two times are equal to the second (certificates know no smaller unit).
func same(t *testing.T, what string, got, want time.Time) {
	t.Helper()
	if d := got.Sub(want); d < -time.Second || d > time.Second {
		t.Errorf("%s at %v, want %v (%v off)", what, got, want, d)
	}
}

func wantOrder(t *testing.T, f *fakeSigner, want ...string) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	if !slices.Equal(f.order, want) {
		t.Errorf("the CA was asked for %v, want %v", f.order, want)
	}
}

var errDown = errors.New("signing gRPC error (Unavailable): CA is down") // never assigned to
