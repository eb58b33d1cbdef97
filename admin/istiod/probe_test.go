package istiod

import (
	"crypto/tls"
	"strings"
	"testing"
	"time"

	"ztun/test/pki"
)

// TestProbe: whether the control plane can be reached and trusted, without a call.
func TestProbe(t *testing.T) {
	good := pki.New(t)
	s := serve(t, &tls.Config{Certificates: []tls.Certificate{good.Issue(t, time.Hour, "127.0.0.1")}})
	probe := func(address string, roots []byte) error {
		c, err := New(Options{Address: address, Roots: Roots{PEM: roots}})
		if err != nil {
			t.Fatal(err)
		}
		return c.Probe(t.Context())
	}
	if err := probe(s.addr, good.PEM()); err != nil {
		t.Error(err)
	}
	if err := probe(s.addr, pki.New(t).PEM()); err == nil || !strings.Contains(err.Error(), s.addr) {
		t.Error("trusted by another root:", err)
	}
	if err := probe("127.0.0.1:1", good.PEM()); err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Error(err)
	}
}
