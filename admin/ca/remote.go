package ca

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"ztun/admin/istiod"
	"ztun/admin/pb/citadelpb"
	"ztun/proxy/identity"
)

// ErrClosed: the CA client's Run has ended, or Close was called.
var ErrClosed = errors.New("CA client is closed")

// SigningError is what the CA, or the way to it, answered in place of a certificate.
type SigningError struct {
	Code    codes.Code // gRPC's
	Message string
	Err     error
}

// Error is ztunnel's text (spec/dataplane.md Appendix B) with the hint of spec/controlplane.md 2.5.
func (e *SigningError) Error() string {
	return fmt.Sprintf("signing gRPC error (%s): %s%s", e.Code, e.Message, istiod.Hint(e.Message))
}

// clip bounds what the CA says, in bytes: it is logged, kept, dumped, and given to every connection that fails by it.
func clip(s string) string {
	const most = 2048
	if len(s) > most {
		s = s[:most] + "..."
	}
	return strings.ToValidUTF8(s, "?")
}

func (e *SigningError) Unwrap() error { return e.Err }

// Connector is the way to the CA; *istiod.Connector is one.
type Connector interface {
	Dial() (*grpc.ClientConn, error)
	Context(context.Context) (context.Context, error)
	Address() string
	Files() []string // what Dial reads: when one changes the channel is made anew
}

// RemoteOptions configure a Remote.
type RemoteOptions struct {
	Connector Connector
	// Impersonate: ask for others' identities by name, and insist on getting them (shared mode). Without it the CA
	// decides by the token whose certificate it is (dedicated mode), and a Manager takes what comes.
	Impersonate bool
	// Changed is called by Run when one of the connector's files has changed: the CA may have been replaced. May be nil.
	Changed func()
	Logger  *slog.Logger
}

// Remote is the Signer of machines with istiod: IstioCertificateService/CreateCertificate (spec/controlplane.md 2.7)
// over one channel that all calls share. It is made at the first call, and anew for the next call after its files have
// changed or it failed to connect; where that is impossible the old one goes on to be used. Safe for concurrent use.
type Remote struct {
	o    RemoteOptions
	log  *slog.Logger
	wait struct{ settle, poll time.Duration } // of watch

	mu     sync.Mutex
	ch     *channel // nil before the first call and when closed
	stale  bool     // ch is to be replaced
	closed bool
	stats  RemoteStats
}

// channel is a connection that ends with its last user once it was replaced.
type channel struct {
	conn  *grpc.ClientConn
	users int // calls under way, and Remote.ch
}

// RemoteStats are a Remote's counters.
type RemoteStats struct {
	Requests uint64 // calls of Sign
	// by gRPC code ("Unavailable"), "local" (files, token) or "answer" (what came is no certificate)
	Failures map[string]uint64
	Channels uint64 // channels made
	Kept     uint64 // times an old channel was used because a new one could not be made

	LastError   string // of the last failure
	LastErrorAt time.Time
	LastSuccess time.Time
}

// NewRemote makes a Remote. It connects when first used. Let Run run, or call Close in the end.
func NewRemote(o RemoteOptions) *Remote {
	r := &Remote{o: o, log: o.Logger}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	r.wait.settle, r.wait.poll = settle, poll
	r.stats.Failures = map[string]uint64{}
	return r
}

// Run watches the connector's files until ctx ends, then closes the client and returns nil. Sign works before and
// during Run.
func (r *Remote) Run(ctx context.Context) error {
	defer r.Close()
	if files := r.o.Connector.Files(); len(files) > 0 {
		start := true // for what has changed before it watched
		watch(ctx, files, maxTrustFile, r.log, r.wait.settle, r.wait.poll, func() {
			r.renew()
			if !start && r.o.Changed != nil {
				r.o.Changed()
			}
			start = false
		})
	}
	<-ctx.Done()
	return nil
}

// renew has the next request make a channel of its own.
func (r *Remote) renew() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ch != nil { // otherwise the first call will read them
		r.stale = true
		r.log.Info("the next request uses a new connection to the CA: its files may have changed", "address",
			r.o.Connector.Address())
	}
}

// maxTrustFile bounds what is read of a root or certificate file to see whether it has changed, in bytes.
const maxTrustFile = 4 << 20

// Close ends the client: calls under way fail, later ones get ErrClosed.
func (r *Remote) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	if r.ch == nil {
		return nil
	}
	err := r.ch.conn.Close()
	r.ch = nil
	return err
}

// Stats returns a copy of the counters.
func (r *Remote) Stats() RemoteStats {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.stats
	s.Failures = maps.Clone(s.Failures)
	return s
}

// Sign asks the CA. Errors: *SigningError, those of ParseChain, *identity.SANError (with Impersonate: the certificate
// is somebody else's), the connector's (a file, the token), ErrClosed.
func (r *Remote) Sign(ctx context.Context, id identity.ID, csr []byte, ttl time.Duration) (chain,
	roots []*x509.Certificate, err error) {
	chain, roots, kind, err := r.sign(ctx, id, csr, ttl)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stats.Requests++
	if err != nil {
		r.stats.Failures[kind]++
		r.stats.LastError, r.stats.LastErrorAt = err.Error(), time.Now()
		return nil, nil, err
	}
	r.stats.LastSuccess = time.Now()
	return chain, roots, nil
}

// sign makes the call; kind names the class of an error for RemoteStats.Failures.
func (r *Remote) sign(ctx context.Context, id identity.ID, csr []byte, ttl time.Duration) (chain,
	roots []*x509.Certificate, kind string, err error) {
	req := &citadelpb.IstioCertificateRequest{
		Csr:              string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr})),
		ValidityDuration: int64(ttl / time.Second),
	}
	if r.o.Impersonate {
		req.Metadata =
			&structpb.Struct{Fields: map[string]*structpb.Value{"ImpersonatedIdentity": structpb.NewStringValue(id.String())}}
	}
	if ctx, err = r.o.Connector.Context(ctx); err != nil {
		return nil, nil, "local", fmt.Errorf("asking the CA: %w", err)
	}
	ch, err := r.acquire()
	if err != nil {
		return nil, nil, "local", err
	}
	answer, err := citadelpb.NewIstioCertificateServiceClient(ch.conn).CreateCertificate(ctx, req)
	r.release(ch, status.Code(err) == codes.Unavailable)
	if err != nil {
		s := status.Convert(err)
		return nil, nil, s.Code().String(), &SigningError{Code: s.Code(), Message: clip(s.Message()), Err: err}
	}
	chain, roots, skipped, err := ParseChain(id, answer.GetCertChain())
	if skipped > 0 {
		r.log.Warn("root certificates from CA do not parse, skipped", "identity", id.String(), "skipped", skipped, "taken",
			len(roots))
	}
	if err != nil {
		return nil, nil, "answer", err
	}
	if uris := identity.URIs(chain[0].Extensions); r.o.Impersonate && (len(uris) == 0 || uris[0] != id.String()) {
		return nil, nil, "answer", &identity.SANError{Want: id}
	}
	return chain, roots, "", nil
}

// acquire takes the channel for one call, a new one if there is none that will do.
func (r *Remote) acquire() (*channel, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.closed:
		return nil, ErrClosed
	case r.ch == nil || r.stale:
		conn, err := r.o.Connector.Dial()
		if err != nil && r.ch == nil {
			return nil, fmt.Errorf("asking the CA: %w", err)
		}
		if err != nil { // stale remains: tried again at the next call
			r.stats.Kept++
			r.log.Warn("cannot make a new connection to the CA, going on with the old one", "error", err.Error())
			break
		}
		old := r.ch
		r.ch, r.stale = &channel{conn: conn, users: 1}, false
		r.stats.Channels++
		if old != nil {
			old.leave()
		}
	}
	r.ch.users++
	return r.ch, nil
}

// release gives a channel back. One that could not connect is replaced at the next call: that reads the roots anew and
// tries at once, where gRPC would repeat the last error until its own backoff is over.
func (r *Remote) release(ch *channel, failed bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if failed && ch == r.ch {
		r.stale = true
	}
	ch.leave()
}

// leave is called with Remote.mu held. Closing twice is harmless.
func (ch *channel) leave() {
	if ch.users--; ch.users == 0 {
		ch.conn.Close()
	}
}
