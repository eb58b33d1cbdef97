package identity

import (
	"fmt"
	"math/big"
)

// The errors of this package are types, so that the proxy can map them to flags and log texts with errors.As. The
// wording is ztunnel's (spec/dataplane.md, Appendix B), complete for what a peer did wrong and without the leading
// "identity error: " (which the proxy adds) for what went wrong on our own side.

// ParseError says that a text is no SPIFFE identity of Istio's form.
type ParseError struct{ Text string }

func (e *ParseError) Error() string { return "invalid spiffe identity: " + e.Text }

// SANError says that the CA issued a certificate whose first URI SAN is not the identity that was asked for.
type SANError struct{ Want ID }

func (e *SANError) Error() string { return "did not find expected SAN: " + e.Want.String() }

// EmptyChainError says that the CA's answer holds no certificate, or no root (NoRoot).
type EmptyChainError struct {
	ID     ID
	NoRoot bool
}

func (e *EmptyChainError) Error() string {
	if e.NoRoot {
		return "no root certificate present in the chain returned from CA for: " + e.ID.String()
	}
	return "chain returned from CA is empty for: " + e.ID.String()
}

// KeyMismatchError says that the leaf certificate does not belong to the key it was requested for.
type KeyMismatchError struct{ ID ID }

func (e *KeyMismatchError) Error() string {
	return "certificate does not belong to the requested key for: " + e.ID.String()
}

// PeerSANError says that a server presented none of the identities that the client expected; Got holds its SPIFFE SANs.
type PeerSANError struct{ Want, Got []ID }

func (e *PeerSANError) Error() string {
	return "identity verification error: peer did not present the expected SAN (" + Join(e.Want) + "), got " + Join(e.Got)
}

// PeerTrustDomainError says that a client's certificate is of another trust domain; Got holds its SPIFFE SANs.
type PeerTrustDomainError struct {
	Want string
	Got  []ID
}

func (e *PeerTrustDomainError) Error() string {
	return "identity verification error: peer did not present the expected trustdomain (" + e.Want + "), got " +
		Join(e.Got)
}

// PeerCAError says that a peer presented a CA certificate as its own.
type PeerCAError struct{ Subject string }

func (e *PeerCAError) Error() string {
	return "identity verification error: peer presented a CA certificate as its own: " + e.Subject
}

// PeerRevokedError says that a certificate of the peer's chain, its own or a CA's, is on its issuer's revocation
// list. (For a tunnel that is cut ztunnel logs "connection closed: peer certificate revoked by CRL" and the flag
// CERT_REVOKED.)
type PeerRevokedError struct {
	Serial *big.Int
	Issuer string
}

func (e *PeerRevokedError) Error() string {
	return fmt.Sprintf("identity verification error: peer certificate revoked by CRL: serial number %d of %s", e.Serial,
		e.Issuer)
}

// PeerALPNError says that the handshake agreed on a protocol that is not HTTP/2.
type PeerALPNError struct{ Got string }

func (e *PeerALPNError) Error() string {
	return "identity verification error: peer negotiated the application protocol " + e.Got + ", not h2"
}
