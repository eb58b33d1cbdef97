package control

import (
	"context"
	"encoding/pem"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"ztun/admin/pb/citadelpb"
	"ztun/proxy/identity"
)

// Lives of workload certificates: istiod's.
const (
	defaultTTL = 24 * time.Hour
	maxTTL     = 2160 * time.Hour
)

// caServer is istiod's certificate service.
type caServer struct {
	citadelpb.UnimplementedIstioCertificateServiceServer
	*Server
}

// CreateCertificate signs for the identity of a workload of the caller's node (ImpersonatedIdentity), or without one
// for the node's proxy itself. Codes and texts are istiod's; the reason follows a colon.
func (s caServer) CreateCertificate(ctx context.Context, req *citadelpb.IstioCertificateRequest) (*citadelpb.IstioCertificateResponse, error) {
	c := callerOf(ctx)
	out, err := s.sign(ctx, c, req)
	if err != nil {
		s.counters.signRefused.Add(1)
		s.refusal("certificate refused", "node", c.node, "error", err.Error())
		return nil, err
	}
	s.counters.signed.Add(1)
	return out, nil
}

func (s caServer) sign(ctx context.Context, c *caller, req *citadelpb.IstioCertificateRequest) (*citadelpb.IstioCertificateResponse, error) {
	if !s.rates.take(c.node, time.Now()) {
		s.counters.signLimited.Add(1)
		return nil, status.Errorf(codes.ResourceExhausted, "node %s asks for certificates too fast: at most %d at once and %d per second", c.node, s.rates.burst, s.rates.perSecond)
	}
	id := nodeIdentity(s.authority.TrustDomain())
	if v := req.GetMetadata().GetFields()["ImpersonatedIdentity"].GetStringValue(); v != "" {
		var err error
		if id, err = identity.Parse(v); err != nil {
			return nil, status.Errorf(codes.Unauthenticated, "request impersonation authentication failure: %v", err)
		}
		snap := s.feed.get()
		if snap == nil {
			return nil, status.Error(codes.Unavailable, "the control plane has not loaded its directory yet; see ztun control status")
		}
		if !snap.runs(c.node, id) {
			return nil, status.Errorf(codes.Unauthenticated, "request impersonation authentication failure: no workload of %s has node %q", id, c.node)
		}
	}
	ttl := time.Duration(min(max(req.ValidityDuration, 0), 1<<32)) * time.Second
	switch {
	case ttl == 0:
		ttl = defaultTTL
	case ttl > maxTTL:
		return nil, status.Errorf(codes.InvalidArgument, "CSR signing error (requested TTL %v is greater than the max allowed TTL %v)", ttl, maxTTL)
	}
	block, _ := pem.Decode([]byte(req.Csr))
	if block == nil {
		return nil, status.Error(codes.InvalidArgument, "CSR signing error (the CSR is not PEM)")
	}
	select {
	case s.signing <- struct{}{}:
		defer func() { <-s.signing }()
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	chain, _, err := s.authority.Sign(ctx, id, block.Bytes, ttl)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "CSR signing error (%v)", err)
	}
	out := &citadelpb.IstioCertificateResponse{}
	for _, cert := range chain {
		out.CertChain = append(out.CertChain, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})))
	}
	out.CertChain = append(out.CertChain, s.authority.rootsPEM())
	return out, nil
}

// rates is a token bucket per node. Nodes are those with credentials, so the table is bounded.
type rates struct {
	burst, perSecond int

	mu      sync.Mutex
	buckets map[string]*bucket
}

type bucket struct {
	tokens float64
	at     time.Time
}

func newRates(burst, perSecond int) *rates {
	return &rates{burst: burst, perSecond: perSecond, buckets: make(map[string]*bucket)}
}

func (r *rates) take(node string, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	b := r.buckets[node]
	if b == nil {
		if len(r.buckets) >= 2*maxNodes { // of nodes that have left
			clear(r.buckets)
		}
		b = &bucket{tokens: float64(r.burst), at: now}
		r.buckets[node] = b
	}
	b.tokens = min(float64(r.burst), b.tokens+max(0, now.Sub(b.at).Seconds())*float64(r.perSecond))
	b.at = now
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}
