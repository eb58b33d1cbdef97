package xds

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"

	"ztun/proxy/state"
)

// ClientOptions configure a Client.
type ClientOptions struct {
	// Connector knows the way to the control plane. Dial is called for every
	// connection, Context for every stream.
	Connector interface {
		Dial() (*grpc.ClientConn, error)
		Context(context.Context) (context.Context, error)
	}
	Node     Node   // see NewNode
	NodeName string // for state.NewBuilder
	OnDemand bool   // addresses only as they are asked for (Demand); policies always all
	// Base is there before the first response, and published when Run begins. The
	// control plane may replace and remove its entries. May be nil.
	Base *Local
	// Publish is called on the client's goroutine after each response that changed
	// something, or once for several that come within milliseconds. While it blocks
	// nothing is received. Demand returns after it, so it should return when the
	// View is in use.
	Publish func(v *state.View, policiesChanged bool)
	// Synced is called once, after Publish, when every type that is not on demand
	// has had its first response without a refused resource. May be nil.
	Synced func()
	// Trouble is called on the client's goroutine with why a stream has ended, or what a response was refused for. May
	// be nil.
	Trouble func(error)
	// Connected is called on the client's goroutine with the first response of every stream. May be nil.
	Connected func()
	// Turned is told of each Demand that made way for another pod's (evicted) or found no room. May be nil.
	Turned func(source string, evicted bool)
	Logger *slog.Logger // may be nil
}

// Client keeps one delta xDS stream to a control plane and turns what arrives
// into Views.
type Client struct {
	o      ClientOptions
	log    *slog.Logger
	store  *store
	pauses pauses
	limits limits
	// sleeps, or less if ctx ends or somebody wants an answer
	pause func(ctx context.Context, d time.Duration, wake <-chan struct{})

	wanted  map[string]bool // types that Synced waits for
	unheard map[string]bool // types without a response since the start or a reset
	hold    bool            // nothing is published while there are such: after a reset
	shown   time.Time       // when a View was published last; see batch
	noNames bool            // the server cannot take the list of names; see session.initial

	view    atomic.Pointer[state.View] // the last one published
	demands demands

	mu    sync.Mutex
	stats ClientStats
}

// limits are how long the client waits for the control plane.
type limits struct {
	open    time.Duration // for a connection and its handshakes
	send    time.Duration // for a message to be taken
	first   time.Duration // between messages, until everything has arrived once
	silence time.Duration // between messages after that
	demand  time.Duration // for the answer to a Demand
	apart   time.Duration // between two Views, while responses come without pause
}

// NewClient makes a Client; Run does the work.
func NewClient(o ClientOptions) *Client {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	c := &Client{
		o:      o,
		log:    o.Logger.With("target", "xds::client"),
		store:  newStore(o.NodeName, o.Base),
		pauses: newPauses(rand.Int64N),
		// istiod ends streams after some 30 minutes by itself: an hour of silence on
		// a living connection is a quiet mesh, or a server that has lost us.
		limits: limits{open: 30 * time.Second, send: time.Minute, first: 2 * time.Minute, silence: time.Hour,
			demand: demandWait, apart: viewsApart},
		pause:  sleep,
		wanted: map[string]bool{}, unheard: map[string]bool{},
		demands: newDemands(o.Turned),
		stats:   newClientStats(),
	}
	for _, t := range types {
		if t != TypeAddress || !o.OnDemand {
			c.wanted[t], c.unheard[t] = true, true
		}
	}
	c.stats.Pending = listed(c.wanted)
	return c
}

// Run connects and reconnects until ctx ends, and returns nil then.
func (c *Client) Run(ctx context.Context) error {
	for _, p := range c.o.Node.Problems {
		c.log.Warn(p)
	}
	if c.o.Base != nil {
		if err := contained(func() error { c.publish(c.store.b.Build(), true); return nil }); err != nil {
			c.panicked(err)
		}
	}
	for ctx.Err() == nil {
		var e ending
		start := time.Now()
		if err := contained(func() error { e = c.session(ctx); return nil }); err != nil {
			e = ending{reason: endError, err: err}
		}
		c.panicked(e.err)
		if ctx.Err() != nil {
			break
		}
		e.lived, e.healthy = time.Since(start), e.messages > 0 && len(c.unheard) == 0
		wait := c.pauses.next(e)
		c.ended(e, wait)
		if wait > 0 {
			c.pause(ctx, wait, c.demands.kick)
		}
	}
	c.disconnected()
	return nil
}

func (c *Client) publish(v *state.View, policies bool) {
	if c.o.Publish != nil {
		c.o.Publish(v, policies)
	}
	c.view.Store(v)
}

func (c *Client) trouble(text string) {
	if c.o.Trouble != nil {
		c.o.Trouble(errors.New(text))
	}
}

// panicked starts anew if err is a panic: what the Builder holds may be half a
// change. The last View stays until everything has arrived again, or policies
// would be missing from the next one for a while.
func (c *Client) panicked(err error) {
	var p *panicError
	if !errors.As(err, &p) {
		return
	}
	c.log.Error("panic contained; the state of before stays until the control plane has sent everything again",
		"panic", p.Error(), "stack", p.caught.Stack)
	c.store.reset()
	c.hold = true
	for _, t := range types {
		// On demand the server answers only if there is a name to answer for.
		if t != TypeAddress || !c.o.OnDemand || c.store.kept[t].len() > 0 {
			c.unheard[t] = true
		}
	}
	c.count(&c.stats.Panics)
}

// listed returns the types of a set, in their order.
func listed(set map[string]bool) (l []string) {
	for _, t := range types {
		if set[t] {
			l = append(l, t)
		}
	}
	return l
}

// Retry ends the wait for the next attempt to connect: somebody needs the control plane now.
func (c *Client) Retry() { c.demands.poke() }

// wokenPause is the shortest wait that somebody's need makes of a longer one.
const wokenPause = time.Second

func sleep(ctx context.Context, d time.Duration, wake <-chan struct{}) {
	t := time.NewTimer(d)
	defer t.Stop()
	start := time.Now()
	for {
		select {
		case <-t.C:
			return
		case <-ctx.Done():
			return
		case <-wake:
			wake = nil
			if left := wokenPause - time.Since(start); left < d-time.Since(start) {
				t.Reset(max(left, 0))
			}
		}
	}
}
