package proxy

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pieces keeps what is written to it, and the size of the largest write.
type pieces struct {
	bytes.Buffer
	most int
	fail error
}

func (p *pieces) Write(b []byte) (int, error) {
	if p.fail != nil {
		return 0, p.fail
	}
	p.most = max(p.most, len(b))
	return p.Buffer.Write(b)
}

// TestFromSocket: bytes of a kernel socket go in pieces as large as what waits, and what ended it is told.
func TestFromSocket(t *testing.T) {
	const size = 1 << 20
	data := make([]byte, size)
	rand.NewChaCha8([32]byte{3}).Read(data)
	t.Run("bytes", func(t *testing.T) {
		near, far := tcpPair(t)
		far.SetReadBuffer(4 * size)
		near.SetWriteBuffer(4 * size)
		if _, err := near.Write(data); err != nil {
			t.Fatal(err)
		}
		near.CloseWrite()
		for waiting(t, far, unix.TIOCINQ) < size {
			time.Sleep(time.Millisecond)
		}
		var to pieces
		total := 0
		if err := moveFromSocket(&to, far, func(n int) { total += n }); err != nil {
			t.Error(err)
		}
		if !bytes.Equal(to.Bytes(), data) || total != size {
			t.Errorf("%d bytes arrived, %d were counted, or they are not those that were sent", to.Len(), total)
		}
		if to.most != socketRead {
			t.Errorf("of %d bytes that waited %d were read at once, want %d", size, to.most, socketRead)
		}
	})
	t.Run("errors", func(t *testing.T) {
		near, far := tcpPair(t)
		near.SetLinger(0)
		near.Close()
		var c *copyError
		err := moveFromSocket(io.Discard, far, func(int) {})
		if !isReset(err) || !errors.As(err, &c) || c.prefix != receivePrefix {
			t.Errorf("a reset is %v", err)
		}
		near, far = tcpPair(t)
		near.Write(data[:1])
		if err := moveFromSocket(&pieces{fail: os.ErrInvalid}, far, func(int) {}); !errors.Is(err, os.ErrInvalid) ||
			!errors.As(err, &c) || c.prefix == receivePrefix {
			t.Errorf("a failed write is %v", err)
		}
		near, far = tcpPair(t)
		defer near.Close() // not before, by the collector: that would be an end of file
		time.AfterFunc(10*time.Millisecond, func() { far.Close() })
		if err := moveFromSocket(io.Discard, far, func(int) {}); !ignorable(err) || !errors.Is(err, net.ErrClosed) ||
			errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("a closed socket is %v", err)
		}
	})
}

// stalled takes what it is given when it is told to. It tells the size of that, and of the buffer that it is in.
type stalled struct {
	got  chan [2]int
	take chan bool
}

func (s stalled) Write(b []byte) (int, error) {
	s.got <- [2]int{len(b), cap(b)}
	<-s.take
	return len(b), nil
}

// TestFromSocketStalled: a write that waits for a far side that does not read holds a small buffer, unless there was
// much to read at last.
func TestFromSocketStalled(t *testing.T) {
	near, far := tcpPair(t)
	near.SetWriteBuffer(1 << 20)
	far.SetReadBuffer(1 << 20)
	to := stalled{make(chan [2]int), make(chan bool)}
	done := make(chan error, 1)
	go func() { done <- moveFromSocket(to, far, func(int) {}) }()
	near.Write([]byte{1})
	holds := func(n, buffer int) {
		t.Helper()
		if got := <-to.got; got != [2]int{n, buffer} {
			t.Errorf("%d bytes wait in a buffer of %d, want %d in one of %d", got[0], got[1], n, buffer)
		}
	}
	send := func(n int) {
		near.Write(make([]byte, n))
		for waiting(t, far, unix.TIOCINQ) < n {
			time.Sleep(time.Millisecond)
		}
		to.take <- true
	}
	holds(1, socketReadFew)
	send(socketReadFew + socketRead)
	holds(socketReadFew, socketReadFew)
	to.take <- true
	holds(socketRead, socketRead)
	send(1)
	holds(1, socketRead) // read into what the bulk has left
	send(1)
	holds(1, socketReadFew)
	near.Close()
	to.take <- true
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A socket on which nothing comes any more holds no buffer: net's WriteTo kept 32 KiB for each.
func TestFromSocketRests(t *testing.T) {
	const n = 100
	var all []*net.TCPConn // the far ends of near ones
	for range n {
		near, far := tcpPair(t)
		near.Write([]byte{1})
		all = append(all, near, far)
	}
	live := func() uint64 {
		runtime.GC()
		runtime.GC() // what a pool has outlives one
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := live()
	var work sync.WaitGroup
	for i := 1; i < len(all); i += 2 {
		work.Go(func() { new(mover).move(connSink{all[i]}, all[i], func(int) {}) })
	}
	for i := 1; i < len(all); i += 2 {
		for waiting(t, all[i], unix.TIOCINQ) > 0 {
			time.Sleep(time.Millisecond)
		}
	}
	after := live()
	for i := 0; i < len(all); i += 2 {
		all[i].Close()
	}
	work.Wait()
	if each := max(after, before) - before; each/n > 8<<10 {
		t.Errorf("each of %d sockets that wait holds %d bytes", n, each/n)
	}
}

// connSink is a Conn that takes everything.
type connSink struct{ Conn }

func (connSink) Write(b []byte) (int, error) { return len(b), nil }
