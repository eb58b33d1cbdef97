package control

import (
	"context"
	"errors"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"ztun/admin/pb/discoverypb"
	"ztun/admin/xds"
)

// maxTypes is how many types one stream may ask for; two are served.
const maxTypes = 8

// feed hands the newest snapshot to any number of readers. Safe for concurrent use.
type feed struct {
	mu      sync.Mutex
	snap    *snapshot
	changed chan struct{}
}

func newFeed() *feed { return &feed{changed: make(chan struct{})} }

func (f *feed) publish(s *snapshot) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.snap = s
	close(f.changed)
	f.changed = make(chan struct{})
}

// watch returns the newest snapshot (nil before the first) and a channel that is closed when there is a newer one.
func (f *feed) watch() (*snapshot, <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.snap, f.changed
}

func (f *feed) get() *snapshot {
	s, _ := f.watch()
	return s
}

// adsServer is the discovery service.
type adsServer struct {
	discoverypb.UnimplementedAggregatedDiscoveryServiceServer
	*Server
}

// stream is one node's stream: the rim around its subscriptions. Its goroutine alone touches types; what the status
// shows of them is copied under mu after every step.
type stream struct {
	*Server
	caller *caller
	rpc    grpc.BidiStreamingServer[discoverypb.DeltaDiscoveryRequest, discoverypb.DeltaDiscoveryResponse]
	since  time.Time
	remote string
	types  map[string]*subscription

	mu     sync.Mutex
	nodeID string
	shown  []TypeStatus
	behind map[string]time.Time // when a type fell behind
}

// DeltaAggregatedResources serves one stream until it ends, its node's credentials do, or a request is not acceptable.
func (s adsServer) DeltaAggregatedResources(rpc grpc.BidiStreamingServer[discoverypb.DeltaDiscoveryRequest,
	discoverypb.DeltaDiscoveryResponse]) error {
	st := &stream{
		Server: s.Server, caller: callerOf(rpc.Context()), rpc: rpc, since: time.Now(),
		types: make(map[string]*subscription), behind: make(map[string]time.Time),
	}
	if p, ok := peer.FromContext(rpc.Context()); ok {
		st.remote = p.Addr.String()
	}
	if err := s.enter(st); err != nil {
		s.counters.streamsRefused.Add(1)
		return err
	}
	defer s.leave(st)
	s.logger.Info("node connected", "node", st.caller.node, "peer", st.remote, "auth", st.caller.how)
	err := st.serve()
	s.logger.Info("node disconnected", "node", st.caller.node, "peer", st.remote, "reason", reason(err))
	return err
}

func reason(err error) string {
	if err == nil {
		return "the stream ended"
	}
	return err.Error()
}

func (st *stream) serve() error {
	ctx := st.rpc.Context()
	requests := make(chan *discoverypb.DeltaDiscoveryRequest)
	ended := make(chan error, 1)
	// Recv can be interrupted only by the end of the call, that is by returning from here: the server waits for the
	// reader when it closes.
	st.readers.Go(func() {
		for {
			req, err := st.rpc.Recv()
			if err != nil {
				ended <- err
				return
			}
			select {
			case requests <- req:
			case <-ctx.Done():
				return
			}
		}
	})
	first := time.NewTimer(st.limits.firstRequest)
	defer first.Stop()
	for {
		snap, newer := st.feed.watch()
		revoked := st.nodes.watch()
		if !st.nodes.valid(st.caller) {
			return status.Error(codes.Unauthenticated,
				"authentication failure: the node's credentials have been replaced or removed")
		}
		if err := st.send(snap); err != nil {
			return err
		}
		select {
		case req := <-requests:
			first.Stop()
			if err := st.request(req); err != nil {
				return err
			}
		case <-newer:
		case <-revoked:
		case <-first.C:
			return status.Errorf(codes.DeadlineExceeded, "no request within %v", st.limits.firstRequest)
		case err := <-ended:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err // what of a request was too large or no request, say
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// request takes in one request of any type.
func (st *stream) request(req *discoverypb.DeltaDiscoveryRequest) error {
	st.counters.requests.Add(1)
	if len(st.types) == 0 || req.Node != nil {
		if err := st.checkNode(req.Node); err != nil {
			st.counters.denied.Add(1)
			return err
		}
	}
	d := st.types[req.TypeUrl]
	if d == nil {
		if len(st.types) == maxTypes {
			return status.Errorf(codes.ResourceExhausted, "more than %d types on one stream", maxTypes)
		}
		if req.TypeUrl != typeAddress && req.TypeUrl != typeAuthorization {
			st.logger.Warn("node asks for a type that is not served: the answer is empty", "node", st.caller.node, "type",
				clip(req.TypeUrl, 200))
		}
		d = newSubscription(req.TypeUrl, st.caller.node)
		d.workload = st.caller.workload
		st.types[req.TypeUrl] = d
	}
	d.publish(st.feed.get())
	before := d.stats
	if err := d.request(req, time.Now()); err != nil {
		return status.Errorf(codes.ResourceExhausted, "%v", err)
	}
	if d.stats.nacks > before.nacks {
		st.counters.nacks.Add(1)
		st.logger.Warn("node rejects resources", "node", st.caller.node, "type", typeName(d.typeURL), "nonce",
			d.stats.lastNACKNonce, "error", d.stats.lastNACK)
	}
	st.counters.acks.Add(d.stats.acks - before.acks)
	st.counters.stale.Add(d.stats.stale - before.stale)
	return nil
}

// checkNode admits a node under its own name only. A workload that is a member by itself may run on any node or none.
func (st *stream) checkNode(n *discoverypb.Node) error {
	if n == nil || n.Id == "" {
		return status.Error(codes.InvalidArgument, "missing node information")
	}
	name := n.GetMetadata().GetFields()["NODE_NAME"].GetStringValue()
	if name != st.caller.node && st.caller.workload == "" {
		return status.Errorf(codes.PermissionDenied,
			"no identities of the caller matched NODE_NAME %q: its credentials are those of node %q (NODE_NAME must be what "+
				"was given to ztun control join)", clip(name, 300), st.caller.node)
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	st.nodeID = clip(n.Id, 1000)
	return nil
}

// send sends what there is to say, one message per type. While a node does not read, this waits; what it says next is
// then made from the snapshot that is newest by that time.
func (st *stream) send(snap *snapshot) error {
	version := snap.number()
	for _, url := range slices.Sorted(maps.Keys(st.types)) {
		d := st.types[url]
		d.publish(snap)
		m := d.next(st.limits.message)
		if m == nil {
			continue
		}
		d.sent(m, time.Now())
		st.show(version)
		for _, d := range st.types {
			d.release()
		}
		if err := st.rpc.Send(m.encode(url)); err != nil {
			return err
		}
		st.counters.messages.Add(1)
		st.counters.resources.Add(uint64(len(m.items)))
		snap = st.feed.get()
	}
	st.show(version)
	return nil
}

// encode makes the wire form.
func (m *message) encode(typeURL string) *discoverypb.DeltaDiscoveryResponse {
	version, _, _ := strings.Cut(m.nonce, "-")
	if !m.complete {
		// The node does not have all of the snapshot yet: admin/xds calls it ready, and what was not named gone, with the
		// first response without this. Others ignore the field.
		version += xds.MoreFollows
	}
	out := &discoverypb.DeltaDiscoveryResponse{
		SystemVersionInfo: version,
		TypeUrl:           typeURL,
		Nonce:             m.nonce,
		RemovedResources:  m.removed,
		Resources:         make([]*discoverypb.Resource, len(m.items)),
	}
	for i, it := range m.items {
		out.Resources[i] = &discoverypb.Resource{
			Name:     it.name,
			Version:  it.version,
			Aliases:  append(it.aliases(), it.extra...),
			Resource: &anypb.Any{TypeUrl: typeURL, Value: it.payload},
		}
	}
	return out
}

// show copies the state of the subscriptions for the status.
func (st *stream) show(version uint64) {
	shown := make([]TypeStatus, 0, len(st.types))
	now := time.Now()
	st.mu.Lock()
	defer st.mu.Unlock()
	for _, url := range slices.Sorted(maps.Keys(st.types)) {
		t := st.types[url].status()
		if t.Synced < version {
			if _, ok := st.behind[url]; !ok {
				st.behind[url] = now
			}
		} else {
			delete(st.behind, url)
		}
		shown = append(shown, t)
	}
	st.shown = shown
}

// callerKey carries the caller in a call's context.
type callerKey struct{}

func callerOf(ctx context.Context) *caller {
	c, _ := ctx.Value(callerKey{}).(*caller)
	return c
}
