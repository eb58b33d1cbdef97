package hbone

import (
	"bytes"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// TestSockWriterProperty: pieces of any number and size, written to a socket that takes them in parts, arrive whole
// and in order, and a socket that is gone is an error with what it took.
func TestSockWriterProperty(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		sizes := rapid.OneOf(rapid.SliceOfN(rapid.IntRange(1, 60_000), 1, 8),
			rapid.SliceOfN(rapid.IntRange(1, 30), maxIovec-1, 2*maxIovec+1)).Draw(rt, "sizes")
		a, b := tcpPair(t)
		defer a.Close()
		defer b.Close()
		a.SetWriteBuffer(16 << 10)
		var pieces [][]byte
		var want []byte
		for i, n := range sizes {
			piece := bytes.Repeat([]byte{byte(i), byte(i >> 8), byte(n)}, n/3+1)[:n]
			pieces, want = append(pieces, piece), append(want, piece...)
		}
		var reading sync.WaitGroup
		var got []byte
		reading.Go(func() { got, _ = io.ReadAll(b) })
		w := newSockWriter(a)
		n, err := w.WriteBuffers(pieces)
		if err != nil || int(n) != len(want) {
			rt.Fatalf("%d of %d bytes written: %v", n, len(want), err)
		}
		a.CloseWrite()
		reading.Wait()
		if !bytes.Equal(got, want) {
			rt.Fatalf("%d bytes arrived, not the %d that were written", len(got), len(want))
		}
		if n, err := w.WriteBuffers(pieces); !errors.Is(err, syscall.EPIPE) || n != 0 {
			rt.Fatalf("after the end: %d, %v", n, err)
		}
	})
}

// TestAdvance: whole pieces go, and the first of the rest begins where the kernel stopped.
func TestAdvance(t *testing.T) {
	text := []byte("abcdefghij")
	vec := func() []unix.Iovec {
		return []unix.Iovec{{Base: &text[0], Len: 3}, {Base: &text[3], Len: 1}, {Base: &text[4], Len: 6}}
	}
	for n := range len(text) + 1 {
		left := ""
		for _, v := range advance(vec(), uint64(n)) {
			i := bytes.IndexByte(text, *v.Base)
			left += string(text[i : i+int(v.Len)])
		}
		if left != string(text[n:]) {
			t.Errorf("after %d: %q", n, left)
		}
	}
}

// TestSocketEnds: how a kernel socket ends is told as of any other source and sink: its end of file is none, its
// reset, its deadline and its being closed are its own errors and not the stream's.
func TestSocketEnds(t *testing.T) {
	for name, c := range map[string]struct {
		end  func(near, far *net.TCPConn)
		want error // nil: an end of file
	}{
		"end of file": {func(near, _ *net.TCPConn) { near.CloseWrite() }, nil},
		"reset":       {func(near, _ *net.TCPConn) { near.SetLinger(0); near.Close() }, syscall.ECONNRESET},
		"closed":      {func(_, far *net.TCPConn) { far.Close() }, net.ErrClosed},
		"deadline":    {func(_, far *net.TCPConn) { far.SetReadDeadline(time.Unix(1, 0)) }, errTimeout},
	} {
		t.Run("source: "+name, func(t *testing.T) {
			a, b := tcpPair(t)
			cc, _, reqs, stop := link(t, a, b, Config{})
			defer stop()
			client, server := pair(t, cc, reqs)
			defer server.Close()
			near, far := tcpPair(t)
			defer near.Close()
			defer far.Close()
			near.Write([]byte("hello"))
			done := make(chan error, 1)
			var total int64
			go func() {
				n, err := client.ReadFrom(far)
				total = n
				done <- err
			}()
			if _, err := io.ReadFull(server, make([]byte, 5)); err != nil {
				t.Fatal(err)
			}
			c.end(near, far)
			err := <-done
			var source *SourceError
			switch {
			case c.want == nil && err != nil, c.want != nil && !errors.As(err, &source),
				c.want == errTimeout && !isTimeout(err), c.want != nil && c.want != errTimeout && !errors.Is(err, c.want):
				t.Errorf("got %v, want %v", err, c.want)
			}
			if total != 5 {
				t.Errorf("%d bytes, want 5", total)
			}
			if _, err := client.Write([]byte("!")); err != nil {
				t.Errorf("the stream is harmed: %v", err)
			}
		})
	}
	t.Run("sink", func(t *testing.T) {
		a, b := tcpPair(t)
		cc, _, reqs, stop := link(t, a, b, Config{})
		defer stop()
		client, server := pair(t, cc, reqs)
		defer client.Close()
		near, far := tcpPair(t)
		defer near.Close()
		far.Close()
		client.Write(payload(100_000))
		_, err := server.WriteToSocket(far, func(int) { t.Error("bytes were taken") })
		var sink *SinkError
		if !errors.As(err, &sink) || !errors.Is(err, net.ErrClosed) {
			t.Errorf("got %v, want the socket's own error", err)
		}
	})
}

// errTimeout stands for any error that is one.
var errTimeout = errors.New("a timeout")
