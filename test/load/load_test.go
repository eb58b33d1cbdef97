package load

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// start runs a Server and a ByteServer on loopback until the test ends.
func start(t *testing.T) (many, one Target) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 2)
	listen := func(f func(context.Context, net.Listener) error) Target {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		go func() { done <- f(ctx, l) }()
		return Target{Addr: l.Addr().String()}
	}
	many, one = listen((&Server{Log: t.Logf}).Serve), listen(ByteServer)
	t.Cleanup(func() {
		cancel()
		for range 2 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	})
	return many, one
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func TestPattern(t *testing.T) {
	whole := make([]byte, 10_000)
	(&Pattern{Seed: 7}).Read(whole)
	if n := bytes.Count(whole, []byte(Marker)); n != 157 {
		t.Errorf("%d markers", n)
	}
	p, q := Pattern{Seed: 7}, Pattern{Seed: 7}
	for n := 1; len(whole) > 0; n = n*3%97 + 1 {
		n = min(n, len(whole))
		b := make([]byte, n)
		p.Read(b)
		if !bytes.Equal(b, whole[:n]) {
			t.Fatal("reads in parts differ")
		}
		if err := q.Check(b); err != nil {
			t.Fatal(err)
		}
		whole = whole[n:]
	}
	bad := make([]byte, 200)
	(&Pattern{Seed: 7}).Read(bad)
	bad[150] ^= 1
	if err := (&Pattern{Seed: 7}).Check(bad); err == nil || !strings.Contains(err.Error(), "byte 150") {
		t.Errorf("a flipped bit: %v", err)
	}
	if err := (&Pattern{Seed: 7}).Check(bad[64:128]); err == nil {
		t.Error("a moved block was not noticed")
	}
}

func TestHistogram(t *testing.T) {
	var h Histogram
	for i := 1; i <= 10_000; i++ {
		h.Add(time.Duration(i) * 10 * time.Microsecond)
	}
	h.Add(-time.Second)
	for _, c := range []struct{ q, want float64 }{{0.5, 50}, {0.9, 90}, {0.99, 99}, {1, 100}} {
		if got := float64(h.Quantile(c.q).Microseconds()) / 1000; got < c.want*0.999 || got > c.want*1.035 {
			t.Errorf("quantile %v: %v ms, want about %v", c.q, got, c.want)
		}
	}
	for us := uint64(0); us < 1<<30; us += us/7 + 1 {
		if i := bucket(us); us > bucketTop(i) || i > 0 && us <= bucketTop(i-1) {
			t.Fatalf("%d us is in bucket %d (%d, %d]", us, i, bucketTop(i-1), bucketTop(i))
		}
	}
}

func TestTransfer(t *testing.T) {
	many, _ := start(t)
	r := Transfer(testContext(t), many, 5<<20+13, 3<<20+7, 3)
	if !r.OK || r.Sent != 5<<20+13 || r.Got != 3<<20+7 || r.SentSHA == "" || r.Server.Peer == "" {
		t.Fatalf("%+v", r)
	}
	if r := Transfer(testContext(t), many, 0, 0, 3); !r.OK {
		t.Fatalf("empty: %+v", r)
	}
}

// A relay that flips one bit, or swallows one byte, must be found by each check that claims to look at bytes.
func TestFaultsAreFound(t *testing.T) {
	many, _ := start(t)
	for name, spoil := range map[string]func(b []byte, off int64) []byte{
		"flip": func(b []byte, off int64) []byte {
			if off <= 70_000 && off+int64(len(b)) > 70_000 {
				b[70_000-off] ^= 4
			}
			return b
		},
		"lose": func(b []byte, off int64) []byte {
			if off <= 70_000 && off+int64(len(b)) > 70_000 {
				return append(b[:70_000-off:70_000-off], b[70_000-off+1:]...)
			}
			return b
		},
	} {
		t.Run(name, func(t *testing.T) {
			bad := relay(t, many.Addr, spoil)
			ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
			defer cancel()
			if r := Transfer(ctx, bad, 200_000, 0, 1); r.OK {
				t.Errorf("transfer: %+v", r)
			}
			if r := HalfClose(ctx, bad, 4, 4, 300_000); r.Failed == 0 && r.Bytes > 300_000 {
				t.Errorf("half-close: %+v", r)
			}
		})
	}
}

// relay copies both ways, passing what goes to the server through spoil.
func relay(t *testing.T, to string, spoil func([]byte, int64) []byte) Target {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s, err := net.Dial("tcp", to)
			if err != nil {
				c.Close()
				return
			}
			go func() { io.Copy(c, s); c.Close() }()
			go func() {
				buf := make([]byte, 4096)
				var off int64
				for {
					n, err := c.Read(buf)
					s.Write(spoil(buf[:n], off))
					off += int64(n)
					if err != nil {
						s.(*net.TCPConn).CloseWrite()
						return
					}
				}
			}()
		}
	}()
	return Target{Addr: l.Addr().String()}
}

func TestHalfClose(t *testing.T) {
	many, _ := start(t)
	if r := HalfClose(testContext(t), many, 200, 1000, 100_000); r.OK != 200 || r.Failed != 0 || r.Bytes == 0 {
		t.Fatalf("%+v", r)
	}
}

func TestRandom(t *testing.T) {
	many, _ := start(t)
	r := Random(testContext(t), many, 300, 5)
	if !r.OK || r.Clean+r.Cut != 300 || len(r.Closers) != int(numClosers) || r.Clean < 60 || r.Cut < 60 {
		t.Fatalf("%+v", r)
	}
}

func TestRatesAndLatencies(t *testing.T) {
	many, one := start(t)
	ctx := testContext(t)
	// How much is done in a time is up to the machine: one that is busy gets more of it.
	const long = 20 * time.Second
	for d := 200 * time.Millisecond; ; d *= 4 {
		r := ConnectRate(ctx, one, 4, d)
		if r.Failed != 0 || r.Latency.N != uint64(r.OK) || r.OK > 0 && r.Latency.P50 <= 0 || r.OK < 10 && d > long {
			t.Errorf("rate: %+v", r)
		}
		if r.OK >= 10 || d > long {
			break
		}
	}
	if r := OpenLoop(ctx, many, 3, 300, 1024, 500*time.Millisecond); len(r.Errors) != 0 || r.Lost != 0 || r.Sent != 150 ||
		r.Latency.N != 150 {
		t.Errorf("echo: %+v", r)
	}
	for _, dir := range []string{"up", "down", "both"} {
		for d := 200 * time.Millisecond; ; d *= 4 {
			r := Bulk(ctx, many, 2, dir, d)
			if r.Failed != 0 || r.Up+r.Down != r.Bytes || r.Bytes < 1<<20 && d > long {
				t.Errorf("bulk %s: %+v", dir, r)
			}
			if r.Bytes >= 1<<20 || d > long {
				break
			}
		}
	}
	ic, err := Idle(ctx, many, 100)
	if err != nil {
		t.Fatal(err)
	}
	defer ic.Close()
	if err := ic.Check(); err != nil || ic.Len() != 100 {
		t.Errorf("idle: %d, %v", ic.Len(), err)
	}
	if w, err := WhoAmI(ctx, many); err != nil || !strings.HasPrefix(w.Peer, "127.0.0.1:") {
		t.Errorf("whoami: %+v, %v", w, err)
	}
}

// TestIdleDescriptors: an idle connection costs its server one descriptor. With a pipe each, 10,000 could not be opened
// where a process may have 20,000.
func TestIdleDescriptors(t *testing.T) {
	many, _ := start(t)
	pipes := func() (n int) {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Skip(err)
		}
		for _, fd := range fds {
			if at, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(at, "pipe:") {
				n++
			}
		}
		return n
	}
	before := pipes()
	ic, err := Idle(testContext(t), many, 50)
	if err != nil {
		t.Fatal(err)
	}
	defer ic.Close()
	if n := pipes() - before; n > 20 {
		t.Errorf("50 idle connections have %d ends of pipes", n)
	}
}

func TestDialOnce(t *testing.T) {
	many, _ := start(t)
	if r := DialOnce(testContext(t), many); !r.OK || r.Local == "" {
		t.Errorf("%+v", r)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if r := DialOnce(testContext(t), Target{Addr: l.Addr().String()}); r.OK || r.Errno != 111 {
		t.Errorf("closed port: %+v", r)
	}
}

// A server that stalls must show in the latency of the requests that were due meanwhile: that is what open loop means.
func TestOpenLoopCountsFromDue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dial := func(context.Context, string, string) (net.Conn, error) {
			a, b := net.Pipe()
			go func() {
				defer b.Close()
				buf := make([]byte, 100)
				b.Read(buf) // the request line
				b.Read(buf[:1])
				b.Write(buf[:1])
				for i := 0; ; i++ {
					if _, err := io.ReadFull(b, buf[:10]); err != nil {
						return
					}
					if i == 10 {
						time.Sleep(500 * time.Millisecond)
					}
					b.Write(buf[:10])
				}
			}()
			return halfPipe{a}, nil
		}
		r := OpenLoop(t.Context(), Target{Dial: dial}, 1, 100, 10, time.Second)
		// Requests 10 to 59 were due during the stall: half of all, of 500, 490, ... ms.
		if r.Lost != 0 || r.Latency.N != 100 || r.Latency.Max < 490 || r.Latency.P90 < 380 || r.Latency.P50 > 50 {
			t.Errorf("%+v", r)
		}
	})
}

type halfPipe struct{ net.Conn }

func (h halfPipe) CloseWrite() error   { return h.Close() }
func (h halfPipe) SetLinger(int) error { return nil }

// TestBystander: an undisturbed bystander counts every request; one whose servers are away, or lie, says which of its
// requests failed and goes on.
func TestBystander(t *testing.T) {
	many, one := start(t)
	r := Bystander(testContext(t), one, many, 200, 1024, 500*time.Millisecond)
	if r.Failed != 0 || r.Connects.N != 100 || r.Echoes.N != 100 || r.Echoes.P99 <= 0 {
		t.Errorf("undisturbed: %+v", r)
	}
	r = Bystander(testContext(t), Target{Addr: "127.0.0.1:1"}, many, 200, 1024, 200*time.Millisecond)
	if r.Failed != 40 || r.Connects.N != 0 || r.Echoes.N != 40 || len(r.Errors) != 10 ||
		!strings.Contains(r.Errors[0], "refused") {
		t.Errorf("no byte server: %+v", r)
	}
	// The many-purpose server sends no byte by itself, and the byte server does not echo.
	r = Bystander(testContext(t), one, one, 200, 1024, 200*time.Millisecond)
	if r.Failed != 40 || r.Connects.N != 40 || r.Echoes.N != 0 {
		t.Errorf("a server that does not echo: %+v", r)
	}
	// A request that waits counts from when it was due, and so do those behind it.
	var first sync.Once
	slow := Target{Addr: many.Addr, Dial: func(ctx context.Context, network, addr string) (net.Conn, error) {
		first.Do(func() { time.Sleep(300 * time.Millisecond) })
		return (&net.Dialer{}).DialContext(ctx, network, addr)
	}}
	if r = Bystander(testContext(t), one, slow, 200, 1024, 400*time.Millisecond); r.Failed != 0 || r.Echoes.Max < 300 ||
		r.Echoes.P90 < 50 {
		t.Errorf("one slow connection of four: %+v", r)
	}
}
