package identity

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"sync"
	"time"
)

// Certificate is one workload's proof of identity: key, chain, and the roots it trusts in peers, which are always those
// that came with its own certificate (spec/dataplane.md 8.5). Immutable and safe for concurrent use; make it with New.
// A renewed certificate is a new value: handshakes under way and live connections keep the old one.
type Certificate struct {
	ID            ID
	Leaf          *x509.Certificate
	Intermediates []*x509.Certificate
	Roots         []*x509.Certificate
	Pool          *x509.CertPool  // Roots; do not add to it
	TLS           tls.Certificate // leaf and intermediates, key, parsed leaf

	trust  string // trust domain of the leaf's first SPIFFE SAN: what clients must share
	strict bool   // the leaf has a SPIFFE SAN, so trust is checked

	peers   verifier // servers whose chains were verified against Pool
	callers verifier // clients within this process (Meet)

	mu     sync.Mutex
	server []serverConfig // accepting configurations that were made, one per Params in use: one in a process
}

type serverConfig struct {
	params Params
	cfg    *tls.Config
}

// New binds a key to the CA's answer: chain is the leaf followed by intermediates, roots are the trust bundle (several
// are a union). Errors: *EmptyChainError, *SANError (the leaf's first URI SAN is not id), *KeyMismatchError. A zero id
// is not checked but taken from the leaf (ztunnel's dedicated mode). Validity times and the path to a root are not
// checked: a CA that rotates its root may answer with a bundle that its older chain does not reach.
func New(id ID, key crypto.Signer, chain []*x509.Certificate, roots []*x509.Certificate) (*Certificate, error) {
	if len(chain) == 0 {
		return nil, &EmptyChainError{ID: id}
	}
	if len(roots) == 0 {
		return nil, &EmptyChainError{ID: id, NoRoot: true}
	}
	leaf := chain[0]
	if id.IsZero() {
		id, _ = First(leaf)
	} else if uris := URIs(leaf.Extensions); len(uris) == 0 || uris[0] != id.String() {
		return nil, &SANError{Want: id}
	}
	public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(leaf.PublicKey) {
		return nil, &KeyMismatchError{ID: id}
	}
	c := &Certificate{
		ID:            id,
		Leaf:          leaf,
		Intermediates: chain[1:len(chain):len(chain)],
		Roots:         roots,
		Pool:          x509.NewCertPool(),
		TLS:           tls.Certificate{PrivateKey: key, Leaf: leaf},
	}
	for _, cert := range chain {
		c.TLS.Certificate = append(c.TLS.Certificate, cert.Raw)
	}
	for _, root := range roots {
		c.Pool.AddCert(root)
	}
	first, ok := First(leaf)
	c.trust, c.strict = first.TrustDomain, ok
	c.peers.roots = c.Pool
	c.callers.roots = c.Pool
	return c, nil
}

// ValidAt reports whether a peer with a right clock would accept the leaf at that time (X.509: both ends inclusive).
func (c *Certificate) ValidAt(now time.Time) bool {
	return !now.Before(c.Leaf.NotBefore) && !now.After(c.Leaf.NotAfter)
}

// String names the certificate in logs: identity, serial number, end of validity. Never the key.
func (c *Certificate) String() string {
	return fmt.Sprintf("%s serial %d until %s", c.ID, c.Leaf.SerialNumber, c.Leaf.NotAfter.UTC().Format(time.RFC3339))
}
