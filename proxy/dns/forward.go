package dns

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"
)

// Upstream is the way of the pod's own queries to a nameserver: from the pod's
// address, past the capture of port 53. Read and write deadlines of the
// connections work, and a connection that is closed wakes its reader.
type Upstream interface {
	DialUDP(ctx context.Context, dst netip.AddrPort) (net.Conn, error)
	DialTCP(ctx context.Context, dst netip.AddrPort) (net.Conn, error)
}

var (
	errNoServer = errors.New("no nameserver is configured")
	errTimeout  = errors.New("timeout")
)

// servers are whom a query is passed on to, in order.
func (s *Server) servers(q *query) []netip.AddrPort {
	if q.asked.IsValid() && q.asked.Addr() != s.cfg.Own {
		return []netip.AddrPort{q.asked}
	}
	return s.cfg.Nameservers
}

// eachServer calls ask for one server after the other until one gives a reply:
// at once if one refuses, after its share of Config.Timeout if it is silent.
func (s *Server) eachServer(ctx context.Context, q *query, ask func(context.Context, netip.AddrPort) ([]byte, error)) (
	reply []byte, err error) {
	err = errNoServer
	end := time.Now().Add(s.cfg.Timeout)
	servers := s.servers(q)
	for i, server := range servers {
		share := time.Until(end) / time.Duration(len(servers)-i)
		actx, cancel := context.WithTimeoutCause(ctx, share, errTimeout)
		reply, err = ask(actx, server)
		if cause := context.Cause(actx); err != nil && cause != nil {
			err = cause
		}
		cancel()
		if err == nil || ctx.Err() != nil {
			break
		}
		err = fmt.Errorf("%v: %w", server, err)
	}
	return reply, err
}

// maxPacket is the largest UDP payload there is.
const maxPacket = 65535

var packets = sync.Pool{New: func() any { return new([maxPacket]byte) }}

// relayUDP passes a query on as it is and returns the reply as it is, truncated
// if that is what it is: the client asks again by TCP if it wants to.
func (s *Server) relayUDP(ctx context.Context, q *query) ([]byte, error) {
	return s.eachServer(ctx, q, func(ctx context.Context, server netip.AddrPort) ([]byte, error) {
		c, err := s.cfg.Upstream.DialUDP(ctx, server)
		if err != nil {
			return nil, err
		}
		defer c.Close()
		defer context.AfterFunc(ctx, s.cfg.Panics.Func("the end of a DNS query", func() {
			c.SetDeadline(time.Unix(1, 0))
		}, nil))()
		if _, err := c.Write(q.raw); err != nil {
			return nil, err
		}
		buf := packets.Get().(*[maxPacket]byte)
		defer packets.Put(buf)
		for {
			n, err := c.Read(buf[:])
			if err != nil {
				return nil, err
			}
			if answers(q.raw, buf[:n]) {
				return bytes.Clone(buf[:n]), nil
			}
		}
	})
}

// upstreamTCP is the connection by which one client's queries are passed on. It
// is opened by the first and kept until the client goes; it belongs to the
// goroutine that serves the client.
type upstreamTCP struct {
	s      *Server
	server netip.AddrPort
	conn   net.Conn
}

// relay passes a query on as it is and returns the reply as it is. A connection
// that the server has meanwhile closed is opened again.
func (u *upstreamTCP) relay(ctx context.Context, q *query) ([]byte, error) {
	return u.s.eachServer(ctx, q, func(ctx context.Context, server netip.AddrPort) ([]byte, error) {
		if u.conn != nil && u.server == server {
			reply, err := u.ask(ctx, q.raw)
			if err == nil || ctx.Err() != nil {
				return reply, err
			}
		}
		if err := u.dial(ctx, server); err != nil {
			return nil, err
		}
		return u.ask(ctx, q.raw)
	})
}

func (u *upstreamTCP) dial(ctx context.Context, server netip.AddrPort) (err error) {
	u.close()
	u.conn, err = u.s.cfg.Upstream.DialTCP(ctx, server)
	if err != nil {
		u.conn = nil
		return err
	}
	u.server = server
	return nil
}

// ask sends one message and waits for its reply. After an error the connection
// is not to be used: the reply may still come.
func (u *upstreamTCP) ask(ctx context.Context, raw []byte) (reply []byte, err error) {
	defer func() {
		if err != nil {
			u.close()
		}
	}()
	conn := u.conn
	conn.SetDeadline(time.Time{})
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	if err := writeMessage(conn, raw); err != nil {
		return nil, err
	}
	for {
		reply, err := readMessage(conn)
		if err != nil {
			return nil, err
		}
		if answers(raw, reply) {
			return reply, nil
		}
	}
}

func (u *upstreamTCP) close() {
	if u.conn != nil {
		u.conn.Close()
		u.conn = nil
	}
}

// answers reports whether reply is one to query, as far as a resolver without
// state can tell (RFC 5452 section 9.1): id, opcode and, if it has one, the
// question, whatever its case. A server that cannot read a query answers without.
func answers(query, reply []byte) bool {
	if len(reply) < headerSize || !isResponse(reply) || [2]byte(reply) != [2]byte(query) ||
		opcode(reply) != opcode(query) {
		return false
	}
	if count(query, 0) != 1 || count(reply, 0) == 0 {
		return true
	}
	n := questionLen(query)
	return count(reply, 0) == 1 && len(reply) >= headerSize+n &&
		equalFold(query[headerSize:headerSize+n], reply[headerSize:headerSize+n])
}

// questionLen is how long the first question of a message that has been parsed is.
func questionLen(raw []byte) int {
	at := headerSize
	for at < len(raw) && raw[at] != 0 {
		if raw[at]&0xc0 != 0 { // a pointer, where there is nothing to point to
			at++
			break
		}
		at += 1 + int(raw[at])
	}
	return min(at+1+4, len(raw)) - headerSize
}

// equalFold compares bytes but for the case of ASCII letters. (It also takes
// types and lengths that differ in bit 5 alone for equal, if they look like
// letters: this is no matter of security.)
func equalFold(a, b []byte) bool {
	for i := range a {
		x, y := a[i], b[i]
		if x != y && (x|0x20 != y|0x20 || x|0x20 < 'a' || x|0x20 > 'z') {
			return false
		}
	}
	return true
}

// writeMessage writes a message as TCP has it (RFC 1035 section 4.2.2), in one
// write (RFC 7766 section 8).
func writeMessage(c net.Conn, m []byte) error {
	b := binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(m)), uint16(len(m)))
	_, err := c.Write(append(b, m...))
	return err
}

func readMessage(c net.Conn) ([]byte, error) {
	var n [2]byte
	if _, err := io.ReadFull(c, n[:]); err != nil {
		return nil, err
	}
	// What is announced is not believed before it has come.
	m := make([]byte, min(int(binary.BigEndian.Uint16(n[:])), 4096))
	if _, err := io.ReadFull(c, m); err != nil {
		return nil, err
	}
	if rest := int(binary.BigEndian.Uint16(n[:])) - len(m); rest > 0 {
		m = append(m, make([]byte, rest)...)
		if _, err := io.ReadFull(c, m[len(m)-rest:]); err != nil {
			return nil, err
		}
	}
	return m, nil
}
