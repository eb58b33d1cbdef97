package control

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"ztun/proxy/fair"
)

// places shares connections: strangers have theirs and nodes have theirs, so that neither can take the others'.
type places struct {
	// Anybody can connect, and who is silent or has no credentials is a stranger until a call of his is admitted. At the
	// bound the greediest source loses its oldest: an honest handshake and its first call take milliseconds.
	strangers *fair.Ledger[netip.Addr]
	nodes     *fair.Ledger[string] // never evicted: each has a few
	watches   *fair.Ledger[string] // of the revocation list; the same
}

func newPlaces(l limits, c *counters, report *fair.Report) *places {
	return &places{
		strangers: fair.NewLedger(fair.LedgerOptions[netip.Addr]{Limit: int64(l.strangers),
			Turned: func(source netip.Addr, evicted bool) {
				c.connectionsRefused.Add(1)
				report.Turned("control_strangers", "", source.String(), evicted)
			}}),
		nodes: fair.NewLedger(fair.LedgerOptions[string]{Limit: int64(l.connections), PerSource: int64(l.connsOfNode),
			Turned: func(node string, evicted bool) {
				c.connectionsRefused.Add(1)
				report.Turned("control_nodes", "", node, evicted)
			}}),
		watches: fair.NewLedger(fair.LedgerOptions[string]{Limit: int64(l.streams), PerSource: int64(l.streamsOfNode),
			Turned: func(node string, evicted bool) {
				report.Turned("control_revocation_streams", "", node, evicted)
			}}),
	}
}

// boundedListener bounds the connections it accepts.
type boundedListener struct {
	net.Listener
	server *Server
}

func (l *boundedListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		l.server.counters.connections.Add(1)
		b := &boundedConn{Conn: c, server: l.server}
		var source netip.Addr
		if a, ok := c.RemoteAddr().(*net.TCPAddr); ok {
			source = fair.Group(a.AddrPort().Addr())
		}
		b.mu.Lock()
		b.stranger = l.server.places.strangers.Take(source, 1, func() { b.Close() })
		if b.stranger != nil {
			b.deadline = time.AfterFunc(l.server.limits.firstRequest, b.expire)
		}
		b.mu.Unlock()
		if b.stranger == nil {
			c.Close()
			continue
		}
		return b, nil
	}
}

// boundedConn is a connection that counts. Until a call on it has been admitted it is a stranger's, and lives for a
// while only. From then on it is one of its node's, of which there are not many: no node takes the places of others.
type boundedConn struct {
	net.Conn
	server *Server

	mu       sync.Mutex
	deadline *time.Timer
	stranger *fair.Place[netip.Addr]
	node     *fair.Place[string] // nil before the first call that was admitted
	closed   bool
}

// expire ends a connection that nobody has used.
func (c *boundedConn) expire() {
	c.mu.Lock()
	used := c.node != nil
	c.mu.Unlock()
	if !used {
		c.server.counters.connectionsRefused.Add(1)
		c.Close()
	}
}

// admit makes the connection the node's. A connection keeps the first node that it carried a call of.
func (c *boundedConn) admit(node string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.node != nil || c.closed {
		return nil
	}
	ledger := c.server.places.nodes
	if c.node = ledger.Take(node, 1, nil); c.node == nil {
		if n := ledger.Held(node); n >= int64(c.server.limits.connsOfNode) {
			return fmt.Errorf("node %s has %d connections already: do several daemons use its credentials?", node, n)
		}
		return fmt.Errorf("all nodes together have %d connections already", c.server.limits.connections)
	}
	c.stranger.Release()
	c.deadline.Stop()
	return nil
}

// Close gives the places back; more calls than one are harmless.
func (c *boundedConn) Close() error {
	c.mu.Lock()
	c.closed = true
	c.deadline.Stop()
	c.stranger.Release()
	c.node.Release()
	c.mu.Unlock()
	return c.Conn.Close()
}

// connCredentials let a call find its connection.
type connCredentials struct {
	credentials.TransportCredentials
	clients *x509.CertPool // who certifies clients
}

// connInfo is what a call knows of its connection.
type connInfo struct {
	credentials.TLSInfo
	conn    *boundedConn
	certErr error // why the client's certificate does not count
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
	return conn, connInfo{t, b, verifyClient(t.State.PeerCertificates, c.clients)}, nil
}

// verifyClient judges what a client shows of itself, as crypto/tls would. None is no error.
func verifyClient(certs []*x509.Certificate, roots *x509.CertPool) error {
	if len(certs) == 0 {
		return nil
	}
	if certs[0].IsCA {
		return errors.New("it is a CA's")
	}
	o := x509.VerifyOptions{Roots: roots, Intermediates: x509.NewCertPool(),
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	for _, c := range certs[1:] {
		o.Intermediates.AddCert(c)
	}
	_, err := certs[0].Verify(o)
	return err
}

// connOf is the connection of a call, which always has one.
func connOf(ctx context.Context) *boundedConn { return infoOf(ctx).conn }

func infoOf(ctx context.Context) connInfo {
	p, _ := peer.FromContext(ctx)
	return p.AuthInfo.(connInfo)
}
