package identity

import (
	"crypto/x509"
	"errors"
	"testing"
	"time"
)

func TestNew(t *testing.T) {
	ca := newTestCA(t, "root")
	id := ID{"td", "n", "a"}
	key, leaf := ca.leaf(t, []string{id.String()})
	roots := []*x509.Certificate{ca.cert}

	c, err := New(id, key, []*x509.Certificate{leaf, ca.cert}, roots)
	if err != nil {
		t.Fatal(err)
	}
	if c.ID != id || c.Leaf != leaf || len(c.Intermediates) != 1 || len(c.TLS.Certificate) != 2 || c.TLS.Leaf != leaf {
		t.Fatalf("%+v", c)
	}
	if now := time.Now(); !c.ValidAt(now) || c.ValidAt(now.Add(2*time.Hour)) || c.ValidAt(now.Add(-time.Hour)) {
		t.Fatal("ValidAt")
	}

	text := func(err error, want string) {
		t.Helper()
		if err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	_, err = New(id, key, nil, roots)
	text(err, "chain returned from CA is empty for: spiffe://td/ns/n/sa/a")
	_, err = New(id, key, []*x509.Certificate{leaf}, nil)
	text(err, "no root certificate present in the chain returned from CA for: spiffe://td/ns/n/sa/a")
	_, err = New(ID{"td", "n", "b"}, key, []*x509.Certificate{leaf}, roots)
	text(err, "did not find expected SAN: spiffe://td/ns/n/sa/b")
	if se := new(SANError); !errors.As(err, &se) {
		t.Errorf("%T", err)
	}
	_, err = New(id, newKey(t), []*x509.Certificate{leaf}, roots)
	text(err, "certificate does not belong to the requested key for: spiffe://td/ns/n/sa/a")

	// The first URI SAN counts, whatever it is.
	key, leaf = ca.leaf(t, []string{"https://x", id.String()})
	_, err = New(id, key, []*x509.Certificate{leaf}, roots)
	text(err, "did not find expected SAN: spiffe://td/ns/n/sa/a")
	// A zero id is not checked but read.
	if c, err := New(ID{}, key, []*x509.Certificate{leaf}, roots); err != nil || c.ID != id {
		t.Errorf("%v, %v", c, err)
	}
	key, leaf = ca.leaf(t, nil)
	_, err = New(id, key, []*x509.Certificate{leaf}, roots)
	text(err, "did not find expected SAN: spiffe://td/ns/n/sa/a")
}
