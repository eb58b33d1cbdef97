package main

import (
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"ztun/admin/ca"
	"ztun/proxy/identity"
	"ztun/proxy/state"
)

// ownSigner is the way to the CA of a process that is one workload: it asks in that workload's name and in no other, so
// that whatever goes wrong elsewhere in here, no other's key is ever held.
type ownSigner struct {
	ca.Signer
	of   state.WorkloadInfo
	log  *slog.Logger
	lost *serverLost // is told how it goes

	mu    sync.Mutex
	other string    // whose certificate came last, if not the one that was asked for
	ends  time.Time // when the last one does; zero: there was none
}

// Sign implements ca.Signer. In dedicated mode the CA decides by our token whose certificate it is; as in ztunnel that
// is taken as it comes, and unlike there the log says so once.
func (s *ownSigner) Sign(ctx context.Context, id identity.ID, csr []byte, ttl time.Duration) (chain,
	roots []*x509.Certificate, err error) {
	if id.Namespace != s.of.Namespace || id.ServiceAccount != s.of.ServiceAccount {
		return nil, nil, fmt.Errorf("this process is %s alone and asks for no certificate of %s", s.of, id)
	}
	chain, roots, err = s.Signer.Sign(ctx, id, csr, ttl)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.lost.trouble(err)
		if !s.ends.IsZero() && time.Now().After(s.ends) {
			s.lost.ended(s.ends) // the Manager asks once more when it ends
		}
		return nil, nil, err
	}
	s.lost.connected()
	if len(chain) == 0 {
		return chain, roots, nil
	}
	s.ends = chain[0].NotAfter
	got := ""
	if uris := identity.URIs(chain[0].Extensions); len(uris) > 0 && uris[0] != id.String() {
		got = uris[0]
	}
	if got != s.other && got != "" {
		s.log.Warn("the CA takes this process for another: peers will see the identity that it has given, and refuse us "+
			"where they expect the other (is the token that of the workload's service account?)", "given", got, "wanted", id.String())
	}
	s.other = got
	return chain, roots, nil
}
