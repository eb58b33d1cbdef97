package load

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Target is where a client connects, and how. The zero Dial is net.Dialer's.
type Target struct {
	Addr string // host:port
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
}

func (t Target) dial(ctx context.Context) (conn, error) {
	d := t.Dial
	if d == nil {
		d = (&net.Dialer{}).DialContext
	}
	c, err := d(ctx, "tcp", t.Addr)
	if err != nil {
		return nil, err
	}
	tc, ok := c.(conn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("a %T cannot be half-closed", c)
	}
	return tc, nil
}

// open dials, sends the request line and closes the connection when ctx ends.
func (t Target) open(ctx context.Context, format string, args ...any) (conn, error) {
	c, err := t.dial(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := fmt.Fprintf(c, format+"\n", args...); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// bound makes blocked reads and writes end with ctx; call the returned function when done.
func bound(ctx context.Context, c conn) func() {
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	return func() { stop() }
}

// DialResult tells how one connect went.
type DialResult struct {
	OK      bool    `json:"ok"`
	Errno   int     `json:"errno,omitempty"` // of connect(2), 0 if none
	Error   string  `json:"error,omitempty"`
	Timeout bool    `json:"timeout,omitempty"`
	Millis  float64 `json:"ms"`
	Local   string  `json:"local,omitempty"`
}

// DialOnce connects, closes, and tells the time and the errno.
func DialOnce(ctx context.Context, t Target) DialResult {
	start := time.Now()
	c, err := t.dial(ctx)
	r := DialResult{OK: err == nil, Millis: float64(time.Since(start).Microseconds()) / 1000}
	if err != nil {
		r.Error = err.Error()
		var errno syscall.Errno
		if errors.As(err, &errno) {
			r.Errno = int(errno)
		}
		var ne net.Error
		r.Timeout = errors.As(err, &ne) && ne.Timeout()
		return r
	}
	r.Local = c.LocalAddr().String()
	c.Close()
	return r
}

// WhoAmI asks the server for the address that it sees.
func WhoAmI(ctx context.Context, t Target) (Trailer, error) {
	var tr Trailer
	c, err := t.open(ctx, "whoami")
	if err != nil {
		return tr, err
	}
	defer c.Close()
	defer bound(ctx, c)()
	return tr, json.NewDecoder(c).Decode(&tr)
}

// TransferResult is both ends' view of one transfer.
type TransferResult struct {
	OK      bool    `json:"ok"`
	Error   string  `json:"error,omitempty"`
	Sent    int64   `json:"sent"`
	SentSHA string  `json:"sent_sha256"`
	Got     int64   `json:"got"`
	GotSHA  string  `json:"got_sha256"`
	Server  Trailer `json:"server"`
	Seconds float64 `json:"seconds"`
	Gbps    float64 `json:"gbps"` // both directions together
}

// Transfer sends up bytes and receives down bytes at the same time over one connection, and compares hashes and
// counts of both ends.
func Transfer(ctx context.Context, t Target, up, down int64, seed int64) TransferResult {
	return transfer(ctx, t, up, down, seed, false)
}

// TransferEnded is Transfer whose client ends its side as soon as it has sent all. The server ends its own as ever,
// when it has got and sent all.
func TransferEnded(ctx context.Context, t Target, up, down int64, seed int64) TransferResult {
	return transfer(ctx, t, up, down, seed, true)
}

func transfer(ctx context.Context, t Target, up, down int64, seed int64, end bool) TransferResult {
	var r TransferResult
	start := time.Now()
	err := func() error {
		c, err := t.open(ctx, "xfer up=%d down=%d seed=%d hash=1", up, down, seed)
		if err != nil {
			return err
		}
		defer c.Close()
		defer bound(ctx, c)()
		upHash, downHash := newHash(true), newHash(true)
		var sendErr error
		var wg sync.WaitGroup
		wg.Go(func() {
			r.Sent, sendErr = send(c, &Pattern{Seed: uint64(seed)}, upHash, up)
			if sendErr == nil && end {
				sendErr = c.CloseWrite()
			}
			if sendErr != nil {
				c.Close() // unblocks the reader
			}
		})
		br := bufio.NewReaderSize(c, bufSize)
		var readErr error
		r.Got, readErr = drain(br, downHash, down)
		if readErr != nil {
			c.Close()
		}
		wg.Wait()
		if err := errors.Join(sendErr, readErr); err != nil {
			return err
		}
		r.SentSHA, r.GotSHA = sum(upHash), sum(downHash)
		if err := json.NewDecoder(br).Decode(&r.Server); err != nil {
			return fmt.Errorf("trailer: %w", err)
		}
		if r.Sent != up || r.Server.Got != up || r.Got != down || r.Server.Sent != down {
			return fmt.Errorf("wanted %d up and %d down: sent %d, the server got %d; the server sent %d, got %d", up, down,
				r.Sent, r.Server.Got, r.Server.Sent, r.Got)
		}
		if r.SentSHA != r.Server.GotSHA || r.GotSHA != r.Server.SentSHA {
			return fmt.Errorf("hashes differ: up %s %s, down %s %s", r.SentSHA, r.Server.GotSHA, r.Server.SentSHA, r.GotSHA)
		}
		return nil
	}()
	r.Seconds = time.Since(start).Seconds()
	r.Gbps = float64(r.Sent+r.Got) * 8 / 1e9 / r.Seconds
	if r.OK = err == nil; !r.OK {
		r.Error = err.Error()
	}
	return r
}

// ManyResult counts the ends of many like connections.
type ManyResult struct {
	N       int      `json:"n"`
	OK      int      `json:"ok"`
	Failed  int      `json:"failed"`
	Errors  []string `json:"errors,omitempty"` // the first ten
	Bytes   int64    `json:"bytes"`
	Seconds float64  `json:"seconds"`
	mu      sync.Mutex
}

func (m *ManyResult) add(n int64, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.Bytes += n
	if err == nil {
		m.OK++
		return
	}
	m.Failed++
	if len(m.Errors) < 10 {
		m.Errors = append(m.Errors, err.Error())
	}
}

// HalfClose opens n connections, at most par at once (all of them with par >= n: no one sends before all are open),
// each of which sends up to size bytes, shuts its write side down, and only then receives a reply that is the hash of
// all that was sent.
func HalfClose(ctx context.Context, t Target, n, par int, size int64) *ManyResult {
	r := &ManyResult{N: n}
	start := time.Now()
	var opened sync.WaitGroup // the barrier of a fully concurrent run
	if par >= n {
		opened.Add(n)
	}
	sem := make(chan struct{}, min(par, n))
	var wg sync.WaitGroup
	for i := range n {
		sem <- struct{}{}
		wg.Go(func() {
			defer func() { <-sem }()
			sent, err := func() (int64, error) {
				c, err := t.open(ctx, "sink hash=1")
				if par >= n {
					opened.Done()
					opened.Wait()
				}
				if err != nil {
					return 0, err
				}
				defer c.Close()
				defer bound(ctx, c)()
				h := newHash(true)
				want := int64(mix(uint64(i))%uint64(size)) + 1
				sent, err := send(c, &Pattern{Seed: uint64(i)}, h, want)
				if err != nil {
					return sent, fmt.Errorf("connection %d: send: %w", i, err)
				}
				if err := c.CloseWrite(); err != nil {
					return sent, fmt.Errorf("connection %d: shutdown: %w", i, err)
				}
				var tr Trailer
				if err := json.NewDecoder(c).Decode(&tr); err != nil {
					return sent, fmt.Errorf("connection %d: reply: %w", i, err)
				}
				if tr.Got != sent || tr.GotSHA != sum(h) {
					return sent, fmt.Errorf("connection %d: the server got %d of %d bytes, hash equal: %v", i, tr.Got, sent,
						tr.GotSHA == sum(h))
				}
				return sent, nil
			}()
			r.add(sent, err)
		})
	}
	wg.Wait()
	r.Seconds = time.Since(start).Seconds()
	return r
}

// RateResult of ConnectRate.
type RateResult struct {
	ManyResult
	PerSecond float64 `json:"per_second"`
	Latency   Latency `json:"latency"` // of connect + one byte + close
}

// ConnectRate connects to a ByteServer over and over with par workers for d: connect, read one byte, see the server's
// close, close.
func ConnectRate(ctx context.Context, t Target, par int, d time.Duration) *RateResult {
	r := &RateResult{}
	var h Histogram
	start := time.Now()
	var wg sync.WaitGroup
	for range par {
		wg.Go(func() {
			for time.Since(start) < d && ctx.Err() == nil {
				t0 := time.Now()
				err := takeByte(ctx, t, 30*time.Second)
				if err == nil {
					h.Add(time.Since(t0))
				}
				r.add(1, err)
			}
		})
	}
	wg.Wait()
	r.Seconds = time.Since(start).Seconds()
	r.N = r.OK + r.Failed
	r.PerSecond = float64(r.OK) / r.Seconds
	r.Latency = h.Summary()
	return r
}

// takeByte connects to a ByteServer until ctx ends, reads its byte, sees its close, and closes; limit bounds what
// comes after the connect.
func takeByte(ctx context.Context, t Target, limit time.Duration) error {
	c, err := t.dial(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(limit))
	n, err := drain(limited{c, make([]byte, 2)}, nil, -1)
	if err == nil && n != 1 {
		err = fmt.Errorf("%d bytes instead of one", n)
	}
	return err
}

// limited reads through a small buffer, whatever buffer the caller brings.
type limited struct {
	c   conn
	buf []byte
}

func (l limited) Read(b []byte) (int, error) { return l.c.Read(b[:min(len(b), len(l.buf))]) }

// BulkResult of Bulk. Bytes and Seconds are what the receivers saw.
type BulkResult struct {
	ManyResult
	Gbps float64 `json:"gbps"`
	Up   int64   `json:"up"`
	Down int64   `json:"down"`
}

// Bulk runs streams in direction "up" (to the server), "down" or "both" (as many each way) for d.
func Bulk(ctx context.Context, t Target, streams int, dir string, d time.Duration) *BulkResult {
	r := &BulkResult{}
	start := time.Now()
	var up, down atomic.Int64
	var wg sync.WaitGroup
	one := func(f func() (int64, error), total *atomic.Int64) {
		wg.Go(func() {
			n, err := f()
			total.Add(n)
			r.add(n, err)
		})
	}
	for range streams {
		if dir == "up" || dir == "both" {
			one(func() (int64, error) { return bulkUp(ctx, t, d) }, &up)
			r.N++
		}
		if dir == "down" || dir == "both" {
			one(func() (int64, error) { return bulkDown(ctx, t, d) }, &down)
			r.N++
		}
	}
	wg.Wait()
	r.Seconds = time.Since(start).Seconds()
	r.Up, r.Down = up.Load(), down.Load()
	r.Gbps = float64(r.Bytes) * 8 / 1e9 / r.Seconds
	return r
}

func bulkUp(ctx context.Context, t Target, d time.Duration) (int64, error) {
	c, err := t.open(ctx, "sink")
	if err != nil {
		return 0, err
	}
	defer c.Close()
	defer bound(ctx, c)()
	buf := make([]byte, bufSize)
	(&Pattern{}).Read(buf)
	for deadline := time.Now().Add(d); time.Now().Before(deadline); {
		if _, err := c.Write(buf); err != nil {
			return 0, err
		}
	}
	if err := c.CloseWrite(); err != nil {
		return 0, err
	}
	var tr Trailer
	err = json.NewDecoder(c).Decode(&tr)
	return tr.Got, err
}

func bulkDown(ctx context.Context, t Target, d time.Duration) (int64, error) {
	c, err := t.open(ctx, "source ms=%d", d.Milliseconds())
	if err != nil {
		return 0, err
	}
	defer c.Close()
	defer bound(ctx, c)()
	return drain(c, nil, -1)
}
