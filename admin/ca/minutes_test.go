package ca

import (
	"context"
	"crypto/x509"
	"fmt"
	"sync"
	"testing"
	"time"

	"ztun/proxy/identity"
)

// TestMinuteCertificates is issue 4's proof in fast time: twenty identities with certificates of one minute, for ten
// minutes, from a CA that takes up to two seconds, is down for fifteen seconds of every minute and answers garbage now
// and then. Nobody who asks ever waits after the first time, or is given a certificate that is not valid; each is
// replaced many times.
func TestMinuteCertificates(t *testing.T) {
	var mu sync.Mutex
	calls := 0
	f := &fakeSigner{latency: 2 * time.Second}
	f.answer = func(id identity.ID, csr []byte, ttl time.Duration) ([]*x509.Certificate, []*x509.Certificate, error) {
		mu.Lock()
		calls++
		n := calls
		mu.Unlock()
		switch {
		case time.Now().Second() >= 45:
			return nil, nil, errDown
		case n > 20 && n%29 == 0:
			return nil, nil, nil
		}
		return NewFake().Sign(context.Background(), id, csr, ttl)
	}
	r := 0.0
	rand := func() float64 {
		mu.Lock()
		defer mu.Unlock()
		r += 0.37
		return r - float64(int(r))
	}
	bubble(t, ManagerOptions{Signer: f, TTL: time.Minute, Rand: rand}, func(t *testing.T, m *Manager) {
		const identities = 20
		name := func(i int) string { return fmt.Sprint("w", i) }
		var first sync.WaitGroup
		for i := range identities {
			first.Go(func() { must(t, m, name(i)) })
		}
		first.Wait()
		start := time.Now()
		serials := make([]map[string]bool, identities)
		for time.Since(start) < 10*time.Minute {
			time.Sleep(500 * time.Millisecond)
			for i := range identities {
				before := time.Now()
				c, err := m.Certificate(t.Context(), id(name(i)))
				if err != nil || !c.ValidAt(time.Now()) || !time.Now().Equal(before) {
					t.Fatalf("after %v, waiting for %v: %v, %v", before.Sub(start), time.Since(before), c, err)
				}
				if serials[i] == nil {
					serials[i] = map[string]bool{}
				}
				serials[i][c.Leaf.SerialNumber.String()] = true
			}
		}
		for i, s := range serials {
			if len(s) < 12 || len(s) > 40 { // a renewal each twenty seconds, later where the CA was down
				t.Errorf("%s had %d certificates", name(i), len(s))
			}
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		s := m.Stats()
		if s.Identities != identities || s.Failed == 0 || s.Waiting != 0 || f.most > 8 || s.Failed > 600 {
			t.Errorf("%+v, %d at once", s, f.most)
		}
	})
}
