package proxy

import (
	"errors"
	"net"

	"golang.org/x/net/http2"

	"ztun/proxy/hbone"
)

// acceptShortcut is accept for a connection whose packets pass by themselves.
func (c *connection) acceptShortcut() {
	if err := c.shortcut.Accept(); err != nil {
		c.shortcut.Reset() // the flow has lost its place meanwhile
		c.books.record(nil)
		return
	}
	c.pass()
}

// pass keeps the books of a connection whose packets pass by themselves, until it ends, and returns.
func (c *connection) pass() {
	c.carried, c.books.carried, c.books.memory = true, true, c.books.mtls // which has no tunnel else
	c.asks = nil                                                          // nor what the flow remembers of its SYN
	c.mu.Lock()
	c.passing = true
	cut := c.stands()
	c.mu.Unlock()
	if cut != nil {
		c.shortcut.Reset()
	}
	// Its readers say that it has ended, who have more to do.
	c.shortcut.Watch(c.passed, func(why error) {
		c.passEnd = why
		c.p.workers.Go(c.endPass)
	})
}

// passed counts what an end has received.
func (c *connection) passed(forth bool, n int) {
	if forth {
		c.books.addReceived(n)
		return
	}
	c.books.addSent(n)
}

// endPass closes the books, with what a copy would have come to: a reset of either application's is not an error
// (isReset), and what the other pod's proxy has cut is the reset of a stream.
func (c *connection) endPass() {
	c.p.o.Panics.Run("the end of a connection", func() {
		cut, why := c.reason(), c.passEnd
		switch {
		case cut != nil:
			why = cut
		case errors.Is(why, net.ErrClosed) && !c.books.mtls:
			why = nil // as the reset that a copy gets of a stack that ends
		case errors.Is(why, net.ErrClosed):
			why = &copyError{receivePrefix, &hbone.StreamError{Code: http2.ErrCodeCancel, Remote: true}}
		case why != nil:
			why = &copyError{receivePrefix, why}
		}
		c.books.record(why)
		c.leave()
	}, nil)
}
