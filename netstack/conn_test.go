package netstack

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/nettest"
)

// eachWay runs a test for both families, with and without offload.
func eachWay(t *testing.T, f func(t *testing.T, j *joined, fam family)) {
	for _, off := range []bool{true, false} {
		for _, fam := range families {
			name := fam.name + "/plain"
			if off {
				name = fam.name + "/offload"
			}
			t.Run(name, func(t *testing.T) { f(t, join(t, off, nil), fam) })
		}
	}
}

func TestNetConn(t *testing.T) {
	for _, off := range []bool{true, false} {
		name := "plain"
		if off {
			name = "offload"
		}
		t.Run(name, func(t *testing.T) {
			j := join(t, off, nil)
			nettest.TestConn(t, func() (net.Conn, net.Conn, func(), error) {
				a, b := j.pipe(t, families[0])
				return a, b, func() { a.Close(); b.Close() }, nil
			})
		})
	}
}

func TestHalfClose(t *testing.T) {
	eachWay(t, func(t *testing.T, j *joined, fam family) {
		a, b := j.pipe(t, fam)
		if _, err := a.Write([]byte("ping")); err != nil {
			t.Fatal(err)
		}
		if err := a.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got := readAll(t, b); string(got) != "ping" {
			t.Fatalf("got %q", got)
		}
		if _, err := a.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
			t.Errorf("write after CloseWrite: %v", err)
		}
		// The other direction lives on.
		if _, err := b.Write([]byte("pong")); err != nil {
			t.Fatal(err)
		}
		b.Close()
		if got := readAll(t, a); string(got) != "pong" {
			t.Fatalf("got %q", got)
		}
		a.Close()
		if a.LocalAddrPort() != b.RemoteAddrPort() || a.RemoteAddrPort() != b.LocalAddrPort() {
			t.Errorf("addresses: %v-%v, %v-%v", a.LocalAddrPort(), a.RemoteAddrPort(), b.LocalAddrPort(), b.RemoteAddrPort())
		}
	})
}

func TestBulk(t *testing.T) {
	eachWay(t, func(t *testing.T, j *joined, fam family) {
		a, b := j.pipe(t, fam)
		data := make([]byte, 3<<20+17)
		rand.Read(data)
		go func() {
			a.Write(data)
			a.CloseWrite()
		}()
		// One direction by Read, the way back by WriteTo.
		got := readAll(t, b)
		if !bytes.Equal(got, data) {
			t.Fatal("data differ")
		}
		go func() {
			// Pieces of many sizes, as an application writes them.
			for p, n := got, 1; len(p) > 0; n = n*3%70001 + 1 {
				k := min(n, len(p))
				b.Write(p[:k])
				p = p[k:]
			}
			b.CloseWrite()
		}()
		var back bytes.Buffer
		if n, err := a.WriteTo(&back); err != nil || n != int64(len(data)) {
			t.Fatalf("WriteTo: %d, %v", n, err)
		}
		if !bytes.Equal(back.Bytes(), data) {
			t.Fatal("data differ on the way back")
		}
		a.Close()
		b.Close()
	})
}

// TestWriteBuffers: pieces of any size, empty ones too, arrive in order and whole, also where the send queue takes a
// part of a part; none at all are no error.
func TestWriteBuffers(t *testing.T) {
	eachWay(t, func(t *testing.T, j *joined, fam family) {
		a, b := j.pipe(t, fam)
		want := make([]byte, 4<<20)
		rand.Read(want)
		done := make(chan error, 1)
		go func() {
			sizes := []int{1, 0, 65160, 7, MaxWrite, 65160, 65160, 65160, 1448, MaxWrite + 1, 0, 300_000}
			var err error
			for i, rest := 0, want; len(rest) > 0 && err == nil; i++ {
				var pieces [][]byte
				for k := range 1 + i%4 {
					n := min(sizes[(i+k)%len(sizes)], len(rest))
					pieces = append(pieces, rest[:n])
					rest = rest[n:]
				}
				total := 0
				for _, p := range pieces {
					total += len(p)
				}
				var n int64
				if n, err = a.WriteBuffers(pieces); err == nil && n != int64(total) {
					err = io.ErrShortWrite
				}
			}
			if n, e := a.WriteBuffers(nil); n != 0 || e != nil {
				err = errors.Join(err, e, errors.New("no pieces"))
			}
			done <- errors.Join(err, a.CloseWrite())
		}()
		if got := readAll(t, b); !bytes.Equal(got, want) {
			t.Errorf("%d bytes arrived of %d, or others", len(got), len(want))
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestReset(t *testing.T) {
	eachWay(t, func(t *testing.T, j *joined, fam family) {
		a, b := j.pipe(t, fam)
		a.Reset()
		for range 3 {
			if _, err := b.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("read after reset: %v", err)
			}
		}
		if _, err := b.Write([]byte("x")); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("write after reset: %v", err)
		}
		if _, err := a.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("read after own reset: %v", err)
		}
		if err := a.Close(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("second close: %v", err)
		}
		b.Close()
	})
}

// A reset that is first met by a Write must not read as a clean end.
func TestResetSeenByWriteFirst(t *testing.T) {
	j := join(t, true, nil)
	a, b := j.pipe(t, families[0])
	a.Reset()
	for {
		if _, err := b.Write([]byte("x")); err != nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if _, err := b.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read: %v", err)
	}
	b.Close()
}

func TestCloseWithUnreadData(t *testing.T) {
	j := join(t, true, nil)
	a, b := j.pipe(t, families[0])
	a.Write([]byte("unread"))
	if err := b.WaitRead(); err != nil {
		t.Fatal(err)
	}
	b.Close()
	if _, err := a.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read: %v", err)
	}
	a.Close()
}

func TestWaitRead(t *testing.T) {
	j := join(t, true, nil)
	a, b := j.pipe(t, families[0])

	b.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if err := b.WaitRead(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("deadline: %v", err)
	}
	b.SetReadDeadline(time.Time{})

	done := make(chan error, 1)
	go func() { done <- b.WaitRead() }()
	select {
	case err := <-done:
		t.Fatalf("returned early: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	a.Write([]byte("x"))
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	b.Read(make([]byte, 1))

	a.CloseWrite()
	if err := b.WaitRead(); err != nil {
		t.Fatalf("at end of file: %v", err)
	}
	if _, err := b.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("read: %v", err)
	}

	go func() { done <- a.WaitRead() }()
	time.Sleep(10 * time.Millisecond)
	a.Close()
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Fatalf("closed while waiting: %v", err)
	}
	b.Close()
}

// blockingWriter holds WriteTo inside Write, where it lends the receive queue.
type blockingWriter struct {
	entered chan []byte // the first Write's argument
	leave   chan struct{}
}

func (w *blockingWriter) Write(b []byte) (int, error) {
	select {
	case w.entered <- b:
	case <-w.leave: // a second piece, when the test has ended
	}
	<-w.leave
	return len(b), nil
}

// What WriteTo lends must stay untouched until the writer is done with it, even
// if the connection is closed meanwhile; the peer hears of the close at once.
func TestCloseWhileLent(t *testing.T) {
	for _, how := range []string{"close", "reset", "stack"} {
		t.Run(how, func(t *testing.T) {
			j := join(t, true, nil)
			a, b := j.pipe(t, families[0])
			data := bytes.Repeat([]byte("lent"), 15000)
			a.Write(data)
			w := &blockingWriter{make(chan []byte), make(chan struct{})}
			done := make(chan error, 1)
			go func() { _, err := b.WriteTo(w); done <- err }()
			got := <-w.entered
			switch how {
			case "close":
				b.Close()
			case "reset":
				b.Reset()
			case "stack":
				j.server.Close()
			}
			if _, err := a.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("peer: %v", err)
			}
			if how != "stack" {
				// Churn the pools: freed memory would be reused and cleared.
				for range 20 {
					c, d := j.pipe(t, families[0])
					c.Write(make([]byte, 60000))
					d.WaitRead()
					c.Close()
					d.Close()
				}
			}
			if !bytes.Equal(got, data[:len(got)]) {
				t.Error("lent memory has changed")
			}
			close(w.leave)
			if err := <-done; !errors.Is(err, net.ErrClosed) {
				t.Errorf("WriteTo: %v", err)
			}
			a.Close()
		})
	}
}

// TestSentEnd: a connection tells when the peer has acknowledged everything, the end included.
func TestSentEnd(t *testing.T) {
	j := join(t, true, nil)
	peer, own := j.pipe(t, families[0])
	var sent int
	own.SetWriteDeadline(time.Now().Add(200 * time.Millisecond)) // long enough to fill what the peer does not read
	for {
		n, err := own.Write(make([]byte, MaxWrite))
		if sent += n; err != nil {
			break
		}
	}
	if own.SentEnd() {
		t.Error("sent all before the end")
	}
	own.CloseWrite()
	time.Sleep(50 * time.Millisecond)
	if own.SentEnd() {
		t.Error("sent all while the peer reads nothing")
	}
	if n, err := io.Copy(io.Discard, peer); err != nil || n != int64(sent) {
		t.Errorf("the peer read %d of %d bytes, %v", n, sent, err)
	}
	for end := time.Now().Add(patience); !own.SentEnd(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not sent all although the peer has the end")
		}
	}
}

// TestOnReset: a connection tells of its loss while nobody reads or writes, once; not of an orderly end, nor of what
// its own user did.
func TestOnReset(t *testing.T) {
	j := join(t, true, nil)
	for name, c := range map[string]struct {
		lose func(peer, own *Conn)
		told bool
	}{
		"reset":           {func(peer, _ *Conn) { peer.Reset() }, true},
		"reset after FIN": {func(peer, _ *Conn) { peer.CloseWrite(); time.Sleep(20 * time.Millisecond); peer.Reset() }, true},
		"orderly": {func(peer, own *Conn) {
			peer.CloseWrite()
			own.CloseWrite()
			io.Copy(io.Discard, own)
			io.Copy(io.Discard, peer)
			peer.Close()
		}, false},
		"own": {func(_, own *Conn) { own.Reset() }, false},
	} {
		for _, early := range []bool{true, false} {
			peer, own := j.pipe(t, families[0])
			told := make(chan error, 2)
			if early {
				own.OnReset(func(err error) { told <- err })
			}
			c.lose(peer, own)
			if !early {
				time.Sleep(20 * time.Millisecond)
				own.OnReset(func(err error) { told <- err })
			}
			wait := patience
			if !c.told {
				wait = 50 * time.Millisecond
			}
			select {
			case err := <-told:
				if !c.told || !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("%s, early %v: told %v", name, early, err)
				}
			case <-time.After(wait):
				if c.told {
					t.Errorf("%s, early %v: not told", name, early)
				}
			}
			peer.Close()
			own.Close()
			if len(told) > 0 {
				t.Errorf("%s, early %v: told twice", name, early)
			}
		}
	}
}
