package xds

import (
	"time"

	"ztun/admin/pb/discoverypb"
)

const (
	// viewsApart is how far apart Views are while responses come without pause. A View is cheap, a thousand a second
	// are not: each leaves garbage, and has every pod's connections and certificates looked at.
	viewsApart = 10 * time.Millisecond
	// maxBatch is how many responses may wait to be shown, and so for their replies.
	maxBatch = 1000
)

// batch is what a stream's responses have changed and no View shows yet. The first response after a pause is shown at
// once; those that follow within viewsApart are shown together at its end. No response is replied to before it is
// shown: a reply says that what it acknowledges is in use.
type batch struct {
	changed  bool // there is something to build
	policies bool // a policy is among it
	replies  []reply
	due      <-chan time.Time // when what waits is to be shown; nil if nothing does
}

// reply is what a response is answered with.
type reply struct {
	request *discoverypb.DeltaDiscoveryRequest
	arrived bool // accepted, and the last part of a state that is sent in several
}

// add takes over what came of a message.
func (b *batch) add(a *applied, r reply) {
	b.changed = b.changed || a.changed
	b.policies = b.policies || a.policies
	b.replies = append(b.replies, r)
}

// postpone reports whether the batch may wait, and sees to its end. What somebody may wait for does not: the first
// state, the answers of on-demand mode. Nor does a refusal, which has a text.
func (s *session) postpone(r reply) bool {
	c, b := s.c, &s.batch
	if !b.changed || len(b.replies) >= maxBatch || len(c.wanted) > 0 || c.hold || r.request.ErrorDetail != nil ||
		c.o.OnDemand && r.request.TypeUrl == TypeAddress {
		return false
	}
	left := c.limits.apart - time.Since(c.shown)
	if left <= 0 {
		return false
	}
	if b.due == nil {
		b.due = time.After(left)
	}
	return true
}

// show builds and publishes what the batch has changed. After a reset it waits until every type has arrived again.
func (s *session) show() error {
	c, b := s.c, &s.batch
	changed, policies := b.changed, b.policies
	b.changed, b.policies, b.due = false, false, nil
	if c.hold {
		if len(c.unheard) > 0 {
			return nil
		}
		changed, policies = true, true
	}
	if !changed {
		return nil
	}
	return contained(func() error {
		c.publish(c.store.b.Build(), policies)
		c.hold, c.shown = false, time.Now()
		return nil
	})
}

// reply sends the batch's replies. They come last: they say that all this has been done.
func (s *session) reply() error {
	replies := s.batch.replies
	s.batch.replies = replies[:0]
	for _, r := range replies {
		if r.arrived {
			s.c.arrived(r.request.TypeUrl)
		}
		if err := s.send(r.request); err != nil {
			return err
		}
	}
	clear(replies)
	return nil
}

// flush shows what waits, and replies.
func (s *session) flush() error {
	if err := s.show(); err != nil {
		return err
	}
	return s.reply()
}
