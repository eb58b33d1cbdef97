package load

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// Closer says how a random session ends.
type Closer int

const (
	ClientFirst  Closer = iota // the client sends and half-closes; the server answers after the end of input and closes
	ServerFirst                // the server sends and half-closes; the client answers after the end of input and closes
	BothWays                   // both send at once, each half-closes when it has sent all
	ClientReset                // the client sends all, reads half, and resets
	ServerReset                // the mirror image
	ClientCloses               // the client sends all and closes without reading
	ServerCloses               // the mirror image
	numClosers
)

// Clean closers must deliver every byte both ways; the others may cut off the end of a stream, never change it.
func (c Closer) Clean() bool { return c <= BothWays }

// Session is one end's account of a random session.
type Session struct {
	I     int    `json:"i"`
	Sent  int64  `json:"sent"`
	Got   int64  `json:"got"`
	Wrong string `json:"wrong,omitempty"` // the bytes that came were not the bytes that were sent
	Err   string `json:"err,omitempty"`
}

// plan derives sizes and closer of session i; both ends compute it.
func plan(seed int64, i int) (up, down int64, c Closer) {
	x := mix(uint64(seed)*0x9e3779b97f4a7c15 ^ uint64(i))
	size := func() int64 { // 0 (one in eight), else log-uniform up to 512 KiB
		x = mix(x)
		if x%8 == 0 {
			return 0
		}
		return int64((x >> 8) % (1 << (1 + (x>>3)%19)))
	}
	up, down = size(), size()
	x = mix(x)
	return up, down, Closer(x % uint64(numClosers))
}

// end is one side of a session: what it sends, what it should get, and what it does when.
type end struct {
	c          conn
	r          io.Reader
	send, want int64
	out, in    Pattern
	s          *Session
	errs       []error
}

func (e *end) write() {
	n, err := send(e.c, &e.out, nil, e.send)
	e.s.Sent += n
	e.errs = append(e.errs, err)
}

// read reads to the end of input, or up to limit bytes if limit >= 0, checking every byte.
func (e *end) read(limit int64) error {
	buf := make([]byte, 32<<10)
	for limit < 0 || e.s.Got < limit {
		n, err := e.r.Read(buf)
		if cerr := e.in.Check(buf[:n]); cerr != nil && e.s.Wrong == "" {
			e.s.Wrong = cerr.Error()
		}
		e.s.Got += int64(n)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// play runs one side. first tells whether this side is the one that the closer's name speaks of.
func (e *end) play(c Closer, client bool) {
	first := (c == ClientFirst || c == ClientReset || c == ClientCloses) == client
	switch {
	case c == BothWays:
		var wg sync.WaitGroup
		var readErr error
		wg.Go(func() { readErr = e.read(-1) })
		e.write()
		e.errs = append(e.errs, e.c.CloseWrite())
		wg.Wait()
		e.errs = append(e.errs, readErr)
	case c.Clean() && first:
		e.write()
		e.errs = append(e.errs, e.c.CloseWrite(), e.read(-1))
	case c.Clean():
		e.errs = append(e.errs, e.read(-1))
		e.write()
	case first: // resets or closes
		var wg sync.WaitGroup
		var readErr error
		if c == ClientReset || c == ServerReset {
			wg.Go(func() { readErr = e.read(e.want / 2) })
		}
		e.write()
		wg.Wait()
		e.errs = append(e.errs, readErr)
		if c == ClientReset || c == ServerReset {
			e.errs = append(e.errs, e.c.SetLinger(0))
		}
	default: // the victim: sends and reads until something ends it
		var wg sync.WaitGroup
		wg.Go(func() { e.write() })
		err := e.read(-1)
		if err != nil {
			e.c.Close() // the writer may hang on a peer that is gone
		}
		wg.Wait()
		e.errs = append(e.errs, err)
	}
	e.c.Close()
	if err := errors.Join(e.errs...); err != nil {
		e.s.Err = err.Error()
	}
}

func (s *Server) randServer(c conn, br *bufio.Reader, r request) error {
	seed, i := r.int("seed"), int(r.int("i"))
	up, down, closer := plan(seed, i)
	x := Session{I: i}
	// a session whose client is gone without a trace must not hold up the account
	c.SetDeadline(time.Now().Add(time.Minute))
	// The client waits for this byte: a session that it resets at once is known here all the same.
	if _, err := c.Write([]byte{'+'}); err != nil {
		return err
	}
	e := end{c: c, r: br, send: down, want: up, out: Pattern{Seed: uint64(i)*2 + 1},
		in: Pattern{Seed: uint64(i) * 2}, s: &x}
	e.play(closer, false)
	s.record(r.args["run"], x)
	return nil
}

// RandomResult of Random.
type RandomResult struct {
	N        int            `json:"n"`
	OK       bool           `json:"ok"`
	Clean    int            `json:"clean"` // sessions in which every byte had to arrive, and did
	Cut      int            `json:"cut"`   // sessions that were cut off on purpose
	Faults   []string       `json:"faults,omitempty"`
	NumFault int            `json:"num_faults"`
	Closers  map[string]int `json:"closers"`
	Up       int64          `json:"up"`      // bytes that the client's sockets took
	UpGot    int64          `json:"up_got"`  // bytes that the server got
	Down     int64          `json:"down"`    // bytes that the server's sockets took
	DownGot  int64          `json:"got"`     // bytes that the client got
	Seconds  float64        `json:"seconds"` // without the report
}

// Random runs n sessions at once with sizes and closers drawn from seed, fetches the server's account and compares
// the two.
func Random(ctx context.Context, t Target, n int, seed int64) *RandomResult {
	res := &RandomResult{N: n, Closers: map[string]int{}}
	fault := func(format string, args ...any) {
		res.NumFault++
		if len(res.Faults) < 20 {
			res.Faults = append(res.Faults, fmt.Sprintf(format, args...))
		}
	}
	run := fmt.Sprintf("%d-%d", seed, time.Now().UnixNano())
	mine := make([]Session, n)
	start := time.Now()
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			s := &mine[i]
			s.I = i
			up, down, closer := plan(seed, i)
			c, err := t.open(ctx, "rand run=%s seed=%d i=%d", run, seed, i)
			if err != nil {
				s.Err = "open: " + err.Error()
				return
			}
			defer bound(ctx, c)()
			if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
				s.Err = "first byte: " + err.Error()
				c.Close()
				return
			}
			e := end{c: c, r: c, send: up, want: down, out: Pattern{Seed: uint64(i) * 2},
				in: Pattern{Seed: uint64(i)*2 + 1}, s: s}
			e.play(closer, true)
		})
	}
	wg.Wait()
	res.Seconds = time.Since(start).Seconds()
	theirs, err := fetchReport(ctx, t, run, n)
	if err != nil {
		fault("report: %v", err)
	}
	byI := map[int]Session{}
	for _, s := range theirs {
		if _, twice := byI[s.I]; twice {
			fault("session %d: served twice", s.I)
		}
		byI[s.I] = s
	}
	for i, m := range mine {
		up, down, closer := plan(seed, i)
		res.Closers[fmt.Sprint(int(closer))]++
		s, ok := byI[i]
		if !ok {
			fault("session %d (closer %d, %d up, %d down): the server has no account of it; client: %+v", i, closer, up, down, m)
			continue
		}
		res.Up, res.UpGot, res.Down, res.DownGot = res.Up+m.Sent, res.UpGot+s.Got, res.Down+s.Sent, res.DownGot+m.Got
		switch {
		case m.Wrong != "" || s.Wrong != "":
			fault("session %d: wrong bytes: client %q server %q", i, m.Wrong, s.Wrong)
		case m.Got > s.Sent || s.Got > m.Sent:
			fault("session %d: more came than was sent: client %+v server %+v", i, m, s)
		case closer.Clean() && (m.Sent != up || s.Got != up || s.Sent != down || m.Got != down || m.Err != "" || s.Err != ""):
			fault("session %d (closer %d, %d up, %d down): client %+v server %+v", i, closer, up, down, m, s)
		case closer.Clean():
			res.Clean++
		default:
			res.Cut++
		}
	}
	res.OK = res.NumFault == 0
	return res
}

func fetchReport(ctx context.Context, t Target, run string, n int) ([]Session, error) {
	c, err := t.open(ctx, "report run=%s n=%d ms=%d", run, n, 30000)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	defer bound(ctx, c)()
	var out []Session
	return out, json.NewDecoder(c).Decode(&out)
}
