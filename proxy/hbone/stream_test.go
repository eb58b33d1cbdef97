package hbone

import (
	"net"
	"testing"

	"golang.org/x/net/nettest"
)

func transports(t *testing.T) map[string]func(t *testing.T) (net.Conn, net.Conn) {
	return map[string]func(t *testing.T) (net.Conn, net.Conn){
		"tcp":         func(t *testing.T) (net.Conn, net.Conn) { a, b := tcpPair(t); return a, b },
		"tls":         func(t *testing.T) (net.Conn, net.Conn) { return tlsPair(t, false) },
		"foreign tls": func(t *testing.T) (net.Conn, net.Conn) { return tlsPair(t, true) },
		"pipe":        func(t *testing.T) (net.Conn, net.Conn) { return net.Pipe() },
	}
}

func TestNetConn(t *testing.T) {
	for name, mk := range transports(t) {
		for _, dir := range []string{"client", "server"} {
			t.Run(name+"/"+dir, func(t *testing.T) {
				nettest.TestConn(t, func() (net.Conn, net.Conn, func(), error) {
					a, b := mk(t)
					cc, _, reqs, stop := link(t, a, b, Config{})
					x, y := pair(t, cc, reqs)
					if dir == "server" {
						x, y = y, x
					}
					return closer{x}, closer{y}, func() { x.Close(); y.Close(); stop() }, nil
				})
			})
		}
	}
}

// closer closes as sockets do, in good order: a Stream that is closed without CloseWrite is given up.
type closer struct{ *Stream }

func (c closer) Close() error {
	c.CloseWrite()
	return c.Stream.Close()
}

// TestConnNetConn is about the record layer by itself.
func TestConnNetConn(t *testing.T) {
	nettest.TestConn(t, func() (net.Conn, net.Conn, func(), error) {
		a, b := tlsPair(t, false)
		return a, b, func() { a.Close(); b.Close() }, nil
	})
}
