package identity

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"sync"
	"time"
)

// maxVerified bounds the chains that one certificate remembers (about 100 bytes each). A pod that talks to more peers
// verifies some of them again.
const maxVerified = 512

// verifier checks the chains of peers of one role
// against one set of roots and remembers the ones that passed. A chain is known by the
// hash of all its bytes, so nothing that the peer could vary is left out; the proof that the peer holds the key is made
// by TLS every time. Only time can make a verified chain fail later (roots never change in a Certificate), hence the
// remembered window, the intersection of the chain's validities.
type verifier struct {
	roots *x509.CertPool
	mu    sync.Mutex
	seen  map[[sha256.Size]byte]window
}

type window struct{ notBefore, notAfter time.Time }

func (w window) contains(now time.Time) bool {
	return !now.Before(w.notBefore) && !now.After(w.notAfter)
}

// verify checks a peer's certificates (leaf first) at the time now. usage is always the same. Errors are crypto/x509's.
func (v *verifier) verify(certs []*x509.Certificate, usage x509.ExtKeyUsage, now time.Time) error {
	key := chainKey(certs)
	v.mu.Lock()
	w, ok := v.seen[key]
	v.mu.Unlock()
	if ok && w.contains(now) {
		return nil
	}
	chains, err := verifyChain(certs, v.roots, usage, now)
	if err != nil {
		return err
	}
	w = window{certs[0].NotBefore, certs[0].NotAfter}
	for _, cert := range chains[0] {
		if cert.NotBefore.After(w.notBefore) {
			w.notBefore = cert.NotBefore
		}
		if cert.NotAfter.Before(w.notAfter) {
			w.notAfter = cert.NotAfter
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.seen == nil {
		v.seen = make(map[[sha256.Size]byte]window)
	}
	if len(v.seen) >= maxVerified { // drop any one: map order is random enough
		for old := range v.seen {
			delete(v.seen, old)
			break
		}
	}
	v.seen[key] = w
	return nil
}

// verifyChain finds the ways from a peer's certificates, leaf first, to a root, as of that time. Errors are
// crypto/x509's.
func verifyChain(certs []*x509.Certificate, roots *x509.CertPool, usage x509.ExtKeyUsage, at time.Time) (
	[][]*x509.Certificate, error) {
	opts := x509.VerifyOptions{Roots: roots, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{usage}}
	if len(certs) > 1 {
		opts.Intermediates = x509.NewCertPool()
		for _, cert := range certs[1:] {
			opts.Intermediates.AddCert(cert)
		}
	}
	return certs[0].Verify(opts)
}

// chainKey hashes the chain, each certificate prefixed by its length so that no two chains share a hash.
func chainKey(certs []*x509.Certificate) (key [sha256.Size]byte) {
	if len(certs) == 1 { // the usual case needs no hash state on the heap; DER carries its own length
		return sha256.Sum256(certs[0].Raw)
	}
	h := sha256.New()
	var length [4]byte
	for _, cert := range certs {
		binary.BigEndian.PutUint32(length[:], uint32(len(cert.Raw)))
		h.Write(length[:])
		h.Write(cert.Raw)
	}
	h.Sum(key[:0])
	return key
}
