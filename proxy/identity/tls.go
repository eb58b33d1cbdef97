package identity

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"slices"
	"time"
)

// alpn is the only application protocol of HBONE.
const alpn = "h2"

// refuseALPN stands in NextProtos of the configuration that must agree with no client. A client that offers this very
// name gets past ALPN and is refused by checkALPN.
const refuseALPN = "ztun-refuses"

// Params are the choices that ztunnel leaves to its environment. The zero value is the default.
type Params struct {
	TLS12 bool // TLS12_ENABLED: accept and offer TLS 1.2 as well, with the ECDHE AES-GCM suites
	PQC   bool // COMPLIANCE_POLICY=pqc: X25519MLKEM768 is the only group, hence TLS 1.3 the only version

	Revocation *Revocation // CRL_PATH: what handshakes and open tunnels answer to; nil: nothing is revoked
}

// ServerTLS returns the configuration for accepting HBONE with this certificate (spec/dataplane.md 4.1): a client
// certificate is required, must chain to c.Pool for client authentication, must not be a CA, and one of its SPIFFE
// SANs must be of the trust domain of c's leaf (unless c's leaf has no SPIFFE SAN), and p.Revocation must not revoke
// it. ALPN h2 or none; SNI is ignored; no tickets. Handshake errors: *PeerTrustDomainError, *PeerRevokedError,
// *PeerCAError, *PeerALPNError, *tls.CertificateVerificationError.
//
// The configuration is made once per certificate and p, and shared: calling this for every connection costs nothing,
// and it must not be modified.
func ServerTLS(c *Certificate, p Params) *tls.Config {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.server {
		if s.params == p {
			return s.cfg
		}
	}
	cfg := newServerTLS(c, p)
	c.server = append(c.server, serverConfig{p, cfg})
	return cfg
}

func newServerTLS(c *Certificate, p Params) *tls.Config {
	cfg := p.Base()
	cfg.Certificates = []tls.Certificate{c.TLS}
	cfg.ClientAuth = tls.RequireAndVerifyClientCert
	cfg.ClientCAs = c.Pool
	cfg.SessionTicketsDisabled = true
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		return p.Revocation.counted(ServerSide, c.checkClient(cs, p.Revocation.CRL()))
	}

	refuse := cfg.Clone()
	refuse.NextProtos = []string{refuseALPN}
	cfg.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if len(hello.SupportedProtos) > 0 && !slices.Contains(hello.SupportedProtos, alpn) {
			return refuse, nil
		}
		return nil, nil
	}
	return cfg
}

// ClientTLS returns the configuration for dialling a peer that must present one of the identities in want, in any
// of its URI SANs (spec/dataplane.md 2.8); with an empty want every peer is refused. Its chain must reach c.Pool for
// server authentication. No SNI, ALPN h2, no resumption; our certificate is presented whatever CAs the server names.
// Handshake errors: *PeerSANError, *PeerRevokedError, *PeerCAError, *PeerALPNError, *tls.CertificateVerificationError.
// want is not copied: do not change it. Cheap (no parsing): call it per dial.
func ClientTLS(c *Certificate, want []ID, p Params) *tls.Config {
	cfg := p.Base()
	// A configured list would be filtered by the CA names in the server's request and might leave us without a
	// certificate; rustls, like this, always presents the one it has.
	cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &c.TLS, nil }
	// crypto/tls can only verify a server against a host name. HBONE peers have none: checkServer does all of it.
	cfg.InsecureSkipVerify = true
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		return p.Revocation.counted(ClientSide, c.checkServer(cs, want, p.Revocation.CRL()))
	}
	return cfg
}

// Base is what all TLS of the program shares, both roles and the control plane's channels (spec/dataplane.md 8.5):
// versions, groups, suites, ALPN h2. It is the caller's. crypto/tls orders suites and groups itself.
func (p Params) Base() *tls.Config {
	cfg := &tls.Config{
		MinVersion:       tls.VersionTLS13,
		NextProtos:       []string{alpn},
		CurvePreferences: []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256, tls.CurveP384},
		// Records of full size from the start: tunnels carry bulk, and a stream's first bytes are not a web page's.
		DynamicRecordSizingDisabled: true,
	}
	if p.PQC {
		cfg.CurvePreferences = []tls.CurveID{tls.X25519MLKEM768}
	} else if p.TLS12 {
		cfg.MinVersion = tls.VersionTLS12
		cfg.CipherSuites = []uint16{ // of TLS 1.2 alone
			tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
			tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
		}
	}
	return cfg
}

// checkClient runs after crypto/tls verified the client's chain.
func (c *Certificate) checkClient(cs tls.ConnectionState, crl *CRL) error {
	leaf, err := checkPeer(cs)
	if err != nil {
		return err
	}
	if err := crl.judge(c, cs, ServerSide); err != nil || !c.strict {
		return err
	}
	same := false
	eachURI(leaf.Extensions, func(uri string) bool {
		id, err := Parse(uri)
		same = err == nil && id.TrustDomain == c.trust
		return !same
	})
	if !same {
		return &PeerTrustDomainError{Want: c.trust, Got: All(leaf)}
	}
	return nil
}

// checkServer is all the verification that a server gets: chain, then revocation, then SAN, in ztunnel's order.
func (c *Certificate) checkServer(cs tls.ConnectionState, want []ID, crl *CRL) error {
	leaf, err := checkPeer(cs)
	if err != nil {
		return err
	}
	if err := c.peers.verify(cs.PeerCertificates, x509.ExtKeyUsageServerAuth, time.Now()); err != nil {
		return &tls.CertificateVerificationError{UnverifiedCertificates: cs.PeerCertificates, Err: err}
	}
	if err := crl.judge(c, cs, ClientSide); err != nil {
		return err
	}
	found := false
	eachURI(leaf.Extensions, func(uri string) bool {
		id, err := Parse(uri)
		found = err == nil && slices.Contains(want, id)
		return !found
	})
	if !found {
		return &PeerSANError{Want: want, Got: All(leaf)}
	}
	return nil
}

// checkPeer makes the checks of both roles and returns the peer's leaf.
func checkPeer(cs tls.ConnectionState) (*x509.Certificate, error) {
	if cs.NegotiatedProtocol != "" && cs.NegotiatedProtocol != alpn {
		return nil, &PeerALPNError{Got: cs.NegotiatedProtocol}
	}
	if len(cs.PeerCertificates) == 0 { // unreachable: crypto/tls has refused; never trust by accident
		return nil, errors.New("identity verification error: peer presented no certificate")
	}
	leaf := cs.PeerCertificates[0]
	if leaf.IsCA {
		return nil, &PeerCAError{Subject: leaf.Subject.String()}
	}
	return leaf, nil
}
