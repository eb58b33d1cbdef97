package proxy

import (
	"crypto/tls"
	"errors"

	"ztun/proxy/hbone"
	"ztun/proxy/identity"
)

// proof is what a handshake has shown: our certificate and the peer's.
type proof struct {
	cert *identity.Certificate
	cs   tls.ConnectionState
}

// track ties an open tunnel to the revocation list (CRL_PATH): when its peer is revoked, abort is called. forget is to
// be called at the tunnel's end.
func (p *Proxy) track(side identity.Side, shown proof, abort func(error)) (forget func(), err error) {
	return p.o.Config.TLS.Revocation.Track(shown.cert, shown.cs, side, abort)
}

// opened is told by the pool of a new tunnel, whose handshake has shown what is given.
func (p *Proxy) opened(cc *hbone.ClientConn, shown proof) (ended func()) {
	forget, err := p.track(identity.ClientSide, shown, cc.Abort)
	if err != nil { // revoked since the handshake
		cc.Abort(err)
		return nil
	}
	return forget
}

// revokedInstead says why a connection broke if it was for its peer's revocation (spec dataplane 8.6).
func revokedInstead(err error) error {
	var revoked *identity.PeerRevokedError
	var broken *hbone.ConnError
	if errors.As(err, &broken) && errors.As(err, &revoked) {
		return fail(kindRevoked, nil)
	}
	return err
}
