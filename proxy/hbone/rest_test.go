package hbone

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// TestRest: a reader that is sent away is called when there is something to read, or a reason to read no more, and then
// reads what any other would have.
func TestRest(t *testing.T) {
	for name, c := range map[string]struct {
		wake func(own, peer *Stream)
		want error // of WaitRead
		read error
	}{
		"data":    {wake: func(_, peer *Stream) { peer.Write([]byte("x")) }},
		"end":     {wake: func(_, peer *Stream) { peer.CloseWrite() }, read: io.EOF},
		"reset":   {wake: func(_, peer *Stream) { peer.Reset(http2.ErrCodeConnect) }, read: syscall.ECONNRESET},
		"closed":  {wake: func(own, _ *Stream) { own.Close() }, want: net.ErrClosed, read: net.ErrClosed},
		"crashed": {wake: func(own, _ *Stream) { own.Crashed(errors.New("x")) }},
		"deadline": {wake: func(own, _ *Stream) { own.SetReadDeadline(time.Now().Add(time.Millisecond)) },
			want: os.ErrDeadlineExceeded, read: os.ErrDeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := tcpPair(t)
			cc, _, reqs, stop := link(t, a, b, Config{})
			defer stop()
			own, peer := pair(t, cc, reqs)
			for range 2 {
				again, waited := make(chan struct{}, 2), make(chan error, 1)
				go func() { waited <- own.WaitRead() }()
				own.Rest(func() { again <- struct{}{} })
				if err := <-waited; err != syscall.EAGAIN {
					t.Fatalf("the wait ended with %v, want EAGAIN", err)
				}
				if len(again) > 0 {
					t.Fatal("called although nothing came")
				}
				c.wake(own, peer)
				select {
				case <-again:
				case <-time.After(20 * time.Second):
					t.Fatal("the reader is not called")
				}
				if name == "crashed" {
					return // whatever it reads, it is told
				}
				if err := own.WaitRead(); err != c.want {
					t.Errorf("WaitRead: %v, want %v", err, c.want)
				}
				if _, err := own.Read(make([]byte, 1)); !errors.Is(err, c.read) {
					t.Errorf("Read: %v, want %v", err, c.read)
				}
				if len(again) > 0 {
					t.Error("called twice")
				}
				if c.read != nil {
					return
				}
			}
		})
	}
}
