package ca

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	_ "embed"
	"encoding/pem"
	"fmt"
	"time"

	"ztun/proxy/identity"
)

// backdate is how far a leaf's validity starts in the past, istiod's allowance for peers whose clocks are behind.
const backdate = 2 * time.Minute

// Local is a CA whose key is in this process: the Signer of machines without istiod. Immutable, safe for concurrent
// use.
type Local struct {
	cert        *x509.Certificate
	key         crypto.Signer
	chain       []*x509.Certificate // sent after the leaf: cert itself unless it is a root, and what leads to a root
	roots       []*x509.Certificate
	trustDomain string // "": signs for any
	fake        bool
	warnings    []string
}

//go:embed fake/cert.pem
var fakeCert []byte

//go:embed fake/key-public-for-tests-only.pem
var fakeKey []byte

// NewFake is the CA of FAKE_CA=true: the same in every process, so that daemons started apart trust each other. Its key
// is published with the source: anybody can make certificates that its users accept. NewManager logs a warning for it.
func NewFake() *Local {
	// The two files are part of the program: a failure here is a broken build, which the tests find.
	block, _ := pem.Decode(fakeCert)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		panic("built-in fake CA: " + err.Error())
	}
	key, err := parseKey(fakeKey)
	if err != nil {
		panic("built-in fake CA: " + err.Error())
	}
	return &Local{cert: cert, key: key, roots: []*x509.Certificate{cert}, fake: true}
}

// Fake reports whether this is the built-in test CA.
func (l *Local) Fake() bool { return l.fake }

// TrustDomain is the one trust domain that this CA signs for; "" if it signs for any.
func (l *Local) TrustDomain() string { return l.trustDomain }

// Roots are the certificates to trust in peers, as every certificate from this CA is delivered with. Do not modify.
func (l *Local) Roots() []*x509.Certificate { return l.roots }

// Certificate is what it signs with. Do not modify.
func (l *Local) Certificate() *x509.Certificate { return l.cert }

// Warnings are what is doubtful about the directory that it was read from.
func (l *Local) Warnings() []string { return l.warnings }

// Sign issues a certificate for id to the key of csr, which must have NewRequest's shape. It is valid from two minutes
// ago (istiod's allowance for clock skew) until ttl from now or the end of the CA, whichever is first; usable by both
// ends of a tunnel; nothing else: no CA, no names but the SPIFFE URI.
func (l *Local) Sign(ctx context.Context, id identity.ID, csr []byte, ttl time.Duration) (chain,
	roots []*x509.Certificate, err error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	if l.trustDomain != "" && id.TrustDomain != l.trustDomain {
		return nil, nil, fmt.Errorf("local CA signs for trust domain %s only, not for %s", l.trustDomain, id)
	}
	req, err := checkRequest(id, csr)
	if err != nil {
		return nil, nil, err
	}
	now := time.Now()
	if now.After(l.cert.NotAfter) {
		return nil, nil, fmt.Errorf("local CA expired at %s: make a new one with `ztun ca init DIR`",
			l.cert.NotAfter.UTC().Format(time.RFC3339))
	}
	notAfter := now.Add(ttl)
	if notAfter.After(l.cert.NotAfter) {
		notAfter = l.cert.NotAfter
	}
	if ttl < time.Second {
		return nil, nil, fmt.Errorf("local CA: cannot issue a certificate valid for %v, at least 1s is needed", ttl)
	}
	san, err := identity.SANExtension(id)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		NotBefore:             now.Add(-backdate),
		NotAfter:              notAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		ExtraExtensions:       []pkix.Extension{san},
	}, l.cert, req.PublicKey, l.key)
	if err != nil {
		return nil, nil, fmt.Errorf("local CA: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, fmt.Errorf("local CA: %w", err)
	}
	return append([]*x509.Certificate{leaf}, l.chain...), l.roots, nil
}
