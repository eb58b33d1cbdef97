package identity

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// MaxCRL bounds the revocation lists that are read, in bytes: about a quarter of a million entries.
const MaxCRL = 8 << 20

// CRL is a set of revoked certificates, from one or several certificate revocation lists (RFC 5280 section 5).
// Immutable, safe for concurrent use. nil is the empty set.
//
// It says of certificates that it lists that they are revoked, and of no other that they are not: lists that are
// missing, old (nextUpdate) or of one kind of certificate only (issuingDistributionPoint) change nothing for the rest
// (spec/dataplane.md 8.6). Whose name and key a list has is looked at when it matters, in check: here there is no
// issuer to compare it with.
type CRL struct {
	lists      map[string][]*crlList // by the DER of the issuer's name
	n, entries int
	nextUpdate time.Time
}

// crlList is one signed list. Serial numbers are big-endian without leading zeros.
type crlList struct {
	signed    []byte
	algorithm x509.SignatureAlgorithm
	signature []byte
	serials   map[string]struct{}
}

const crlBlock = "X509 CRL"

// ParseCRL reads PEM, with any number of lists and other things between them, or one list in DER. Nothing but white
// space, or PEM without a list, is the empty set. One list that cannot be read, or be used rightly (delta and
// indirect lists, unknown critical extensions: RFC 5280 section 5.2), is an error that says which and why; the rest
// of the file is not used either, for half of a set of revocations looks like all of it.
func ParseCRL(data []byte) (*CRL, error) {
	if len(data) > MaxCRL {
		return nil, fmt.Errorf("CRL: %d bytes, at most %d are read", len(data), MaxCRL)
	}
	c := &CRL{lists: map[string][]*crlList{}}
	begin := []byte("-----BEGIN ")
	if !bytes.Contains(data, begin) {
		if len(bytes.TrimSpace(data)) == 0 { // DER may end in what looks like white space
			return c, nil
		}
		if err := c.add(data); err != nil {
			return nil, fmt.Errorf("CRL, taken for DER as there is no PEM block in it: %w", err)
		}
		return c, nil
	}
	want := bytes.Count(data, []byte("-----BEGIN "+crlBlock+"-----"))
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != crlBlock {
			continue
		}
		if err := c.add(block.Bytes); err != nil {
			return nil, fmt.Errorf("CRL %d of %d: %w", c.n+1, want, err)
		}
	}
	if c.n != want { // encoding/pem skips what it cannot decode
		return nil, fmt.Errorf("CRL: only %d of %d PEM blocks are whole: is the file cut short?", c.n, want)
	}
	return c, nil
}

// MergeCRL is the union of sets; nil ones are empty.
func MergeCRL(sets ...*CRL) *CRL {
	all := &CRL{lists: map[string][]*crlList{}}
	for _, c := range sets {
		if c == nil {
			continue
		}
		for name, lists := range c.lists {
			all.lists[name] = append(all.lists[name], lists...)
		}
		all.n += c.n
		all.entries += c.entries
		if all.nextUpdate.IsZero() || !c.nextUpdate.IsZero() && c.nextUpdate.Before(all.nextUpdate) {
			all.nextUpdate = c.nextUpdate
		}
	}
	return all
}

// add takes one list in DER.
func (c *CRL) add(der []byte) error {
	list, err := x509.ParseRevocationList(der)
	if err != nil {
		return err // unsupported version: "x509: unsupported crl version"
	}
	for _, ext := range list.Extensions {
		switch {
		case ext.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, 27}):
			return errors.New("it is a delta CRL: the complete one is needed")
		case ext.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, 28}):
			if indirect, ok := isIndirect(ext.Value); !ok {
				return errors.New("its issuing distribution point cannot be read")
			} else if indirect {
				return errors.New("it is an indirect CRL, with other issuers' certificates: each issuer's own is needed")
			}
		case ext.Critical:
			return fmt.Errorf("it has a critical extension that is unknown here: %s", ext.Id)
		}
	}
	l := &crlList{
		signed: list.RawTBSRevocationList, algorithm: list.SignatureAlgorithm, signature: list.Signature,
		serials: make(map[string]struct{}, len(list.RevokedCertificateEntries)),
	}
	for _, e := range list.RevokedCertificateEntries {
		if e.SerialNumber.Sign() >= 0 { // crypto/x509 takes no certificate with a negative one
			l.serials[string(e.SerialNumber.Bytes())] = struct{}{}
		}
	}
	c.lists[string(list.RawIssuer)] = append(c.lists[string(list.RawIssuer)], l)
	c.n++
	c.entries += len(l.serials)
	if !list.NextUpdate.IsZero() && (c.nextUpdate.IsZero() || list.NextUpdate.Before(c.nextUpdate)) {
		c.nextUpdate = list.NextUpdate
	}
	return nil
}

// isIndirect reads the indirectCRL flag of an IssuingDistributionPoint (RFC 5280 section 5.2.5).
func isIndirect(der []byte) (indirect, ok bool) {
	in := cryptobyte.String(der)
	var seq cryptobyte.String
	if !in.ReadASN1(&seq, cbasn1.SEQUENCE) || !in.Empty() {
		return false, false
	}
	for !seq.Empty() {
		var field cryptobyte.String
		var tag cbasn1.Tag
		if !seq.ReadAnyASN1(&field, &tag) {
			return false, false
		}
		if tag == cbasn1.Tag(4).ContextSpecific() {
			indirect = !bytes.Equal(field, []byte{0})
		}
	}
	return indirect, true
}

// Lists and Entries count what the set was made of; NextUpdate is when the first of its lists wants to be replaced,
// zero if none says. All for logs: a list is obeyed beyond its end.
func (c *CRL) Lists() int            { return c.n }
func (c *CRL) Entries() int          { return c.entries }
func (c *CRL) NextUpdate() time.Time { return c.nextUpdate }

// mentions reports whether a certificate's issuer and serial number are listed, whoever signed the list. Cheap.
func (c *CRL) mentions(certs []*x509.Certificate) bool {
	if c == nil || c.entries == 0 {
		return false
	}
	for _, cert := range certs {
		for _, l := range c.lists[string(cert.RawIssuer)] {
			if l.has(cert) {
				return true
			}
		}
	}
	return false
}

func (l *crlList) has(cert *x509.Certificate) bool {
	var b [64]byte
	n, size := cert.SerialNumber, (cert.SerialNumber.BitLen()+7)/8
	if size > len(b) {
		_, ok := l.serials[string(n.Bytes())]
		return ok
	}
	_, ok := l.serials[string(n.FillBytes(b[:size]))]
	return ok
}

// revokes returns the certificate of a verified chain (leaf first, root last) that is revoked, or nil. A list counts if
// its signature verifies with the key of the certificate's issuer; whether that has the key usage cRLSign is not asked:
// nobody else can sign so, and Istio's example CAs lack it. The root answers to nobody.
func (c *CRL) revokes(chain []*x509.Certificate) *x509.Certificate {
	for i := range len(chain) - 1 {
		for _, l := range c.lists[string(chain[i].RawIssuer)] {
			if l.has(chain[i]) && chain[i+1].CheckSignature(l.algorithm, l.signed, l.signature) == nil {
				return chain[i]
			}
		}
	}
	return nil
}

// check refuses a peer (its certificates as presented) that cannot be trusted for usage without a revoked certificate,
// as of that time. Errors: *PeerRevokedError; crypto/x509's if the chain cannot be verified at all.
func (c *CRL) check(certs []*x509.Certificate, roots *x509.CertPool, usage x509.ExtKeyUsage, at time.Time) error {
	if !c.mentions(certs) { // nearly always: no signature to be verified
		return nil
	}
	chains, err := verifyChain(certs, roots, usage, at)
	if err != nil {
		return err
	}
	var revoked *x509.Certificate
	for _, chain := range chains {
		if revoked = c.revokes(chain); revoked == nil {
			return nil
		}
	}
	return &PeerRevokedError{Serial: revoked.SerialNumber, Issuer: revoked.Issuer.String()}
}
