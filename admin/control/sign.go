package control

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"maps"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"ztun/admin/pb/citadelpb"
	"ztun/proxy/identity"
)

// Lives of certificates. What is asked for beyond maxTTL is refused, as by istiod; what is longer than
// Options.MaxLife is shortened: who asks for a week can live with a day, and a node that has left is to lose what it
// has.
const (
	defaultTTL     = 24 * time.Hour
	maxTTL         = 2160 * time.Hour
	minLife        = time.Minute
	DefaultMaxLife = 24 * time.Hour
)

// caServer is istiod's certificate service.
type caServer struct {
	citadelpb.UnimplementedIstioCertificateServiceServer
	*Server
}

// caServiceDesc is the certificate service with its call handled as a stream, which is the same on the wire: so a
// call is counted before its request is read, which may be large.
func caServiceDesc() *grpc.ServiceDesc {
	return &grpc.ServiceDesc{
		ServiceName: citadelpb.IstioCertificateService_ServiceDesc.ServiceName,
		HandlerType: (*citadelpb.IstioCertificateServiceServer)(nil),
		Streams: []grpc.StreamDesc{{
			StreamName: "CreateCertificate",
			Handler: func(srv any, st grpc.ServerStream) error {
				s := srv.(caServer)
				c := callerOf(st.Context())
				if err := s.rates.begin(c.node, time.Now()); err != nil {
					s.counters.signLimited.Add(1)
					s.counters.signRefused.Add(1)
					s.refusal("certificate refused", "node", c.node, "error", err.Error())
					return status.Error(codes.ResourceExhausted, err.Error())
				}
				defer s.rates.end(c.node)
				req := &citadelpb.IstioCertificateRequest{}
				if err := st.RecvMsg(req); err != nil {
					return err
				}
				out, err := s.CreateCertificate(st.Context(), req)
				if err != nil {
					return err
				}
				return st.SendMsg(out)
			},
		}},
	}
}

// CreateCertificate signs for the identity of a workload of the caller's node (ImpersonatedIdentity), or without one
// for the node's proxy itself; for a workload that is a member by itself its own identity and no other, named or not.
// Codes and texts are istiod's; the reason follows a colon.
func (s caServer) CreateCertificate(ctx context.Context, req *citadelpb.IstioCertificateRequest) (
	*citadelpb.IstioCertificateResponse, error) {
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

func (s caServer) sign(ctx context.Context, c *caller, req *citadelpb.IstioCertificateRequest) (
	*citadelpb.IstioCertificateResponse, error) {
	impersonated := req.GetMetadata().GetFields()["ImpersonatedIdentity"].GetStringValue()
	id, err := s.allowed(c, impersonated)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode([]byte(req.Csr))
	if block == nil {
		return nil, status.Error(codes.InvalidArgument, "CSR signing error (the CSR is not PEM)")
	}
	// A node that renews its client certificate gets one that lives as long as join's: it opens nothing that the node's
	// token or key would not. A workload's is one for the mesh as well, and lives no longer than those.
	joinCert := impersonated == "" && s.ownKey(c, block.Bytes)
	ttl := time.Duration(min(max(req.ValidityDuration, 0), 1<<32)) * time.Second
	switch {
	case ttl == 0:
		ttl = min(defaultTTL, s.maxLife)
	case joinCert && c.workload == "":
		ttl = min(ttl, DefaultLife)
	case ttl > maxTTL:
		return nil,
			status.Errorf(codes.InvalidArgument, "CSR signing error (requested TTL %v is greater than the max allowed TTL %v)",
				ttl, maxTTL)
	default:
		ttl = min(ttl, s.maxLife)
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
	if err := s.issued.add(c.node, chain[0], time.Now()); err != nil {
		return nil,
			status.Errorf(codes.ResourceExhausted, "the certificate could not be noted for the day that the node leaves (%v)",
				err)
	}
	// Noted first, looked at second: who leaves meanwhile gets nothing, or what will be revoked.
	if s.nodes.rescanChanged(); !s.nodes.valid(c) {
		return nil, status.Error(codes.Unauthenticated, "the node's credentials have been replaced or removed")
	}
	if joinCert {
		if err := s.nodes.renewed(c, chain[0].NotAfter); err != nil {
			s.refusal("a node has a new client certificate, and the status may show the end of the old one", "node", c.node,
				"error", err.Error())
		}
	}
	out := &citadelpb.IstioCertificateResponse{}
	for _, cert := range chain {
		out.CertChain = append(out.CertChain, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})))
	}
	out.CertChain = append(out.CertChain, s.authority.rootsPEM())
	return out, nil
}

// allowed is the identity for which a caller gets a certificate when it asks for impersonated ("": its own).
func (s caServer) allowed(c *caller, impersonated string) (id identity.ID, err error) {
	const failure = "request impersonation authentication failure: "
	if impersonated != "" {
		if id, err = identity.Parse(impersonated); err != nil {
			return id, status.Errorf(codes.Unauthenticated, failure+"%v", err)
		}
	} else if c.workload == "" {
		return nodeIdentity(s.authority.TrustDomain()), nil
	}
	snap := s.feed.get()
	if snap == nil {
		return id, status.Error(codes.Unavailable,
			"the control plane has not loaded its directory yet; see ztun control status")
	}
	if c.workload == "" {
		if !snap.runs(c.node, id) {
			return id, status.Errorf(codes.Unauthenticated, failure+"no workload of %s has node %q", id, c.node)
		}
		return id, nil
	}
	own, ok := snap.identityOf(c.workload)
	if !ok {
		return id, status.Errorf(codes.Unauthenticated, failure+"the mesh has no record of workload %s (uid %s) any more",
			c.node, c.workload)
	}
	if impersonated != "" && id != own {
		return id, status.Errorf(codes.Unauthenticated, failure+"workload %s is %s, not %s", c.node, own, id)
	}
	return own, nil
}

// ownKey reports whether a request is for the key of the node's client certificate: the node renews that.
func (s caServer) ownKey(c *caller, csr []byte) bool {
	r, err := x509.ParseCertificateRequest(csr)
	f, ok := s.nodes.file(c.node)
	if err != nil || !ok {
		return false
	}
	sum := sha256.Sum256(r.RawSubjectPublicKeyInfo)
	return f.Key == hex.EncodeToString(sum[:])
}

// rates is a token bucket and a number of calls per node. Nodes are those with credentials, so the table is bounded.
type rates struct {
	burst, perSecond, atOnce int

	mu      sync.Mutex
	buckets map[string]*bucket
}

type bucket struct {
	busy   int // calls under way
	tokens float64
	at     time.Time
}

func newRates(burst, perSecond, atOnce int) *rates {
	return &rates{burst: burst, perSecond: perSecond, atOnce: atOnce, buckets: make(map[string]*bucket)}
}

// begin admits a call, which end follows, or says why not.
func (r *rates) begin(node string, now time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	b := r.buckets[node]
	if b == nil {
		if len(r.buckets) >= 2*maxNodes { // of nodes that have left
			maps.DeleteFunc(r.buckets, func(_ string, b *bucket) bool { return b.busy == 0 })
		}
		b = &bucket{tokens: float64(r.burst), at: now}
		r.buckets[node] = b
	}
	b.tokens = min(float64(r.burst), b.tokens+max(0, now.Sub(b.at).Seconds())*float64(r.perSecond))
	b.at = now
	switch {
	case b.busy >= r.atOnce:
		return fmt.Errorf("node %s has %d certificate requests under way already", node, b.busy)
	case b.tokens < 1:
		return fmt.Errorf("node %s asks for certificates too fast: at most %d at first and %d per second", node, r.burst,
			r.perSecond)
	}
	b.tokens--
	b.busy++
	return nil
}

func (r *rates) end(node string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.buckets[node].busy--
}
