package hbone

import (
	"encoding/binary"
	"time"

	"golang.org/x/net/http2"
)

// pinger keeps watch over a connection: a PING some time after the start and after each answer. Without an
// answer, and without anything else from the peer either, the connection is given up. conn.mu guards it.
type pinger struct {
	c     *conn
	timer *time.Timer
	out   bool // a PING waits for its answer
	data  [8]byte
	seen  uint64 // conn.arrived when it was sent, or when the deadline was last put off
}

// drainData is the content of the PING between the two GOAWAYs of a graceful end; the watch's own count from 1.
var drainData = [8]byte{'z', 't', 'u', 'n', 'b', 'y', 'e', '!'}

func (p *pinger) start(c *conn) {
	p.c = c
	if c.cfg.PingEvery > 0 {
		p.timer = time.AfterFunc(c.cfg.PingEvery, c.cfg.Panics.Func("an HBONE ping", p.tick, c.crash))
	}
}

func (p *pinger) stop() {
	if p.timer != nil {
		p.timer.Stop()
	}
}

func (p *pinger) tick() {
	c := p.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.isOver() {
		return
	}
	arrived := c.arrived.Load()
	switch {
	case !p.out:
		p.out = true
		binary.BigEndian.PutUint64(p.data[:], binary.BigEndian.Uint64(p.data[:])+1)
		c.framer.WritePing(false, p.data)
		c.wantFlush()
	case arrived == p.seen:
		c.cfg.Stats.PingTimeouts.Add(1)
		if c.client {
			c.log.Warn("HBONE ping timeout", "peer", c.nc.RemoteAddr())
			c.endLocked(ErrPingTimeout)
		} else {
			c.leaveLocked(http2.ErrCodeNo, ErrPingTimeout)
		}
		return
	}
	p.seen = arrived
	p.timer.Reset(c.cfg.PingTimeout)
}

// answered is an acknowledged PING.
func (p *pinger) answered(data [8]byte) {
	switch {
	case data == drainData:
		p.c.drained()
	case p.out && data == p.data && !p.c.isOver():
		p.out = false
		p.timer.Reset(p.c.cfg.PingEvery)
	}
}
