package zds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"ztun/admin/backoff"
)

// Pods are the pods that agents have named, whichever connection they came by. Its methods are called one at a time.
type Pods interface {
	// Attach attaches a pod in the network namespace netns, which stays the caller's. A pod that is attached there is
	// left as it is; one that is attached in another is detached first. A pod that cannot be attached is remembered,
	// with its namespace, and tried again until Detach; the error says why.
	Attach(ctx context.Context, w Workload, netns *os.File) error
	// Detach lets go of a pod at once. An unknown one is no error.
	Detach(uid string) error
	// Known are the uids of all pods that were given to Attach and not to Detach.
	Known() []string
}

// Options configure a Client.
type Options struct {
	Path string // of the agent's socket
	Pods Pods
	// Snapshot is called when an agent has sent its snapshot, Lost when the agent that had has been away for Grace.
	Snapshot, Lost func()
	// Failed is told why there is no snapshot.
	Failed func(error)
	Grace  time.Duration       // default 5 s
	Random func(n int64) int64 // in [0, n)
	Logger *slog.Logger
}

const (
	defaultGrace = 5 * time.Second
	// attachTimeout is how long a pod may take to be attached, so that the answer is there within the 5 s that the
	// agent waits: a later one it would take for the next request's.
	attachTimeout = 4 * time.Second
)

// Client keeps a connection to the node agent.
type Client struct {
	o     Options
	stats struct{ connections, messages, refused atomic.Uint64 }

	mu        sync.Mutex // also held while Snapshot and Lost are called, so that they come in order
	connected bool       // and the snapshot is complete
	away      *time.Timer
}

// Stats are a client's figures since its start.
type Stats struct {
	Connections uint64 // that were made
	Messages    uint64 // that arrived
	Refused     uint64 // of them
	Connected   bool   // now, and the snapshot has been sent
}

// New makes a client, which does nothing before Run.
func New(o Options) *Client {
	if o.Grace == 0 {
		o.Grace = defaultGrace
	}
	return &Client{o: o}
}

// Stats are the figures as they are.
func (c *Client) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	return Stats{Connections: c.stats.connections.Load(), Messages: c.stats.messages.Load(),
		Refused: c.stats.refused.Load(), Connected: c.connected}
}

// Run keeps a connection to the agent until ctx ends.
func (c *Client) Run(ctx context.Context) error {
	pause := newPauses(c.o.Random)
	said := ""
	defer c.settle(true, func() {})
	for {
		start := time.Now()
		conn, err := dial(ctx, c.o.Path)
		had := false
		if err == nil {
			c.stats.connections.Add(1)
			c.o.Logger.Info("connected to the node agent", "socket", c.o.Path)
			said = ""
			had, err = c.serve(ctx, conn)
		}
		if ctx.Err() != nil {
			return nil
		}
		if had {
			c.leave()
		}
		wait := pause.next(conn == nil, had, time.Since(start))
		// The same reason again is no news.
		if text := err.Error(); text != said {
			said = text
			if conn == nil {
				c.o.Failed(fmt.Errorf("no node agent at %s: %w", c.o.Path, err))
				c.o.Logger.Warn("no node agent, will be tried again", "socket", c.o.Path, "error", err)
			} else {
				c.o.Logger.Warn("the connection to the node agent has ended, a new one is made", "error", err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// settle says that the agent's snapshot is complete, or at the end that nobody waits for it any more.
func (c *Client) settle(end bool, tell func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.away != nil {
		c.away.Stop()
		c.away = nil
	}
	c.connected = !end
	tell()
}

// leave begins the time within which the agent is expected back.
func (c *Client) leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.connected = false
	var t *time.Timer
	t = time.AfterFunc(c.o.Grace, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.away == t { // not back meanwhile
			c.o.Lost()
		}
	})
	c.away = t
}

// serve answers requests until the connection ends, which is the error. had: the snapshot was complete.
func (c *Client) serve(ctx context.Context, conn *conn) (had bool, err error) {
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	s := newSession()
	for {
		m, err := conn.next()
		var bad unreadable
		switch {
		case errors.As(err, &bad):
			c.stats.messages.Add(1)
			c.refuse(conn, fmt.Errorf("failure to read message : %w", bad)) // the connection ends anyway
			return s.complete, err
		case errors.Is(err, io.EOF):
			return s.complete, errors.New("the agent has closed it")
		case err != nil:
			return s.complete, err
		}
		c.stats.messages.Add(1)
		err = c.do(ctx, s, m)
		if ctx.Err() != nil {
			return s.complete, ctx.Err()
		}
		if err != nil {
			err = c.refuse(conn, err)
		} else {
			if m.kind == kindSnapshotSent {
				c.settle(false, c.o.Snapshot)
			}
			err = conn.send(ack(nil))
		}
		if err != nil {
			return s.complete, fmt.Errorf("the answer to %s: %w", m.kind, err)
		}
	}
}

func (c *Client) refuse(conn *conn, reason error) error {
	c.stats.refused.Add(1)
	c.o.Logger.Warn("a request of the node agent is refused", "error", reason)
	return conn.send(ack(reason))
}

// do does what a request asks for. The prefixes of errors are ztunnel's.
func (c *Client) do(ctx context.Context, s *session, m message) error {
	if m.netns != nil {
		defer m.netns.Close()
	}
	var known []string
	if m.kind == kindSnapshotSent {
		known = c.o.Pods.Known()
	}
	what, err := s.take(m, known)
	if err != nil {
		return fmt.Errorf("failure to process message : %w", err)
	}
	if what.attach {
		ctx, cancel := context.WithTimeout(ctx, attachTimeout)
		defer cancel()
		if err := c.o.Pods.Attach(ctx, m.workload, m.netns); err != nil {
			return fmt.Errorf("failure to start proxy : %w", err)
		}
	}
	for _, uid := range what.detach {
		if err := c.o.Pods.Detach(uid); err != nil {
			// The pod is gone for the agent, whatever we have left of it: it could do nothing about that.
			c.o.Logger.Error("letting go of a pod", "uid", uid, "error", err)
		}
	}
	return nil
}

// pauses says how long to wait before the next connection (spec controlplane 8.3): as package backoff after one that
// could not be made, nothing after others. Brief are those on which no snapshot was completed.
type pauses struct {
	backoff.Backoff
	briefs int
}

func newPauses(random func(int64) int64) pauses { return pauses{Backoff: backoff.New(random)} }

// next is told whether the last connection failed, whether it had a complete snapshot, and how long it lived.
func (p *pauses) next(failed, complete bool, lived time.Duration) time.Duration {
	switch {
	case failed:
	case lived < backoff.Brief:
		p.briefs++
	default:
		p.briefs = 0
	}
	if failed || p.briefs > backoff.MaxBrief {
		return p.Longer()
	}
	if complete || lived >= backoff.Brief {
		p.Reset()
	}
	return 0
}
