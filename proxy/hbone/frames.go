package hbone

import (
	"errors"
	"time"

	"golang.org/x/net/http2"
)

// What the frames of either side do to the connection; server.go and client.go have the header blocks.

// malformed answers a frame that is bad for its stream only.
func (r *reader) malformed(se http2.StreamError) error {
	c := r.c
	c.mu.Lock()
	defer c.mu.Unlock()
	c.log.Debug("malformed frame", "peer", c.nc.RemoteAddr(), "stream", se.StreamID, "error", se.Cause)
	switch s := c.streams[se.StreamID]; {
	case s != nil:
		c.rejectLocked(s, se.Code)
	case r.fresh:
		c.refuseLocked(se.StreamID, se.Code)
	case c.isIdle(se.StreamID):
		return violation(se.Code, "malformed frame on stream %d, which is idle", se.StreamID)
	default:
		typ := http2.FrameHeaders
		if http2.FrameType(r.head[3]) == http2.FrameWindowUpdate {
			typ = http2.FrameWindowUpdate
		}
		return c.overdue(se.StreamID, typ, len(r.ctl))
	}
	return nil
}

// refuseLocked resets a stream that was never taken. mu is held.
func (c *conn) refuseLocked(id uint32, code http2.ErrCode) {
	if c.isOver() {
		return
	}
	if code == http2.ErrCodeRefusedStream {
		c.cfg.Stats.StreamsRefused.Add(1)
	} else {
		c.cfg.Stats.StreamsRejected.Add(1)
	}
	c.framer.WriteRSTStream(id, code)
	c.rememberRefused(id)
	c.blame()
	c.reply()
	c.wantFlush()
}

func (c *conn) takeSettings(f *http2.SettingsFrame) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.IsAck() {
		c.acknowledged()
		return nil
	}
	if n := f.NumSettings(); n > maxSettings {
		return violation(http2.ErrCodeEnhanceYourCalm, "SETTINGS of %d entries", n)
	}
	first := !c.gotSettings
	c.gotSettings = true
	if err := f.ForeachSetting(c.takeSetting); err != nil {
		return err
	}
	if c.isOver() {
		return nil
	}
	if first && c.broken == nil {
		c.raw.SetReadDeadline(time.Time{})
	}
	c.framer.WriteSettingsAck()
	c.reply()
	c.wantFlush()
	return nil
}

func (c *conn) takeSetting(st http2.Setting) error {
	if err := st.Valid(); err != nil {
		var ce http2.ConnectionError
		errors.As(err, &ce)
		return violation(http2.ErrCode(ce), "SETTINGS %v", st)
	}
	switch st.ID {
	case http2.SettingInitialWindowSize:
		delta := int64(st.Val) - c.peerInitial
		c.peerInitial = int64(st.Val)
		for _, s := range c.streams {
			if s.sendWin += delta; s.sendWin > 1<<31-1 {
				return violation(http2.ErrCodeFlowControl, "SETTINGS %v overflows a window", st)
			}
			c.schedule(s) // windows may also have become negative (RFC 9113, 6.9.2): then emit waits
		}
	case http2.SettingMaxFrameSize:
		c.peerMaxFrame = int(st.Val)
	case http2.SettingMaxConcurrentStreams:
		c.peerMaxStream = st.Val
	case http2.SettingHeaderTableSize:
		c.henc.SetMaxDynamicTableSizeLimit(min(st.Val, 4096))
		c.henc.SetMaxDynamicTableSize(min(st.Val, 4096))
	case http2.SettingEnablePush:
		if c.client && st.Val != 0 {
			return violation(http2.ErrCodeProtocol, "SETTINGS %v from a server", st)
		}
	}
	return nil
}

func (c *conn) takePing(f *http2.PingFrame) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.IsAck() {
		c.ping.answered(f.Data)
		return nil
	}
	if !c.isOver() {
		c.framer.WritePing(true, f.Data)
		c.reply()
		c.wantFlush()
	}
	return nil
}

func (c *conn) takeWindowUpdate(id uint32, inc int64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.updated(); err != nil {
		return err
	}
	if id == 0 {
		if c.credited(inc); c.sendWin > 1<<31-1 {
			return violation(http2.ErrCodeFlowControl, "connection window overflows")
		}
		c.revive()
	} else if s := c.streams[id]; s != nil {
		if s.sendWin += inc; s.sendWin > 1<<31-1 {
			c.rejectLocked(s, http2.ErrCodeFlowControl)
			return nil
		}
		s.debt = max(s.debt-inc, 0)
		if s.list == &c.starved {
			c.starved.remove(s)
		}
		c.schedule(s)
	} else if c.isIdle(id) {
		return violation(http2.ErrCodeProtocol, "WINDOW_UPDATE on stream %d, which is idle", id)
	}
	c.wantFlush()
	return nil
}

func (c *conn) takeReset(id uint32, code http2.ErrCode) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.isIdle(id) {
		return violation(http2.ErrCodeProtocol, "RST_STREAM on stream %d, which is idle", id)
	}
	s := c.streams[id]
	if s == nil {
		return c.overdue(id, http2.FrameRSTStream, 0)
	}
	s.peerReset = true
	if s.gotEnd {
		s.stopSending(code)
	}
	if !c.client && !s.answered {
		c.blame() // rapid reset (CVE-2023-44487)
	}
	s.detachLocked(&StreamError{Code: code, Remote: true, Unprocessed: code == http2.ErrCodeRefusedStream,
		Ended: s.gotEnd})
	c.forgetLocked(s)
	return nil
}

func (c *conn) takeGoAway(f *http2.GoAwayFrame) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.goneAway || f.LastStreamID < c.goAwayLast {
		c.goAwayLast = f.LastStreamID
	}
	c.goneAway, c.goneWell = true, f.ErrCode == http2.ErrCodeNo
	c.log.Debug("peer is going away", "peer", c.nc.RemoteAddr(), "last", f.LastStreamID, "code", f.ErrCode.String())
	c.unavailable()
	if c.client {
		for id, s := range c.streams {
			if id > c.goAwayLast {
				s.detachLocked(&StreamError{Code: http2.ErrCodeRefusedStream, Remote: true, Unprocessed: true})
				c.forgetLocked(s)
			}
		}
	}
	if len(c.streams) == 0 {
		c.leaveLocked(http2.ErrCodeNo, ErrGoAway)
	}
	return nil
}
