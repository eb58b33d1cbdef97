package main

import (
	"log/slog"
	"strings"
)

// controlLost says when the control plane of a `ztun run` is not reached, and when it is again: once each, to somebody
// who sees his command's connections refused and has no other log. It belongs to the goroutine of the xDS client.
type controlLost struct {
	log     *slog.Logger // nil: nobody is to be told
	address string
	setting string // that names the address

	failed int  // in a row
	synced bool // it has been reached before
}

// trouble is the end of a stream, or that there was none. One alone is no news: servers end streams now and then, and
// the next is tried within a tenth of a second.
func (c *controlLost) trouble(err error) {
	if c.failed++; c.failed != 2 || c.log == nil {
		return
	}
	meanwhile := "until it is, what the command calls is refused, and nobody reaches it"
	if c.synced {
		meanwhile = "what is known stays in force"
	}
	c.log.Warn("the control plane is not reached: "+meanwhile, "address", c.address, "cause", likelyCause(err.Error(),
		c.setting), "error", err)
}

// connected is the first answer of a stream.
func (c *controlLost) connected() {
	if c.failed >= 2 && c.log != nil {
		c.log.Info("the control plane is reached", "address", c.address)
	}
	c.failed, c.synced = 0, true
}

// likelyCause is what an error of a connection to a control plane comes from, as a rule. They are gRPC's, which are
// texts.
func likelyCause(text, setting string) string {
	for _, c := range []struct{ part, cause string }{
		{"connection refused", "nothing listens there: is it running, and is " + setting + " right?"},
		{"no such host", "the name of " + setting + " is not known here"},
		{"server misbehaving", "the name of " + setting + " cannot be looked up: this host's nameserver"},
		{"network is unreachable", "this host has no route there"},
		{"no route to host", "this host has no route there, or a firewall is in the way"},
		{"deadline exceeded", "nobody answers there: its host is down, or a firewall is in the way"},
		{"i/o timeout", "nobody answers there: its host is down, or a firewall is in the way"},
		{"x509:", "its certificate is not one to be trusted here: another mesh's, or under another name"},
		{"tls:", "something else than a control plane answers there, or it refuses this workload's certificate"},
		{"code = Unauthenticated", "it does not know these credentials: expired, or the workload has left"},
		{"code = PermissionDenied", "it does not know these credentials: expired, or the workload has left"},
	} {
		if strings.Contains(text, c.part) {
			return c.cause
		}
	}
	return "see the error"
}
