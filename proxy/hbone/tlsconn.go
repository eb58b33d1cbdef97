package hbone

import (
	"bytes"
	"context"
	"crypto/fips140"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// tlsConn is a TLS 1.3 connection whose records hbone seals and opens itself, after crypto/tls did the handshake.
//
// crypto/tls writes every record of 16 KiB by a system call of its own and copies what it reads; here a batch of
// frames is sealed from where the bytes lie into one buffer and written at once, and many records are read at once
// and opened straight into the block that streams' users get slices of.
//
// ClientConn and ServerConn use it directly. For others it is a net.Conn: Read and Write may be called at the same
// time, but not after the connection was given to hbone.
type tlsConn struct {
	raw   net.Conn
	state tls.ConnectionState
	rec   *records

	rmu   sync.Mutex
	block *block
	rest  []byte
	rerr  error

	wmu    sync.Mutex
	closed bool
	carry  []byte // sealed, but not written when a deadline came: goes before anything else
}

// Turn is leave to compute. A handshake has it while it computes, half a millisecond in all, and never while it waits
// for its peer: so a crowd of them does not stand before everything else in the scheduler's queue.
type Turn interface {
	Take()
	Give()
}

// Client does the TLS handshake as a client on raw, within ctx; turn nil: whenever it likes. On failure raw is
// closed. The result is a *tlsConn, or a *tls.Conn where the record layer cannot be taken over (not TLS 1.3 with
// AES-GCM, FIPS 140 mode).
func Client(ctx context.Context, raw net.Conn, cfg *tls.Config, turn Turn) (net.Conn, tls.ConnectionState, error) {
	return handshake(ctx, raw, cfg, turn, true)
}

// Server does the TLS handshake as a server on raw; see Client. Session tickets are off.
func Server(ctx context.Context, raw net.Conn, cfg *tls.Config, turn Turn) (net.Conn, tls.ConnectionState, error) {
	return handshake(ctx, raw, cfg, turn, false)
}

func handshake(ctx context.Context, raw net.Conn, cfg *tls.Config, turn Turn, client bool) (net.Conn,
	tls.ConnectionState, error) {
	keys := &keyLog{next: cfg.KeyLogWriter}
	cfg = cfg.Clone()
	cfg.KeyLogWriter = keys
	// A ticket would be the first record under the application keys: the count would not start at zero.
	cfg.SessionTicketsDisabled = true
	if choose := cfg.GetConfigForClient; choose != nil {
		cfg.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			chosen, err := choose(h)
			if chosen != nil {
				chosen = chosen.Clone()
				keys.next = chosen.KeyLogWriter
				chosen.KeyLogWriter, chosen.SessionTicketsDisabled = keys, true
			}
			return chosen, err
		}
	}
	lock := &lockstep{Conn: raw, turn: turn}
	var t *tls.Conn
	if client {
		t = tls.Client(lock, cfg)
	} else {
		t = tls.Server(lock, cfg)
	}
	if err := lock.inTurn(func() error { return t.HandshakeContext(ctx) }); err != nil {
		if !client {
			partAfterAlert(raw)
		}
		raw.Close()
		return nil, tls.ConnectionState{}, err
	}
	state := t.ConnectionState()
	rec := takeOver(raw, state, keys, lock, client)
	keys.client, keys.server = nil, nil
	if rec == nil {
		lock.free.Store(true)
		return t, state, nil
	}
	return &tlsConn{raw: raw, state: state, rec: rec}, state, nil
}

// partAfterAlert lets the alert of a refused handshake arrive: a TLS 1.3 client is done before we judge it and sends
// on, and closing a socket with unread bytes resets it, which would overtake the alert.
func partAfterAlert(raw net.Conn) {
	w, ok := raw.(interface{ CloseWrite() error })
	if !ok || w.CloseWrite() != nil {
		return
	}
	raw.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
	io.Copy(io.Discard, io.LimitReader(raw, 64<<10))
}

// takeOver makes the record layer for a finished handshake, or nil if that is not ours to carry on.
func takeOver(raw net.Conn, state tls.ConnectionState, keys *keyLog, lock *lockstep, client bool) *records {
	if state.Version != tls.VersionTLS13 || fips140.Enabled() || keys.broken || keys.client == nil || keys.server == nil ||
		!lock.aligned() {
		return nil
	}
	in, err1 := newDirection(state.CipherSuite, keys.server)
	out, err2 := newDirection(state.CipherSuite, keys.client)
	if err1 != nil || err2 != nil {
		return nil
	}
	if !client {
		in, out = out, in
	}
	return newRecords(newWire(raw, new(Buffers)), in, out, client)
}

// lockstep sits beneath crypto/tls during the handshake and never lets it read beyond the record that it is at:
// when the handshake is over, nothing of what follows is in its hands.
type lockstep struct {
	net.Conn
	free atomic.Bool // crypto/tls keeps the connection: pass everything on
	turn Turn        // held but while waiting for the peer; nil after the handshake

	head  [5]byte
	nhead int // bytes of the header that came from the connection
	given int // of these, given on
	left  int // bytes of the record's body to come
}

// inTurn does the handshake, on the calling goroutine.
func (l *lockstep) inTurn(handshake func() error) error {
	if l.turn == nil {
		return handshake()
	}
	l.turn.Take()
	defer func() { l.turn.Give(); l.turn = nil }()
	return handshake()
}

func (l *lockstep) Read(p []byte) (int, error) {
	if l.turn != nil {
		l.turn.Give()
		defer l.turn.Take()
	}
	return l.read(p)
}

func (l *lockstep) Write(p []byte) (int, error) {
	if l.turn != nil {
		l.turn.Give()
		defer l.turn.Take()
	}
	return l.Conn.Write(p)
}

func (l *lockstep) read(p []byte) (int, error) {
	if l.free.Load() && l.given == l.nhead && l.left == 0 {
		return l.Conn.Read(p)
	}
	if len(p) == 0 {
		return 0, nil
	}
	if l.left > 0 {
		n, err := l.Conn.Read(p[:min(len(p), l.left)])
		if l.left -= n; l.left == 0 {
			l.nhead, l.given = 0, 0
		}
		return n, err
	}
	if l.given == l.nhead {
		n, err := l.Conn.Read(l.head[l.nhead:])
		l.nhead += n
		if n == 0 {
			return 0, err
		}
	}
	n := copy(p, l.head[l.given:l.nhead])
	l.given += n
	if l.given == len(l.head) {
		if l.left = int(binary.BigEndian.Uint16(l.head[3:])); l.left == 0 {
			l.nhead, l.given = 0, 0
		}
	}
	return n, nil
}

// aligned reports whether reading stopped between two records.
func (l *lockstep) aligned() bool { return l.nhead == 0 && l.left == 0 }

// keyLog catches the application traffic secrets (RFC 8446, 7.1) in the NSS key log format.
type keyLog struct {
	next           io.Writer // the configuration's own
	client, server []byte
	broken         bool
}

func (k *keyLog) Write(line []byte) (int, error) {
	parts := bytes.Fields(line)
	if len(parts) == 3 {
		var into *[]byte
		switch string(parts[0]) {
		case "CLIENT_TRAFFIC_SECRET_0":
			into = &k.client
		case "SERVER_TRAFFIC_SECRET_0":
			into = &k.server
		}
		if into != nil {
			secret, err := hex.DecodeString(string(parts[2]))
			if err != nil || *into != nil {
				k.broken = true
			}
			*into = secret
		}
	} else {
		k.broken = true
	}
	if k.next != nil {
		return k.next.Write(line)
	}
	return len(line), nil
}

// ConnectionState is the handshake's.
func (c *tlsConn) ConnectionState() tls.ConnectionState { return c.state }

// NetConn is the connection beneath.
func (c *tlsConn) NetConn() net.Conn { return c.raw }

func (c *tlsConn) Read(p []byte) (int, error) {
	c.rmu.Lock()
	defer c.rmu.Unlock()
	if len(p) == 0 {
		return 0, nil
	}
	if c.rec.adopted {
		return 0, errAdopted
	}
	for len(c.rest) == 0 {
		if c.block != nil {
			c.block.release()
			c.block = nil
		}
		if c.rerr != nil {
			return 0, c.rerr
		}
		if err := c.rec.wait(); err != nil {
			if !isTimeout(err) {
				c.rerr = err
			}
			return 0, err
		}
		c.block = c.rec.bufs.block(blockLarge)
		n, err := c.rec.fill(c.block.b)
		c.rest, c.rerr = c.block.b[:n], err
		if c.rec.urgent() {
			c.Write(nil)
		}
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

// Write seals and writes p. What was sealed when a deadline comes counts as written: it goes out with the next call.
func (c *tlsConn) Write(p []byte) (n int, err error) {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	if c.closed {
		return 0, net.ErrClosed
	}
	if c.rec.adopted {
		return 0, errAdopted
	}
	if _, ok := c.raw.(*net.TCPConn); ok && len(p) > 0 {
		// A deadline that has passed is to be seen before anything is sealed, which cannot be undone.
		if _, err := c.raw.Write(c.carry[:0]); err != nil {
			return 0, err
		}
	}
	if err := c.flush(c.carry); err != nil {
		return 0, err
	}
	const batch = 8 * recordLen
	buf := c.rec.bufs.out(batch + batch/64)
	defer c.rec.bufs.putOut(buf)
	var plain [recordLen + spareLen]byte
	for len(p) > 0 || c.rec.urgent() {
		out := (*buf)[:0]
		taken := 0
		for taken < batch && (len(p) > 0 || c.rec.urgent()) {
			m := copy(plain[:recordLen], p)
			if out, err = c.rec.seal(out, plain[:m]); err != nil {
				return n, err
			}
			p = p[m:]
			taken += m
		}
		*buf = out
		n += taken
		if err := c.flush(out); err != nil {
			return n, err
		}
	}
	return n, nil
}

// flush writes sealed bytes, and keeps those that do not go out now. wmu is held.
func (c *tlsConn) flush(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	n, err := c.raw.Write(b)
	c.carry = bytes.Clone(b[n:])
	if err != nil && !isTimeout(err) {
		c.closed = true
	}
	return err
}

// CloseWrite sends close_notify.
func (c *tlsConn) CloseWrite() error {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	if c.rec.adopted {
		return errAdopted
	}
	c.closed = true
	return c.flush(c.rec.closeNotify(c.carry))
}

// Close says close_notify if that takes no time, and closes the connection beneath. Doing it twice, or at the same
// time, is no error.
func (c *tlsConn) Close() error {
	c.raw.SetWriteDeadline(time.Now().Add(time.Second))
	if !c.closing() {
		c.CloseWrite()
	}
	if err := c.raw.Close(); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// closing reports whether a write that may be stuck holds the lock, or close_notify was sent: then Close is abrupt.
func (c *tlsConn) closing() bool {
	if !c.wmu.TryLock() {
		return true
	}
	defer c.wmu.Unlock()
	return c.closed || c.rec.adopted
}

func (c *tlsConn) LocalAddr() net.Addr                { return c.raw.LocalAddr() }
func (c *tlsConn) RemoteAddr() net.Addr               { return c.raw.RemoteAddr() }
func (c *tlsConn) SetDeadline(t time.Time) error      { return c.raw.SetDeadline(t) }
func (c *tlsConn) SetReadDeadline(t time.Time) error  { return c.raw.SetReadDeadline(t) }
func (c *tlsConn) SetWriteDeadline(t time.Time) error { return c.raw.SetWriteDeadline(t) }

// errAdopted: a ClientConn or ServerConn seals and opens now.
var errAdopted = errors.New("hbone: connection was given to HTTP/2")

var errSuite = errors.New("hbone: cipher suite without a record layer of ours")
