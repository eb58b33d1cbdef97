package load

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"
)

// conn is what both ends need of a connection; *net.TCPConn has it.
type conn interface {
	net.Conn
	CloseWrite() error
	SetLinger(sec int) error
}

// Server answers the workloads of this package. The zero value is ready; Log may be nil.
type Server struct {
	Log func(format string, args ...any)

	mu   sync.Mutex
	runs map[string][]Session // results of rand sessions by run, bounded by maxRuns and maxSessions
}

const (
	maxRuns     = 64
	maxSessions = 100_000
	bufSize     = 128 << 10
)

// Trailer is what the server says after a transfer or a sink: what it got and what it sent.
type Trailer struct {
	Peer    string  `json:"peer"`
	Local   string  `json:"local"`
	Got     int64   `json:"got"`
	GotSHA  string  `json:"got_sha256,omitempty"`
	Sent    int64   `json:"sent"`
	SentSHA string  `json:"sent_sha256,omitempty"`
	Seconds float64 `json:"seconds"` // from the request line to the end of input
}

// Serve accepts until ctx ends or the listener fails, and returns when every connection has ended.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	return serve(ctx, l, s.handle, s.Log)
}

// ByteServer sends one byte to everyone who connects and closes first.
func ByteServer(ctx context.Context, l net.Listener) error {
	return serve(ctx, l, func(c conn) error { _, err := c.Write([]byte{'x'}); return err }, nil)
}

func serve(ctx context.Context, l net.Listener, handle func(conn) error, logf func(string, ...any)) error {
	var wg sync.WaitGroup
	var mu sync.Mutex
	open := map[net.Conn]struct{}{}
	stop := context.AfterFunc(ctx, func() {
		l.Close()
		mu.Lock()
		defer mu.Unlock()
		for c := range open {
			c.Close()
		}
	})
	defer stop()
	defer wg.Wait()
	for {
		c, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		mu.Lock()
		open[c] = struct{}{}
		mu.Unlock()
		wg.Go(func() {
			if err := handle(c.(conn)); err != nil && logf != nil {
				logf("%v: %v", c.RemoteAddr(), err)
			}
			c.Close()
			mu.Lock()
			delete(open, c)
			mu.Unlock()
		})
	}
}

// request is the parsed first line.
type request struct {
	verb string
	args map[string]string
}

func (r request) int(key string) int64 {
	n, _ := strconv.ParseInt(r.args[key], 10, 64)
	return n
}

func readRequest(br *bufio.Reader) (request, error) {
	line, err := br.ReadSlice('\n')
	if err != nil {
		return request{}, fmt.Errorf("request line: %w", err)
	}
	f := strings.Fields(string(line))
	if len(f) == 0 {
		return request{}, errors.New("empty request line")
	}
	r := request{verb: f[0], args: map[string]string{}}
	for _, kv := range f[1:] {
		k, v, _ := strings.Cut(kv, "=")
		r.args[k] = v
	}
	return r, nil
}

func (s *Server) handle(c conn) error {
	br := bufio.NewReaderSize(c, 4096)
	r, err := readRequest(br)
	if err != nil {
		return err
	}
	switch r.verb {
	case "echo":
		_, err := io.Copy(c, br)
		return err
	case "hold":
		return hold(c, br)
	case "whoami":
		return json.NewEncoder(c).Encode(Trailer{Peer: c.RemoteAddr().String(), Local: c.LocalAddr().String()})
	case "sink":
		return sink(c, br, r)
	case "source":
		return source(c, r)
	case "xfer":
		return xferServer(c, br, r)
	case "rand":
		return s.randServer(c, br, r)
	case "report":
		return s.report(c, r)
	}
	return fmt.Errorf("unknown verb %q", r.verb)
}

// hold is echo for connections that are open by the ten thousand: io.Copy between two sockets splices, and has a pipe
// in hand for as long as it waits, which is two more descriptors and up to 64 KiB of kernel memory each.
func hold(c conn, br *bufio.Reader) error {
	var buf [64]byte
	for {
		n, err := br.Read(buf[:])
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := c.Write(buf[:n]); err != nil {
			return err
		}
	}
}

func newHash(on bool) hash.Hash {
	if on {
		return sha256.New()
	}
	return nil
}

func sum(h hash.Hash) string {
	if h == nil {
		return ""
	}
	return hex.EncodeToString(h.Sum(nil))
}

// drain reads to EOF (or n bytes if n >= 0), hashing.
func drain(r io.Reader, h hash.Hash, n int64) (int64, error) {
	buf := make([]byte, bufSize)
	var got int64
	for n < 0 || got < n {
		b := buf
		if n >= 0 && n-got < int64(len(b)) {
			b = b[:n-got]
		}
		k, err := r.Read(b)
		if h != nil {
			h.Write(b[:k])
		}
		got += int64(k)
		if err == io.EOF {
			return got, nil
		}
		if err != nil {
			return got, err
		}
	}
	return got, nil
}

// sink reads to the end of input, then replies with what it computed from all of it: the reply of a half-closed
// connection.
func sink(c conn, br *bufio.Reader, r request) error {
	start := time.Now()
	h := newHash(r.args["hash"] == "1")
	n, err := drain(br, h, -1)
	if err != nil {
		return err
	}
	return json.NewEncoder(c).Encode(Trailer{Peer: c.RemoteAddr().String(), Local: c.LocalAddr().String(), Got: n,
		GotSHA: sum(h), Seconds: time.Since(start).Seconds()})
}

// source sends for a time, then closes.
func source(c conn, r request) error {
	buf := make([]byte, bufSize)
	(&Pattern{}).Read(buf)
	deadline := time.Now().Add(time.Duration(r.int("ms")) * time.Millisecond)
	for time.Now().Before(deadline) {
		if _, err := c.Write(buf); err != nil {
			return err
		}
	}
	return nil
}

// send writes n bytes of the pattern, hashing.
func send(w io.Writer, p *Pattern, h hash.Hash, n int64) (int64, error) {
	buf := make([]byte, bufSize)
	var sent int64
	for sent < n {
		b := buf[:min(int64(len(buf)), n-sent)]
		p.Read(b)
		if h != nil {
			h.Write(b)
		}
		k, err := w.Write(b)
		sent += int64(k)
		if err != nil {
			return sent, err
		}
	}
	return sent, nil
}

func xferServer(c conn, br *bufio.Reader, r request) error {
	start := time.Now()
	up, down, hashed := r.int("up"), r.int("down"), r.args["hash"] == "1"
	t := Trailer{Peer: c.RemoteAddr().String(), Local: c.LocalAddr().String()}
	upHash, downHash := newHash(hashed), newHash(hashed)
	var readErr error
	var wg sync.WaitGroup
	wg.Go(func() { t.Got, readErr = drain(br, upHash, up) })
	var sendErr error
	t.Sent, sendErr = send(c, &Pattern{Seed: uint64(r.int("seed")) + 1}, downHash, down)
	if sendErr != nil {
		c.Close()
	}
	wg.Wait()
	if err := errors.Join(readErr, sendErr); err != nil {
		return err
	}
	t.GotSHA, t.SentSHA, t.Seconds = sum(upHash), sum(downHash), time.Since(start).Seconds()
	return json.NewEncoder(c).Encode(t)
}

// report sends the finished sessions of a run and forgets them. It waits until n are there, at most ms.
func (s *Server) report(c conn, r request) error {
	run, n := r.args["run"], int(r.int("n"))
	deadline := time.Now().Add(time.Duration(r.int("ms")) * time.Millisecond)
	for {
		s.mu.Lock()
		have := s.runs[run]
		done := len(have) >= n || time.Now().After(deadline)
		if done {
			delete(s.runs, run)
		}
		s.mu.Unlock()
		if done {
			return json.NewEncoder(c).Encode(have)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (s *Server) record(run string, x Session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.runs == nil {
		s.runs = map[string][]Session{}
	}
	if len(s.runs[run]) < maxSessions && (s.runs[run] != nil || len(s.runs) < maxRuns) {
		s.runs[run] = append(s.runs[run], x)
	}
}
