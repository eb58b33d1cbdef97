package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	mrand "math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"ztun/proxy/identity"
)

// newRoot makes a self-signed root that signs nothing.
func newRoot(t *testing.T, name string) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true,
		BasicConstraintsValid: true,
		NotBefore:             time.Unix(0, 0), NotAfter: time.Unix(1<<33, 0)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	c, err = x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// answering has a signer's certificates come with other roots.
func (f *fakeSigner) answering(roots func() []*x509.Certificate) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answer = func(id identity.ID, csr []byte, ttl time.Duration) ([]*x509.Certificate, []*x509.Certificate, error) {
		chain, _, err := issue(id, csr, time.Now(), time.Now().Add(ttl))
		return chain, roots(), err
	}
}

// TestDemandRetries: after an outage the first connection has its certificate, however long the pause between attempts
// has become; during it one attempt in a while is made for it, and nobody waits long.
func TestDemandRetries(t *testing.T) {
	f := &fakeSigner{latency: 10 * time.Millisecond, fail: errDown}
	bubble(t, ManagerOptions{Signer: f}, func(t *testing.T, m *Manager) {
		if _, err := m.Certificate(t.Context(), id("a")); !errors.Is(err, errDown) {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		n := f.calls()
		for range 60 * 10 { // a minute under demand
			if _, err := m.Certificate(t.Context(), id("a")); !errors.Is(err, errDown) {
				t.Fatal(err)
			}
			time.Sleep(100 * time.Millisecond)
		}
		if more := f.calls() - n; more < 5 || more > 20 {
			t.Errorf("%d attempts in a minute under demand", more)
		}
		f.set(nil)
		time.Sleep(retryMost)
		start := time.Now()
		must(t, m, "a")
		if d := time.Since(start); d > time.Second {
			t.Errorf("took %v", d)
		}
		// A CA that hangs holds nobody longer than that.
		f.set(errDown)
		if _, err := m.Certificate(t.Context(), id("b")); err == nil {
			t.Fatal("a certificate")
		}
		f.mu.Lock()
		f.latency = 15 * time.Second
		f.mu.Unlock()
		time.Sleep(time.Hour)
		start = time.Now()
		if _, err := m.Certificate(t.Context(), id("b")); !errors.Is(err, errDown) || time.Since(start) > retryPatience {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
}

// TestBackForAll: when one identity shows that the CA is back, or the control plane is connected again, the others do
// not wait for the end of their pauses.
func TestBackForAll(t *testing.T) {
	for what, back := range map[string]func(*Manager){
		"another identity":  func(m *Manager) { m.Prefetch(id("new")) },
		"the control plane": (*Manager).Retry,
		"new files":         (*Manager).Renew,
	} {
		f := &fakeSigner{latency: 10 * time.Millisecond, fail: errDown}
		bubble(t, ManagerOptions{Signer: f, Rand: mrand.Float64}, func(t *testing.T, m *Manager) {
			for i := range 20 {
				m.Prefetch(id(fmt.Sprint(i)))
			}
			time.Sleep(time.Hour)
			f.set(nil)
			back(m)
			time.Sleep(3 * time.Second)
			for _, s := range m.Dump() {
				if s.State != "Available" {
					t.Errorf("%s: %s is %s", what, s.Identity, s.State)
				}
			}
			m.mu.Lock()
			defer m.mu.Unlock()
			if m.failing != 0 {
				t.Error(what, m.failing)
			}
		})
	}
}

// TestNewRoots: the first certificate with other roots has all others renewed within seconds, not at half of their
// lives, and not all at once.
func TestNewRoots(t *testing.T) {
	roots := []*x509.Certificate{newRoot(t, "old")}
	f := &fakeSigner{}
	f.answering(func() []*x509.Certificate { return roots })
	bubble(t, ManagerOptions{Signer: f, Rand: mrand.Float64}, func(t *testing.T, m *Manager) {
		const n = 50
		for i := range n {
			must(t, m, fmt.Sprint(i))
		}
		time.Sleep(time.Hour)
		if f.calls() != n {
			t.Fatal(f.calls())
		}
		f.mu.Lock()
		roots = []*x509.Certificate{newRoot(t, "new"), roots[0]}
		f.mu.Unlock()
		m.Retry() // the control plane is connected again: one is renewed
		start := time.Now()
		time.Sleep(renewSpread + time.Second)
		for i := range n {
			if c := must(t, m, fmt.Sprint(i)); len(c.Roots) != 2 {
				t.Fatalf("%d of %d calls; %d has the old roots", f.calls(), n, i)
			}
		}
		if f.calls() != 2*n {
			t.Errorf("%d calls, want %d", f.calls(), 2*n)
		}
		f.mu.Lock()
		late := 0
		for _, at := range f.at[n:] {
			if at.Sub(start) > renewSpread/2 {
				late++
			}
		}
		f.mu.Unlock()
		if late < n/10 || late > n*9/10 {
			t.Errorf("%d of %d in the second half of the time", late, n)
		}
		// The same roots in another order are no news.
		f.mu.Lock()
		roots = []*x509.Certificate{roots[1], roots[0]}
		f.mu.Unlock()
		must(t, m, "one more")
		time.Sleep(time.Minute)
		if f.calls() != 2*n+1 {
			t.Errorf("%d calls", f.calls())
		}
		// Files were replaced: all, whatever comes of it.
		m.Renew()
		time.Sleep(renewSpread + time.Second)
		if f.calls() != 3*n+2 {
			t.Errorf("%d calls, want %d", f.calls(), 3*n+2)
		}
	})
}

// TestTwoCAs: two CAs that answer in turn, each with its own root, do not have everything renewed without end.
func TestTwoCAs(t *testing.T) {
	a, b := newRoot(t, "a"), newRoot(t, "b")
	f := &fakeSigner{}
	calls := 0
	f.answering(func() []*x509.Certificate {
		f.mu.Lock()
		defer f.mu.Unlock()
		if calls++; calls%2 == 0 {
			return []*x509.Certificate{a}
		}
		return []*x509.Certificate{b}
	})
	bubble(t, ManagerOptions{Signer: f, Rand: mrand.Float64}, func(t *testing.T, m *Manager) {
		for i := range 10 {
			must(t, m, fmt.Sprint(i))
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := f.calls(); n > 61*10+20 {
			t.Errorf("%d calls in an hour", n)
		}
	})
}
