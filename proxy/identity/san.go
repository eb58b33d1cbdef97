package identity

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// tagURI is GeneralName's uniformResourceIdentifier [6] IA5String (RFC 5280, 4.2.1.6): context-specific, primitive.
const tagURI cbasn1.Tag = 0x80 | 6

// sanOID returns subjectAltName's object identifier (RFC 5280, 4.2.1.6).
func sanOID() asn1.ObjectIdentifier { return asn1.ObjectIdentifier{2, 5, 29, 17} }

func isSAN(oid asn1.ObjectIdentifier) bool {
	return len(oid) == 4 && oid[0] == 2 && oid[1] == 5 && oid[2] == 29 && oid[3] == 17
}

// SANExtension is the one extension that ztunnel's certificate requests ask for: subjectAltName, critical, with the
// SPIFFE URI alone (spec/dataplane.md 8.1). An id that is not ASCII has no such form: the error is a *ParseError.
func SANExtension(id ID) (pkix.Extension, error) {
	uri := id.String()
	for i := range len(uri) {
		if uri[i] >= 0x80 {
			return pkix.Extension{}, &ParseError{Text: uri}
		}
	}
	var b cryptobyte.Builder
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1(tagURI, func(b *cryptobyte.Builder) { b.AddBytes([]byte(uri)) })
	})
	der, err := b.Bytes()
	if err != nil {
		return pkix.Extension{}, fmt.Errorf("subjectAltName of %s: %w", uri, err)
	}
	return pkix.Extension{Id: sanOID(), Critical: true, Value: der}, nil
}

// eachURI calls f with every URI of the subjectAltName extension among exts, byte for byte as it was signed, until f
// returns false. Malformed parts end the walk: crypto/x509 has refused such a certificate before it gets here.
func eachURI(exts []pkix.Extension, f func(uri string) bool) {
	for i := range exts {
		if !isSAN(exts[i].Id) {
			continue
		}
		s := cryptobyte.String(exts[i].Value)
		var names cryptobyte.String
		if !s.ReadASN1(&names, cbasn1.SEQUENCE) {
			return
		}
		for !names.Empty() {
			var name cryptobyte.String
			var tag cbasn1.Tag
			if !names.ReadAnyASN1(&name, &tag) {
				return
			}
			if tag == tagURI && !f(string(name)) {
				return
			}
		}
	}
}

// First returns the first SPIFFE identity among a certificate's URI SANs, in their order; URIs of other forms are
// passed over. It is the identity that policy, metrics and logs use (spec/dataplane.md 4.1).
func First(cert *x509.Certificate) (id ID, ok bool) {
	eachURI(cert.Extensions, func(uri string) bool {
		parsed, err := Parse(uri)
		if err == nil {
			id, ok = parsed, true
		}
		return !ok
	})
	return id, ok
}

// All returns every SPIFFE identity among a certificate's URI SANs, in order.
func All(cert *x509.Certificate) []ID {
	var ids []ID
	eachURI(cert.Extensions, func(uri string) bool {
		if id, err := Parse(uri); err == nil {
			ids = append(ids, id)
		}
		return true
	})
	return ids
}

// URIs returns the URI SANs among a certificate's or a request's extensions, byte for byte.
func URIs(exts []pkix.Extension) []string {
	var uris []string
	eachURI(exts, func(uri string) bool {
		uris = append(uris, uri)
		return true
	})
	return uris
}

// PeerID returns the identity of the other end of a finished handshake: the first SPIFFE URI SAN of its leaf. False:
// it presented no certificate, or one without a SPIFFE id. It says nothing about trust: ServerTLS and ClientTLS do.
func PeerID(cs tls.ConnectionState) (ID, bool) {
	if len(cs.PeerCertificates) == 0 {
		return ID{}, false
	}
	return First(cs.PeerCertificates[0])
}
