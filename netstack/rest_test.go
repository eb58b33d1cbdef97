package netstack

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"
)

// TestRest: a reader that is sent away is called when there is something to read, or a reason to read no more, and then
// reads what any other would have.
func TestRest(t *testing.T) {
	j := join(t, true, nil)
	for name, c := range map[string]struct {
		wake func(own, peer *Conn)
		want error // of WaitRead
		read error
	}{
		"data":  {wake: func(_, peer *Conn) { peer.Write([]byte("x")) }},
		"end":   {wake: func(_, peer *Conn) { peer.CloseWrite() }, read: io.EOF},
		"reset": {wake: func(_, peer *Conn) { peer.Reset() }, read: syscall.ECONNRESET},
		"closed": {wake: func(own, _ *Conn) { own.Close() }, want: net.ErrClosed,
			read: net.ErrClosed},
		"deadline": {wake: func(own, _ *Conn) { own.SetReadDeadline(time.Now().Add(time.Millisecond)) },
			want: os.ErrDeadlineExceeded, read: os.ErrDeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			own, peer := j.pipe(t, families[0])
			defer own.Close()
			defer peer.Close()
			for range 2 { // the second time nobody waits yet when it is asked
				again, waited := make(chan struct{}, 2), make(chan error, 1)
				go func() { waited <- own.WaitRead() }()
				own.Rest(func() { again <- struct{}{} })
				if err := <-waited; !errors.Is(err, syscall.EAGAIN) {
					t.Fatalf("the wait ended with %v, want EAGAIN", err)
				}
				c.wake(own, peer)
				within(t, again)
				if err := own.WaitRead(); !errors.Is(err, c.want) {
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

// TestRestWithSomethingToRead: who finds something reads it, and rests at the wait after that.
func TestRestWithSomethingToRead(t *testing.T) {
	j := join(t, true, nil)
	own, peer := j.pipe(t, families[0])
	defer own.Close()
	defer peer.Close()
	peer.Write([]byte("x"))
	if err := own.WaitRead(); err != nil {
		t.Fatal(err)
	}
	again := make(chan struct{}, 2)
	own.Rest(func() { again <- struct{}{} })
	if n, err := own.Read(make([]byte, 2)); n != 1 || err != nil {
		t.Fatalf("Read: %d, %v", n, err)
	}
	if err := own.WaitRead(); !errors.Is(err, syscall.EAGAIN) {
		t.Fatalf("WaitRead: %v, want EAGAIN", err)
	}
	peer.Write([]byte("y"))
	within(t, again)
}

func within(t *testing.T, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(20 * time.Second):
		t.Fatal("the reader is not called")
	}
}
