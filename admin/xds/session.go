package xds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"ztun/admin/pb/discoverypb"
)

// errStalled ends a stream on which the control plane does nothing; errSilent
// one that has been quiet for so long that it is better to look anew.
var (
	errStalled = errors.New("the control plane does not get on with it")
	errSilent  = errors.New("nothing was heard for a long time")
)

// session is one stream.
type session struct {
	c        *Client
	cancel   context.CancelCauseFunc
	stream   grpc.ClientStream
	asked    map[string]struct{} // names that the server watches for us beside those of resources that are held
	messages int
	batch    batch
	large    bool // the first request may be more than the server takes
}

// received is what the reader hands over.
type received struct {
	raw    []byte
	err    error
	opened bool // response headers have arrived
}

// session connects, asks for everything and works until the stream ends. All
// that it starts has ended when it returns.
func (c *Client) session(ctx context.Context) ending {
	c.count(&c.stats.Streams)
	conn, err := c.o.Connector.Dial()
	if err != nil {
		return ending{reason: endError, err: err}
	}
	defer conn.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s := &session{c: c, cancel: cancel, asked: map[string]struct{}{}}
	rpc, err := c.o.Connector.Context(ctx)
	if err != nil {
		return ending{reason: endConnection, err: err}
	}
	opening := s.watch(c.limits.open, fmt.Errorf("%w: no connection within %v", errStalled, c.limits.open))
	s.stream, err = conn.NewStream(rpc, &discoverypb.AggregatedDiscoveryService_ServiceDesc.Streams[0],
		discoverypb.AggregatedDiscoveryService_DeltaAggregatedResources_FullMethodName, grpc.ForceCodecV2(codec{}))
	opening.Stop()
	if err != nil {
		return s.end(ctx, received{err: err})
	}
	in := make(chan received) // without room: what is not handled is not read
	done := make(chan struct{})
	defer func() { cancel(nil); <-done }()
	go func() {
		defer close(done)
		read(ctx, s.stream, in)
	}()
	e := s.run(ctx, in)
	if s.batch.changed { // what was taken over is used, even if no reply can say so any more
		if err := s.show(); err != nil {
			return ending{reason: endError, err: err}
		}
	}
	return e
}

// read hands over what arrives, in the end the error.
func read(ctx context.Context, stream grpc.ClientStream, in chan<- received) {
	var r received
	for r.err == nil {
		r.raw = nil
		if err := contained(func() error {
			header, _ := stream.Header() // its error is that of RecvMsg
			r.opened = header != nil
			r.err = stream.RecvMsg(&r.raw)
			return nil
		}); err != nil {
			r.err = err
		}
		select {
		case in <- r:
		case <-ctx.Done():
			return
		}
	}
}

func (s *session) run(ctx context.Context, in <-chan received) ending {
	if err := s.initial(); err != nil {
		return s.end(ctx, received{err: err})
	}
	limit, why := s.patience()
	watchdog := s.watch(limit, why)
	defer func() { watchdog.Stop() }()
	for {
		select {
		case <-ctx.Done():
			return s.end(ctx, received{err: ctx.Err(), opened: s.messages > 0})
		case r := <-in:
			watchdog.Stop()
			if r.err != nil {
				return s.end(ctx, r)
			}
			s.messages++
			if err := s.response(r.raw); err != nil {
				return s.end(ctx, received{err: err, opened: true})
			}
			limit, why = s.patience()
			watchdog = s.watch(limit, why)
		case <-s.c.demands.kick:
			if err := s.ask(); err != nil {
				return s.end(ctx, received{err: err, opened: true})
			}
		case <-s.batch.due:
			if err := s.flush(); err != nil {
				return s.end(ctx, received{err: err, opened: true})
			}
		}
	}
}

// patience is how long the next message may take. HTTP/2 keepalive, which finds
// dead peers, is the connection's; this is for peers that live but do nothing.
func (s *session) patience() (time.Duration, error) {
	if l := s.c.limits; len(s.c.unheard) > 0 {
		return l.first, fmt.Errorf("%w: no response for %s within %v", errStalled, strings.Join(listed(s.c.unheard), " and "),
			l.first)
	}
	return s.c.limits.silence, errSilent
}

// watch ends the stream with err unless stopped in time.
func (s *session) watch(d time.Duration, err error) *time.Timer {
	return time.AfterFunc(d, func() { s.cancel(err) })
}

// send waits for the server to take the message, within bounds.
func (s *session) send(r *discoverypb.DeltaDiscoveryRequest) error {
	limit := s.c.limits.send
	t := s.watch(limit, fmt.Errorf("%w: it did not take a request for %v", errStalled, limit))
	defer t.Stop()
	if err := s.stream.SendMsg(r); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return nil // at io.EOF the reader knows what has happened
}

// maxRequest is the size that gRPC servers take unless told otherwise, in bytes.
const maxRequest = 4 << 20

// initial asks for both types, and says what we hold so that the server tells us
// what is gone and does not send what we have.
//
// With some 50,000 names that is more than a gRPC server takes by default. One
// that refuses is asked without them next time, and what its first response does
// not name is gone. That works only where it sends everything, in wildcard mode.
func (s *session) initial() error {
	for _, t := range types {
		k := s.c.store.kept[t]
		r := &discoverypb.DeltaDiscoveryRequest{Node: s.c.o.Node.wire(), TypeUrl: t}
		k.all, k.named = s.c.noNames, nil
		if !k.all {
			r.InitialResourceVersions = make(map[string]string, k.len())
			for name, version := range k.retained.all() {
				r.InitialResourceVersions[name] = version
			}
		}
		if t == TypeAddress && s.c.o.OnDemand {
			// The idiom for: subscribe to nothing.
			r.ResourceNamesSubscribe, r.ResourceNamesUnsubscribe = []string{"*"}, []string{"*"}
			for _, name := range s.c.demands.outstanding() {
				if _, ok := r.InitialResourceVersions[name]; !ok {
					r.InitialResourceVersions[name] = ""
				}
				s.asked[name] = struct{}{}
			}
		}
		s.large = s.large || !s.c.o.OnDemand && proto.Size(r) > maxRequest
		if err := s.send(r); err != nil {
			return err
		}
	}
	return s.ask()
}

const (
	// maxAsked is how many names may be subscribed to one by one before those that nobody needs are let go.
	maxAsked = 10_000
	// nothing is a name that nothing can have (RFC 2606).
	nothing = "ztun/nothing.invalid"
)

// ask sends the names that Demand waits for, all in one request. A name that was
// asked for on this stream before is let go first, or the server takes it for
// known and is silent. No request lets names go without subscribing to one:
// istiod would answer that everything is gone.
func (s *session) ask() error {
	var fresh, again []string
	for _, name := range s.c.demands.take() {
		if _, ok := s.asked[name]; ok {
			again = append(again, name)
		} else {
			fresh = append(fresh, name)
		}
	}
	if len(fresh)+len(again) == 0 {
		return nil
	}
	drop := again
	if len(s.asked)+len(fresh) > maxAsked {
		drop = append(s.idle(), again...)
	}
	r := &discoverypb.DeltaDiscoveryRequest{TypeUrl: TypeAddress, ResourceNamesSubscribe: fresh,
		ResourceNamesUnsubscribe: drop}
	if len(fresh) == 0 {
		r.ResourceNamesSubscribe = []string{nothing}
	}
	for _, name := range drop {
		delete(s.asked, name)
	}
	for _, names := range [...][]string{fresh, again} {
		for _, name := range names {
			s.asked[name] = struct{}{}
		}
	}
	if err := s.send(r); err != nil || len(again) == 0 {
		return err
	}
	r = &discoverypb.DeltaDiscoveryRequest{TypeUrl: TypeAddress, ResourceNamesSubscribe: again}
	if len(fresh) == 0 {
		r.ResourceNamesUnsubscribe = []string{nothing}
	}
	return s.send(r)
}

// idle are the names that were asked for and are neither waited for nor what something is called.
func (s *session) idle() (names []string) {
	for name := range s.asked {
		if !s.c.store.kept[TypeAddress].has(name) && !s.c.demands.waited(name) {
			names = append(names, name)
		}
	}
	return names
}

// response takes over one message, publishes and acknowledges, at once or with
// others (see batch). The error ends the stream.
func (s *session) response(raw []byte) error {
	c := s.c
	if s.messages == 1 {
		c.connected()
	}
	m, err := parseMessage(raw)
	if err != nil {
		return status.Error(codes.Internal, err.Error())
	}
	var a applied
	if _, ok := c.store.kept[m.typeURL]; !ok {
		// Nothing of it was asked for, and nothing is lost by saying so.
		c.received(m.typeURL, payload(&m))
		c.count(&c.stats.UnknownTypes)
		c.log.Error("the control plane sent an unknown type", "type", clip(m.typeURL), "resources", m.resources)
		return s.send(&discoverypb.DeltaDiscoveryRequest{TypeUrl: m.typeURL, ResponseNonce: m.nonce})
	}
	if err := contained(func() error { a = c.store.apply(&m); return nil }); err != nil {
		s.batch = batch{} // no half change is shown; all will come again
		c.received(m.typeURL, payload(&m))
		return err
	}
	c.received(m.typeURL, a.bytes)
	c.took(m.typeURL, &a)
	for _, w := range a.warnings {
		c.log.Warn(w, "type", m.typeURL)
	}
	c.log.Debug("received response", "type", m.typeURL, "resources", m.resources, "removed", m.removed, "refused",
		a.refused)

	if !m.more {
		delete(c.unheard, m.typeURL)
	}
	r := reply{request: &discoverypb.DeltaDiscoveryRequest{TypeUrl: m.typeURL, ResponseNonce: m.nonce},
		arrived: a.nack == "" && !m.more}
	if a.nack != "" {
		r.request.ErrorDetail = &discoverypb.Status{Message: a.nack} // code 0, as ztunnel's
		c.trouble("refused by us: " + clip(a.nack))
	}
	s.batch.add(&a, r)
	if s.postpone(r) {
		return nil
	}
	if err := s.show(); err != nil {
		return err
	}
	if c.o.OnDemand && m.typeURL == TypeAddress {
		c.demands.answer(&m, a.lost, s.asked)
		// The server goes on to watch them for us: asked for by name, it would be silent.
		m.eachRemoved(func(name string) {
			if name != nothing {
				s.asked[name] = struct{}{}
			}
		})
	}
	return s.reply()
}

// arrived notes the first accepted response of a type.
func (c *Client) arrived(typeURL string) {
	if !c.wanted[typeURL] {
		return
	}
	delete(c.wanted, typeURL)
	c.mu.Lock()
	c.stats.Pending = listed(c.wanted)
	c.mu.Unlock()
	if len(c.wanted) == 0 {
		c.log.Info("XDS client is in sync")
		if c.o.Synced != nil {
			c.o.Synced()
		}
	}
}

// payload is the size of a message's resources, in bytes.
func payload(m *message) (n int) {
	m.each(func(r resource) { n += len(r.payload) })
	return n
}

// end says what the end of the stream means (spec controlplane 2.5).
func (s *session) end(ctx context.Context, r received) ending {
	e := ending{reason: endError, err: r.err, messages: s.messages}
	var p *panicError
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, errSilent):
		e.reason, e.step, e.err = endReconnect, stepSoon, cause
		return e
	case errors.Is(cause, errStalled):
		s.c.count(&s.c.stats.Stalls)
		e.err = cause
		if !r.opened {
			e.reason = endConnection
		}
		return e
	case errors.As(r.err, &p):
		return e
	}
	if errors.Is(r.err, io.EOF) {
		e.reason, e.step, e.err = endComplete, stepNow, nil
		return e
	}
	st := status.Convert(r.err)
	// The text is gRPC's own. The code alone says as well that there are too many calls or streams, and a server that
	// does not refuse the size may send what it has in several responses, of which the first is not all.
	if st.Code() == codes.ResourceExhausted && strings.Contains(st.Message(), "larger than max") && s.large &&
		s.messages == 0 && !s.c.noNames {
		s.c.noNames = true
		s.c.log.Warn("the control plane does not take the list of what is known here; asking for everything from now on",
			"names", s.c.store.kept[TypeAddress].len())
	}
	if !r.opened {
		e.reason = endConnection
		return e
	}
	switch msg := st.Message(); st.Code() {
	case codes.Unknown, codes.Canceled, codes.DeadlineExceeded:
		e.reason, e.step = endReconnect, stepSoon
	case codes.Unavailable:
		if strings.Contains(msg, "transport is closing") || strings.Contains(msg, "received prior goaway") {
			e.reason, e.step = endReconnect, stepSoon
		}
	case codes.Internal:
		if strings.Contains(msg, "RST_STREAM with error code: NO_ERROR") {
			e.reason, e.step = endComplete, stepNow
		}
	}
	return e
}

// hint adds the likely cause to an error.
func hint(err error) string {
	text := err.Error()
	for _, h := range [...]struct{ part, hint string }{
		{"authentication failure", "is the token (AUTH_TOKEN) there, of audience istio-ca and not expired?"},
		{"Temporary failure in name resolution", "is DNS reachable from the node?"},
		{"server misbehaving", "is DNS reachable from the node?"},
		{"no such host", "is XDS_ADDRESS right, and DNS reachable from the node?"},
		{"certificate signed by unknown authority", "do the roots (XDS_ROOT_CA) belong to this control plane?"},
		{"received message larger than max", "the mesh is larger than a message may be"},
		{"ztun control join", ""}, // says it all itself
		{"no identities", "does the token belong to the pod that POD_NAME and POD_NAMESPACE name?"},
	} {
		switch {
		case !strings.Contains(text, h.part):
		case h.hint == "":
			return ""
		default:
			return " (hint: " + h.hint + ")"
		}
	}
	return ""
}
