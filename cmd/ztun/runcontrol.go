package main

import (
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"
)

// serverLost says when a server of a `ztun run`'s control side is not reached, and when it is again: once each, to
// somebody who sees his command wait or its connections refused, and has no other log. It is safe for concurrent use.
type serverLost struct {
	log     *slog.Logger // nil: nobody is to be told
	address string
	setting string // that names the address
	// What is said: that it is away, what that means before and after it was first reached, and that it is back.
	away, before, after, back string

	mu     sync.Mutex
	failed int       // in a row
	since  time.Time // when the first of them was
	last   error     // the last of them
	synced bool      // it has been reached before
	over   bool      // it is said that what it gave has ended
}

// newControlLost is that of the control plane; wait is how long the command waits for it.
func newControlLost(log *slog.Logger, address string, wait time.Duration) *serverLost {
	before := "until it is, what the command calls gets no answer, and nobody reaches it"
	if wait > 0 {
		before = "it is waited for"
	}
	return &serverLost{log: log, address: address, setting: "XDS_ADDRESS", away: "the control plane is not reached",
		before: before, after: "what is known stays in force", back: "the control plane is reached"}
}

// newCALost is that of the CA.
func newCALost(log *slog.Logger, address, setting string, wait time.Duration) *serverLost {
	before := "until one does, what the command calls in the mesh is refused, and nobody there reaches it"
	if wait > 0 {
		before = "it is waited for"
	}
	return &serverLost{log: log, address: address, setting: setting, away: "no certificate comes from the CA",
		before: before, after: "the one at hand serves until it ends", back: "a certificate has come from the CA"}
}

// trouble is that it was not reached, or refused us. One alone is no news: servers end streams now and then, and the
// next is tried within a tenth of a second.
func (c *serverLost) trouble(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failed++; c.failed == 1 {
		c.since = time.Now()
	}
	c.last = err
	if c.failed != 2 || c.log == nil {
		return
	}
	meanwhile := c.before
	if c.synced {
		meanwhile = c.after
	}
	cause, _ := likelyCause(err.Error(), c.setting)
	c.log.Warn(c.away+": "+meanwhile, "address", c.address, "cause", cause, "error", err)
}

// ended is that the certificate which the CA gave has ended at a time, and another has not come.
func (c *serverLost) ended(at time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.over && c.log != nil {
		c.log.Error("this workload's certificate has ended: until another comes, calls to peers of the mesh and from them "+
			"are refused, but for those by tunnels that stand", "ended", at.UTC().Format(time.RFC3339), "CA", c.address)
	}
	c.over = true
}

// connected is that it has answered.
func (c *serverLost) connected() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if (c.failed >= 2 || c.over) && c.log != nil {
		c.log.Info(c.back, "address", c.address)
	}
	c.failed, c.last, c.synced, c.over = 0, nil, true, false
}

// failing is since when it has not been reached, and why; nil: it has been, or nothing has failed yet.
func (c *serverLost) failing() (since time.Time, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.since, c.why(c.last)
}

// why is an error with what there is to say about it; nil if it is.
func (c *serverLost) why(err error) error {
	if err == nil {
		return nil
	}
	cause, _ := likelyCause(err.Error(), c.setting)
	return fmt.Errorf("%s, %s: %s (%w)", c.away, c.address, cause, err)
}

// likelyCause is what an error of a connection to a control plane comes from, as a rule, and whether it is one that
// patience does not mend: it is there and refuses us. The errors are gRPC's, which are texts.
func likelyCause(text, setting string) (cause string, refused bool) {
	const stranger = "it does not take these credentials: expired, another workload's, or the workload has left"
	for _, c := range []struct {
		part, cause string
		refused     bool
	}{
		{"connection refused", "nothing listens there: is it running, and is " + setting + " right?", false},
		{"no such host", "the name of " + setting + " is not known here", false},
		{"server misbehaving", "the name of " + setting + " cannot be looked up: this host's nameserver", false},
		{"network is unreachable", "this host has no route there", false},
		{"no route to host", "this host has no route there, or a firewall is in the way", false},
		{"connection reset by peer", "it is just ending or beginning, or something on the way cuts connections", false},
		{"deadline exceeded", "nobody answers there: its host is down, or a firewall is in the way", false},
		{"i/o timeout", "nobody answers there: its host is down, or a firewall is in the way", false},
		{"x509:", "its certificate is not one to be trusted here: another mesh's, or under another name", true},
		{"tls:", "something else than a control plane answers there, or it refuses this workload's certificate", true},
		{"Unauthenticated", stranger, true},
		{"PermissionDenied", stranger, true},
	} {
		if strings.Contains(text, c.part) {
			return c.cause, c.refused
		}
	}
	return "see the error", false
}
