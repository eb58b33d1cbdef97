package xds

import (
	"maps"
	"slices"
	"time"
)

// ClientStats is what a Client counts. Maps are the caller's.
type ClientStats struct {
	Connected bool      // a response has arrived on the present stream
	Since     time.Time // of that, or of the end of the last stream; zero before the first

	Terminations map[string]uint64 // by reason: ConnectionError, Error, Reconnect, Complete
	Messages     map[string]uint64 // responses by type url; beyond a few unknown ones "other"
	MessageBytes map[string]uint64 // payload of their resources
	Refused      map[string]uint64 // resources refused, ever, by type

	Streams      uint64    // opened or tried
	Nacks        uint64    // responses of which something was refused
	Damaged      uint64    // policies received that had lost an entry
	UnknownTypes uint64    // responses of types that were not asked for
	Panics       uint64    // contained
	Stalls       uint64    // streams given up because nothing came, or nothing was taken
	LastMessage  time.Time // when the last response came
	LastError    string    // why the last stream ended, with a hint
	LastErrorAt  time.Time
	Backoff      time.Duration // the wait after it

	Retained map[string]int               // names held, by type
	Rejected map[string]map[string]string // reasons by type and name: what is refused now, at most 100 of a type

	Pending []string // types that Synced still waits for

	Waiting           int    // names that Demand waits for
	DemandsFull       uint64 // Demands turned away
	DemandsUnanswered uint64 // Demands that ended without an answer
	DemandsRecalled   uint64 // Demands answered by what was said a moment ago: there is no such thing
}

func newClientStats() ClientStats {
	return ClientStats{
		Terminations: map[string]uint64{}, Messages: map[string]uint64{}, MessageBytes: map[string]uint64{},
		Refused:  map[string]uint64{},
		Retained: map[string]int{}, Rejected: map[string]map[string]string{},
	}
}

// Stats returns the counters. It never waits for the control plane.
func (c *Client) Stats() ClientStats {
	c.mu.Lock()
	s := c.stats
	s.Terminations = maps.Clone(s.Terminations)
	s.Messages = maps.Clone(s.Messages)
	s.MessageBytes = maps.Clone(s.MessageBytes)
	s.Refused = maps.Clone(s.Refused)
	s.Retained = maps.Clone(s.Retained)
	s.Rejected = maps.Clone(s.Rejected) // the inner maps are never written to
	s.Pending = slices.Clone(s.Pending)
	c.mu.Unlock()

	d := &c.demands
	d.mu.Lock()
	s.Waiting, s.DemandsFull, s.DemandsUnanswered, s.DemandsRecalled = len(d.waiters), d.full, d.unanswered, d.recalled
	d.mu.Unlock()
	return s
}

// maxURLs bounds the type urls that are counted apart.
const maxURLs = 16

// received counts a message.
func (c *Client) received(typeURL string, bytes int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := &c.stats
	if _, ok := s.Messages[clip(typeURL)]; !ok && len(s.Messages) >= maxURLs {
		typeURL = "other"
	}
	s.Messages[clip(typeURL)]++
	s.MessageBytes[clip(typeURL)] += uint64(bytes)
	now := time.Now()
	s.LastMessage = now
	if !s.Connected {
		s.Connected, s.Since = true, now
	}
}

// took counts what came of a message.
func (c *Client) took(typeURL string, a *applied) {
	k := c.store.kept[typeURL]
	c.mu.Lock()
	defer c.mu.Unlock()
	s := &c.stats
	if a.nack != "" {
		s.Nacks++
	}
	if a.refused > 0 {
		s.Refused[typeURL] += uint64(a.refused)
	}
	s.Damaged += uint64(a.damaged)
	s.Retained[typeURL] = k.len()
	if len(k.refused) == 0 {
		delete(s.Rejected, typeURL)
	} else {
		s.Rejected[typeURL] = maps.Clone(k.refused)
	}
}

// ended counts the end of a session and says so in the log.
func (c *Client) ended(e ending, wait time.Duration) {
	text := "the control plane ended the stream"
	if e.err != nil {
		text = clip(e.err.Error()) + hint(e.err)
	}
	c.mu.Lock()
	s := &c.stats
	s.Terminations[e.reason]++
	s.Backoff = wait
	s.LastError, s.LastErrorAt = text, time.Now()
	c.mu.Unlock()
	c.disconnected()
	c.trouble(text)
	if e.step == stepFailed {
		c.log.Warn("XDS client connection error", "reason", e.reason, "error", text, "retry", wait)
	} else {
		c.log.Info("XDS client reconnects", "reason", e.reason, "error", text, "retry", wait)
	}
}

// connected notes that the control plane answers on a new stream.
func (c *Client) connected() {
	c.demands.connected()
	if c.o.Connected != nil {
		c.o.Connected()
	}
}

func (c *Client) disconnected() {
	c.demands.disconnected()
	c.mu.Lock()
	if c.stats.Connected {
		c.stats.Connected, c.stats.Since = false, time.Now()
	}
	c.mu.Unlock()
}

func (c *Client) count(n *uint64) {
	c.mu.Lock()
	*n++
	c.mu.Unlock()
}
