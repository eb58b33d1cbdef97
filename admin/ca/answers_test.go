package ca

import (
	"bytes"
	"context"
	"crypto/x509"
	"log/slog"
	"strings"
	"testing"
	"time"

	"ztun/proxy/identity"
)

// TestShortLives: certificates of two seconds to two minutes, backdated as the local CA does, are renewed a few times
// per life, not in a hot loop, and one is always valid.
func TestShortLives(t *testing.T) {
	for _, ttl := range []time.Duration{2 * time.Second, 5 * time.Second, time.Minute, 2 * time.Minute, 130 * time.Second,
		time.Hour} {
		t.Run(ttl.String(), func(t *testing.T) {
			f := &fakeSigner{answer: func(id identity.ID, csr []byte, ttl time.Duration) ([]*x509.Certificate,
				[]*x509.Certificate, error) {
				return NewFake().Sign(context.Background(), id, csr, ttl)
			}}
			bubble(t, ManagerOptions{Signer: f, TTL: ttl}, func(t *testing.T, m *Manager) {
				must(t, m, "a")
				for range 200 {
					time.Sleep(ttl / 10)
					if c := must(t, m, "a"); !c.ValidAt(time.Now()) {
						t.Fatalf("%v at %v", c, time.Now())
					}
				}
				if n := f.calls(); n > 100 {
					t.Errorf("%d calls in 20 lives", n)
				}
			})
		})
	}
}

// TestBrokenAnswers: a CA that answers nonsense is a failing CA, with the text that says why.
func TestBrokenAnswers(t *testing.T) {
	now := time.Now // the bubble's, when called there
	for name, c := range map[string]struct {
		answer func(id identity.ID, csr []byte, ttl time.Duration) ([]*x509.Certificate, []*x509.Certificate, error)
		want   string
	}{
		"empty": {func(identity.ID, []byte, time.Duration) ([]*x509.Certificate, []*x509.Certificate, error) {
			return nil, nil, nil
		}, "chain returned from CA is empty for: spiffe://cluster.local/ns/default/sa/a"},
		"another identity": {func(_ identity.ID, _ []byte, _ time.Duration) ([]*x509.Certificate, []*x509.Certificate,
			error) {
			_, csr, err := NewRequest(id("b"))
			if err != nil {
				return nil, nil, err
			}
			return issue(id("b"), csr, now(), now().Add(time.Hour))
		}, "did not find expected SAN: spiffe://cluster.local/ns/default/sa/a"},
		"another key": {func(want identity.ID, _ []byte, _ time.Duration) ([]*x509.Certificate, []*x509.Certificate, error) {
			_, csr, err := NewRequest(want)
			if err != nil {
				return nil, nil, err
			}
			return issue(want, csr, now(), now().Add(time.Hour))
		}, "certificate does not belong to the requested key for: spiffe://cluster.local/ns/default/sa/a"},
		"expired": {func(id identity.ID, csr []byte, _ time.Duration) ([]*x509.Certificate, []*x509.Certificate, error) {
			return issue(id, csr, now().Add(-time.Hour), now().Add(-time.Minute))
		}, "certificate from CA for spiffe://cluster.local/ns/default/sa/a had expired at 1999-12-31T23:59:00Z when it " +
			"arrived: is the clock right?"},
	} {
		t.Run(name, func(t *testing.T) {
			f := &fakeSigner{answer: c.answer}
			bubble(t, ManagerOptions{Signer: f}, func(t *testing.T, m *Manager) {
				if _, err := m.Certificate(t.Context(), id("a")); err == nil || err.Error() != c.want {
					t.Errorf("got %v\nwant %s", err, c.want)
				}
				time.Sleep(time.Minute)
				if n := f.calls(); n > 10 {
					t.Errorf("%d calls in a minute", n)
				}
			})
		})
	}
}

// TestNotYetValid: a CA whose clock is ahead of ours: used (peers may agree with the CA), with a warning.
func TestNotYetValid(t *testing.T) {
	var log bytes.Buffer
	f := &fakeSigner{answer: func(id identity.ID, csr []byte, ttl time.Duration) ([]*x509.Certificate, []*x509.Certificate,
		error) {
		return issue(id, csr, time.Now().Add(time.Hour), time.Now().Add(time.Hour+ttl))
	}}
	bubble(t, ManagerOptions{Signer: f, Logger: slog.New(slog.NewTextHandler(&log, nil))}, func(t *testing.T, m *Manager) {
		must(t, m, "a")
		if !strings.Contains(log.String(), "not valid yet") {
			t.Errorf("log: %s", log.String())
		}
	})
}

// TestSleptThroughEnd: the certificate ended before its renewal came (a machine that slept): fetched anew, not failed.
func TestSleptThroughEnd(t *testing.T) {
	f := &fakeSigner{latency: time.Second}
	bubble(t, ManagerOptions{Signer: f, TTL: time.Hour}, func(t *testing.T, m *Manager) {
		must(t, m, "a")
		m.mu.Lock() // what a sleep would do to timers
		e := m.entries[id("a")]
		m.queue.remove(e)
		m.queue.push(e, background, time.Now().Add(24*time.Hour), time.Now())
		m.mu.Unlock()
		time.Sleep(2 * time.Hour)
		if d := m.Dump(); d[0].State != "Initializing" {
			t.Errorf("%+v", d)
		}
		if c := must(t, m, "a"); !c.ValidAt(time.Now()) {
			t.Error("expired")
		}
		if f.calls() != 2 {
			t.Errorf("%d calls", f.calls())
		}
	})
}
