package proxy

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztun/proxy/hbone"
)

// streamPair is both ends of a stream of a tunnel, and the sockets beneath.
func streamPair(t *testing.T) (client, server *hbone.Stream, a, b *net.TCPConn) {
	t.Helper()
	a, b = tcpPair(t)
	got, over := make(chan *hbone.Stream, 1), make(chan struct{})
	sc := hbone.NewServerConn(b, hbone.Config{}, func(ss *hbone.ServerStream) {
		s, err := ss.Accept(&hbone.Response{Status: 200})
		if err != nil {
			t.Error(err)
		}
		got <- s
		<-over // whoever returns gives the stream back
	})
	var serving sync.WaitGroup
	serving.Go(func() { sc.Serve(context.Background()) })
	cc, err := hbone.NewClientConn(a, hbone.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		close(over)
		cc.Close()
		serving.Wait()
	})
	client, _, err = cc.Open(t.Context(), &hbone.Request{Authority: "10.0.0.1:80"})
	if err != nil {
		t.Fatal(err)
	}
	return client, <-got, a, b
}

// waiting is how many bytes of a socket nobody has read (TIOCINQ), or the other end has not acknowledged (TIOCOUTQ).
func waiting(t *testing.T, c *net.TCPConn, which uint) (n int) {
	t.Helper()
	rc, err := c.SyscallConn()
	if err == nil {
		rc.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), which) })
	}
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestSocketsMoveInLargePieces: between a tunnel and an application's kernel socket bytes are read straight into
// frames as large as what waits, and written many frames at once. (net's own copying, which was here before, has
// 32 KiB, held also while it waits, and copies them once more.)
func TestSocketsMoveInLargePieces(t *testing.T) {
	const size = 1 << 20
	data := make([]byte, size)
	rand.NewChaCha8([32]byte{7}).Read(data)
	largest := func(most *int) func(int) { return func(n int) { *most = max(*most, n) } }
	eventually := func(what string, done func() bool) {
		t.Helper()
		for end := time.Now().Add(20 * time.Second); !done(); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s after 20 s", what)
			}
		}
	}
	t.Run("to a stream", func(t *testing.T) {
		client, server, _, _ := streamPair(t)
		near, far := tcpPair(t)
		far.SetReadBuffer(4 * size)
		near.SetWriteBuffer(4 * size)
		var work sync.WaitGroup
		work.Go(func() {
			near.Write(data)
			near.CloseWrite()
		})
		eventually("the bytes do not wait", func() bool { return waiting(t, far, unix.TIOCINQ) >= size })
		work.Go(func() {
			if got, err := io.ReadAll(server); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes arrived, not those that were sent (%v)", len(got), err)
			}
			server.CloseWrite()
		})
		most := 0
		if err := new(mover).move(client, far, largest(&most)); err != nil {
			t.Error(err)
		}
		client.CloseWrite()
		work.Wait()
		if want := 60 << 10; most < want {
			t.Errorf("of %d bytes that waited %d were read at once, want %d", size, most, want)
		}
	})
	t.Run("from a stream", func(t *testing.T) {
		client, server, a, b := streamPair(t)
		near, far := tcpPair(t)
		near.SetReadBuffer(16 << 10)
		far.SetWriteBuffer(16 << 10)
		var work sync.WaitGroup
		most := 0
		work.Go(func() {
			if err := new(mover).move(far, server, largest(&most)); err != nil {
				t.Error(err)
			}
			far.CloseWrite()
			server.CloseWrite()
		})
		// The application does not read: what is more than the sockets hold waits at the stream.
		if n, err := client.Write(data); n != size || err != nil {
			t.Fatal(n, err)
		}
		client.CloseWrite()
		eventually("the bytes are under way", func() bool {
			return waiting(t, a, unix.TIOCOUTQ) == 0 && waiting(t, b, unix.TIOCINQ) == 0
		})
		if got, err := io.ReadAll(near); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes arrived, not those that were sent (%v)", len(got), err)
		}
		work.Wait()
		if want := 120 << 10; most < want {
			t.Errorf("of %d bytes that had arrived %d were written at once, want %d", size, most, want)
		}
	})
}
