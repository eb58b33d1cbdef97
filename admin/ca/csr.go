package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	"ztun/proxy/identity"
)

// Signer turns a certificate request into a certificate: the local CA here, a CA server elsewhere. csr is DER, ttl the
// validity asked for. The answer is the leaf followed by intermediates, and the roots to trust in peers. Sign is called
// from up to eight goroutines at once and should return soon after ctx ends.
type Signer interface {
	Sign(ctx context.Context, id identity.ID, csr []byte, ttl time.Duration) (chain, roots []*x509.Certificate, err error)
}

// NewRequest makes a fresh P-256 key and a certificate request for id as ztunnel's: SHA-256, empty subject, one
// requested extension, subjectAltName, critical, with the SPIFFE URI alone (spec/dataplane.md 8.1). csr is DER.
func NewRequest(id identity.ID) (key crypto.Signer, csr []byte, err error) {
	key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("key for %s: %w", id, err)
	}
	csr, err = requestFor(id, key)
	if err != nil {
		return nil, nil, err
	}
	return key, csr, nil
}

// requestFor is NewRequest for a key that is there.
func requestFor(id identity.ID, key crypto.Signer) (csr []byte, err error) {
	san, err := identity.SANExtension(id)
	if err != nil {
		return nil, err
	}
	csr, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{ExtraExtensions: []pkix.Extension{san}},
		key)
	if err != nil {
		return nil, fmt.Errorf("certificate request for %s: %w", id, err)
	}
	return csr, nil
}

// checkRequest parses a request and insists on NewRequest's shape, for id. The key may be of any type of P-256.
func checkRequest(id identity.ID, csr []byte) (*x509.CertificateRequest, error) {
	req, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, fmt.Errorf("certificate request: %w", err)
	}
	if err := req.CheckSignature(); err != nil {
		return nil, fmt.Errorf("certificate request: %w", err)
	}
	key, ok := req.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, errors.New("certificate request: the key is not on P-256")
	}
	if len(req.Subject.Names) != 0 {
		return nil, errors.New("certificate request: the subject is not empty")
	}
	want, err := identity.SANExtension(id)
	if err != nil {
		return nil, err
	}
	if len(req.Extensions) != 1 || !req.Extensions[0].Id.Equal(want.Id) || !req.Extensions[0].Critical {
		return nil, errors.New("certificate request: a critical subjectAltName must be the one extension")
	}
	if string(req.Extensions[0].Value) != string(want.Value) {
		return nil, &identity.SANError{Want: id}
	}
	return req, nil
}

// ParseChain reads a CA server's answer (istio.v1.auth CreateCertificate): element 0 is the leaf, the last element the
// root bundle, which may hold several roots, those between are intermediates, one each. Roots that do not parse are
// skipped and counted. Errors: *identity.EmptyChainError (nothing, or no root: a single element, or none that parses);
// others name the element.
func ParseChain(id identity.ID, answer []string) (chain, roots []*x509.Certificate, skipped int, err error) {
	switch len(answer) {
	case 0:
		return nil, nil, 0, &identity.EmptyChainError{ID: id}
	case 1:
		return nil, nil, 0, &identity.EmptyChainError{ID: id, NoRoot: true}
	}
	last := len(answer) - 1
	for i, text := range answer[:last] {
		block, _ := pem.Decode([]byte(text))
		if block == nil {
			return nil, nil, 0, fmt.Errorf("element %d of the chain from CA is not PEM", i)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, nil, 0, fmt.Errorf("element %d of the chain from CA: %w", i, err)
		}
		chain = append(chain, cert)
	}
	for rest := []byte(answer[last]); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if root, err := x509.ParseCertificate(block.Bytes); err == nil {
			roots = append(roots, root)
		} else {
			skipped++
		}
	}
	if len(roots) == 0 {
		return nil, nil, skipped, &identity.EmptyChainError{ID: id, NoRoot: true}
	}
	return chain, roots, skipped, nil
}
