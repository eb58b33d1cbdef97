package identity

import (
	"crypto/tls"
	"crypto/x509"
	"time"
)

// Meeting is what each side of a connection within the process has seen of the other, in the form that a TLS
// handshake has: Client is what the server saw, Server what the client saw.
type Meeting struct{ Client, Server tls.ConnectionState }

// Meet judges two certificates of this process as a handshake between them would, with ClientTLS at one side and
// ServerTLS at the other: validity, chains to each other's roots, CAs, revocation, the identities in want, the trust
// domain. Both keys are ours, so that nothing has to be signed. Errors are the handshake's; nothing is counted.
func Meet(client, server *Certificate, want []ID, p Params) (m Meeting, err error) {
	m = Meeting{Client: client.shown(), Server: server.shown()}
	if err = client.checkServer(m.Server, want, p.Revocation.CRL()); err != nil {
		return m, err
	}
	if err = server.callers.verify(m.Client.PeerCertificates, x509.ExtKeyUsageClientAuth, time.Now()); err != nil {
		return m, &tls.CertificateVerificationError{UnverifiedCertificates: m.Client.PeerCertificates, Err: err}
	}
	return m, server.checkClient(m.Client, p.Revocation.CRL())
}

// shown is what the certificate's owner shows in a handshake.
func (c *Certificate) shown() tls.ConnectionState {
	certs := make([]*x509.Certificate, 0, 1+len(c.Intermediates))
	return tls.ConnectionState{NegotiatedProtocol: alpn, PeerCertificates: append(append(certs, c.Leaf),
		c.Intermediates...)}
}
