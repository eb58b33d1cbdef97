package identity

import (
	"crypto/tls"
	"crypto/x509"
	"sync"
	"sync/atomic"
	"time"
)

// Side is our side of a tunnel; ztunnel's metrics call it the reporter.
type Side uint8

const (
	ClientSide Side = iota // reporter="source": the peer is a server
	ServerSide             // reporter="destination"
)

// peerUsage is what the peer's certificate must be good for.
func (s Side) peerUsage() x509.ExtKeyUsage {
	if s == ClientSide {
		return x509.ExtKeyUsageServerAuth
	}
	return x509.ExtKeyUsageClientAuth
}

// maxTracked bounds the tunnels that are remembered for revocation.
const maxTracked = 1 << 18

// Revocation is the CRL in force and the tunnels that answer to it (spec/dataplane.md 8.6). It goes into Params, by
// which handshakes ask it; Track lets it cut tunnels that are open. The zero value has no CRL yet. Safe for
// concurrent use; a nil *Revocation is one that never revokes.
type Revocation struct {
	crl                 atomic.Pointer[CRL]
	rejected, untracked [2]atomic.Uint64

	mu      sync.Mutex // Replace, and the table
	tunnels map[*tracked]struct{}
}

// tracked is an open tunnel.
type tracked struct {
	certs []*x509.Certificate
	roots *x509.CertPool
	side  Side
	since time.Time
	cut   func(error)
}

// RevocationStats are by Side. Rejected: istio_crl_policy_rejections_total, handshakes refused and tunnels cut;
// Untracked: istio_crl_untracked_connections_total, tunnels beyond the bound, served without being remembered.
type RevocationStats struct {
	Rejected, Untracked [2]uint64
	Tracked             int
}

// Stats returns the counters.
func (r *Revocation) Stats() (s RevocationStats) {
	if r == nil {
		return s
	}
	for i := range s.Rejected {
		s.Rejected[i], s.Untracked[i] = r.rejected[i].Load(), r.untracked[i].Load()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	s.Tracked = len(r.tunnels)
	return s
}

// CRL is the set in force; nil if there is none.
func (r *Revocation) CRL() *CRL {
	if r == nil {
		return nil
	}
	return r.crl.Load()
}

// judge looks for a peer's certificates, whose chain was verified already, in the list.
func (l *CRL) judge(c *Certificate, cs tls.ConnectionState, side Side) error {
	return l.check(cs.PeerCertificates, c.Pool, side.peerUsage(), time.Now())
}

// counted counts a handshake that was refused for a revocation, and passes err on.
func (r *Revocation) counted(side Side, err error) error {
	if _, revoked := err.(*PeerRevokedError); revoked {
		r.rejected[side].Add(1)
	}
	return err
}

// Track remembers an open tunnel, made with our certificate c, until release is called, which must happen when the
// tunnel ends (more than once is harmless). When a CRL comes that revokes the peer, cut is called, at most once, from
// Replace's goroutine, with a *PeerRevokedError: it must end the tunnel soon and not wait for it. If the peer was
// revoked since the handshake, Track says so by that error at once, and release is nil. Beyond a bound of 262,144
// tunnels it does nothing and counts.
func (r *Revocation) Track(c *Certificate, cs tls.ConnectionState, side Side, cut func(error)) (release func(),
	err error) {
	if r == nil {
		return func() {}, nil
	}
	t := &tracked{cs.PeerCertificates, c.Pool, side, time.Now(), cut}
	r.mu.Lock()
	if len(r.tunnels) >= maxTracked {
		r.mu.Unlock()
		r.untracked[side].Add(1)
		return func() {}, nil
	}
	if r.tunnels == nil {
		r.tunnels = map[*tracked]struct{}{}
	}
	r.tunnels[t] = struct{}{}
	crl := r.crl.Load() // under the lock: a later one will find t
	r.mu.Unlock()
	if err := t.check(crl); err != nil && r.forget(t) {
		r.rejected[side].Add(1)
		return nil, err
	}
	return func() { r.forget(t) }, nil
}

func (t *tracked) check(crl *CRL) error {
	return crl.check(t.certs, t.roots, t.side.peerUsage(), t.since)
}

// forget reports whether the tunnel was remembered until now.
func (r *Revocation) forget(t *tracked) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, ok := r.tunnels[t]
	delete(r.tunnels, t)
	return ok
}

// Replace puts a set in force (nil: none) and cuts the tunnels whose peers it revokes, judged as of the time when they
// were opened: that a certificate has ended since is no reason (checklist 136). It returns how many it cut.
func (r *Revocation) Replace(crl *CRL) (cut int) {
	r.mu.Lock()
	r.crl.Store(crl)
	var suspects []*tracked
	for t := range r.tunnels {
		if crl.mentions(t.certs) {
			suspects = append(suspects, t)
		}
	}
	r.mu.Unlock()
	for _, t := range suspects { // signatures are verified here, outside the lock
		if err := t.check(crl); err != nil && r.forget(t) {
			r.rejected[t.side].Add(1)
			t.cut(err)
			cut++
		}
	}
	return cut
}
