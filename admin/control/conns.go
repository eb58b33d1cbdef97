package control

import (
	"context"
	"fmt"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// boundedListener closes connections beyond a number instead of letting them wait unseen.
type boundedListener struct {
	net.Listener
	server *Server
	slots  chan struct{}
}

func (l *boundedListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		select {
		case l.slots <- struct{}{}:
			l.server.counters.connections.Add(1)
			b := &boundedConn{Conn: c, listener: l}
			b.mu.Lock()
			b.deadline = time.AfterFunc(l.server.limits.firstRequest, b.expire)
			b.mu.Unlock()
			return b, nil
		default:
			l.server.counters.connectionsRefused.Add(1)
			c.Close()
		}
	}
}

// boundedConn is a connection that counts. Until a call on it has been admitted it lives for a while only: anybody can
// connect, and those who have no credentials must not take the places of those who have. From then on it is one of its
// node's, of which there are not many: no node takes the places of others.
type boundedConn struct {
	net.Conn
	listener *boundedListener

	mu       sync.Mutex
	deadline *time.Timer
	node     string // "" before the first call that was admitted
	closed   bool
}

// expire ends a connection that nobody has used.
func (c *boundedConn) expire() {
	c.mu.Lock()
	used := c.node != ""
	c.mu.Unlock()
	if !used {
		c.listener.server.counters.connectionsRefused.Add(1)
		c.Close()
	}
}

// admit makes the connection the node's. A connection keeps the first node that it carried a call of.
func (c *boundedConn) admit(node string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.node != "" || c.closed {
		return nil
	}
	s := c.listener.server
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := s.conns[node]; n >= s.limits.connsOfNode {
		return fmt.Errorf("node %s has %d connections already: do several daemons use its credentials?", node, n)
	}
	s.conns[node]++
	c.node = node
	c.deadline.Stop()
	return nil
}

// Close gives the place back; more calls than one are harmless.
func (c *boundedConn) Close() error {
	c.mu.Lock()
	first := !c.closed
	c.closed = true
	c.deadline.Stop()
	node := c.node
	c.mu.Unlock()
	if first {
		<-c.listener.slots
	}
	if first && node != "" {
		s := c.listener.server
		s.mu.Lock()
		if s.conns[node]--; s.conns[node] == 0 {
			delete(s.conns, node)
		}
		s.mu.Unlock()
	}
	return c.Conn.Close()
}

// connCredentials let a call find its connection.
type connCredentials struct {
	credentials.TransportCredentials
}

// connInfo is what a call knows of its connection.
type connInfo struct {
	credentials.TLSInfo
	conn *boundedConn
}

// ServerHandshake is TLS's.
func (c connCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := c.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	t, isTLS := info.(credentials.TLSInfo)
	b, isOurs := raw.(*boundedConn)
	if !isTLS || !isOurs {
		conn.Close()
		return nil, nil, fmt.Errorf("a connection of an unknown kind: %T, %T", info, raw)
	}
	return conn, connInfo{t, b}, nil
}

// connOf is the connection of a call, which always has one.
func connOf(ctx context.Context) *boundedConn { return infoOf(ctx).conn }

func infoOf(ctx context.Context) connInfo {
	p, _ := peer.FromContext(ctx)
	return p.AuthInfo.(connInfo)
}
