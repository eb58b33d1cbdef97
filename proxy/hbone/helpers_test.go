package hbone

import (
	"context"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// tcpPair is a connected pair of loopback sockets.
func tcpPair(t testing.TB) (a, b *net.TCPConn) {
	t.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	got := make(chan *net.TCPConn, 1)
	go func() {
		c, _ := l.AcceptTCP()
		got <- c
	}()
	a, err = net.DialTCP("tcp", nil, l.Addr().(*net.TCPAddr))
	if err != nil {
		t.Fatal(err)
	}
	return a, <-got
}

// link makes a client and a server talk over a and b; the server hands out its requests.
func link(t testing.TB, a, b net.Conn, cfg Config) (*ClientConn, *ServerConn, <-chan *ServerStream, func()) {
	t.Helper()
	reqs := make(chan *ServerStream)
	sc := NewServerConn(b, cfg, func(ss *ServerStream) {
		reqs <- ss
		<-ss.s.c.done
	})
	served := make(chan error, 1)
	go func() { served <- sc.Serve(context.Background()) }()
	cc, err := NewClientConn(a, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return cc, sc, reqs, func() {
		cc.Close()
		select {
		case err := <-served:
			if err != nil {
				t.Logf("Serve: %v", err) // closing with unread bytes resets the socket
			}
		case <-time.After(20 * time.Second):
			t.Error("Serve did not return")
		}
	}
}

func pair(t testing.TB, cc *ClientConn, reqs <-chan *ServerStream) (client, server *Stream) {
	t.Helper()
	got := make(chan *Stream, 1)
	go func() {
		s, err := (<-reqs).Accept(&Response{Status: 200})
		if err != nil {
			t.Error(err)
		}
		got <- s
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	client, _, err := cc.Open(ctx, &Request{Authority: "10.0.0.1:80"})
	if err != nil {
		t.Fatal(err)
	}
	return client, <-got
}
