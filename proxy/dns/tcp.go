package dns

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// ServeConn answers the queries of one TCP client, one after the other, until it
// ends, is silent for Config.IdleTimeout, or the server stops; then it closes c.
// asked is the nameserver that the pod meant to connect to (zero: us).
func (s *Server) ServeConn(c net.Conn, asked netip.AddrPort) {
	if s.admit(c) {
		s.serveConn(c, asked)
	}
}

// serveConn is ServeConn for a connection that has been admitted.
func (s *Server) serveConn(c net.Conn, asked netip.AddrPort) {
	defer s.work.Done()
	defer func() {
		c.Close()
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
	}()
	up := &upstreamTCP{s: s}
	defer up.close()
	for {
		c.SetReadDeadline(time.Now().Add(s.cfg.IdleTimeout))
		select {
		case <-s.done: // whose deadline ours may just have replaced
			return
		default:
		}
		raw, err := readMessage(c)
		if err != nil {
			return
		}
		q := &query{raw: raw, tcp: true, asked: asked}
		transfer := false
		reply := s.serve(s.ctx, q, func(ctx context.Context, q *query) ([]byte, error) {
			if isTransfer(q.msg) {
				transfer = true
				return nil, s.transfer(ctx, c, up, q)
			}
			return up.relay(ctx, q)
		})
		if reply != nil {
			c.SetWriteDeadline(time.Now().Add(s.cfg.IdleTimeout))
			if writeMessage(c, reply) != nil {
				return
			}
		}
		if transfer { // what the client sent meanwhile went to upstream
			return
		}
	}
}

// admit counts a connection in, within Config.MaxConns, or closes it.
func (s *Server) admit(c net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		c.Close()
		return false
	}
	if len(s.conns) >= s.cfg.MaxConns {
		s.cfg.Metrics.dropped[dropConnections].Add(1)
		c.Close()
		return false
	}
	s.conns[c] = struct{}{}
	s.work.Add(1)
	return true
}

// isTransfer reports whether a query may have an answer of many messages (RFC
// 5936, RFC 1995), which only the two ends can tell the last of.
func isTransfer(q *dns.Msg) bool {
	return q.Opcode == dns.OpcodeQuery && len(q.Question) == 1 &&
		(q.Question[0].Qtype == dns.TypeAXFR || q.Question[0].Qtype == dns.TypeIXFR)
}

// transfer connects client and upstream from this query on: what either sends
// reaches the other, byte for byte, until one of them ends or both are silent
// for Config.IdleTimeout. An error means that nothing has been said yet.
func (s *Server) transfer(ctx context.Context, c net.Conn, up *upstreamTCP, q *query) error {
	_, err := s.eachServer(ctx, q, func(ctx context.Context, server netip.AddrPort) ([]byte, error) {
		return nil, up.dial(ctx, server)
	})
	if err != nil {
		return err
	}
	defer up.close()
	conn := up.conn
	defer context.AfterFunc(ctx, s.cfg.Panics.Func("the end of a transfer", func() { conn.Close() }, nil))()
	conn.SetWriteDeadline(time.Now().Add(s.cfg.IdleTimeout))
	if err := writeMessage(conn, q.raw); err != nil {
		return err
	}
	// The client is most often silent from here on: upstream's pace decides.
	c.SetReadDeadline(time.Time{})
	var wg sync.WaitGroup
	wg.Go(s.cfg.Panics.Func("a transfer", func() {
		_, err := copyIdle(conn, c, 0, s.cfg.IdleTimeout)
		half, ok := conn.(interface{ CloseWrite() error })
		switch {
		case err == io.EOF && ok: // a client that has asked all it wanted still waits for what is on its way
			half.CloseWrite()
		case errors.Is(err, os.ErrDeadlineExceeded): // upstream has ended, or the server is stopping: that lets it finish
		default:
			conn.Close()
		}
	}, func(error) { conn.Close() }))
	n, _ := copyIdle(c, conn, s.cfg.IdleTimeout, s.cfg.IdleTimeout)
	c.SetReadDeadline(time.Unix(1, 0))
	wg.Wait()
	if n == 0 {
		return io.ErrUnexpectedEOF
	}
	return nil
}

// copyIdle copies until an end or an error, with a limit to each read (0: none)
// and write, and returns how many bytes it has written and what ended it: io.EOF
// is src's end.
func copyIdle(dst, src net.Conn, read, write time.Duration) (total int64, err error) {
	buf := make([]byte, 16<<10)
	for {
		if read > 0 {
			src.SetReadDeadline(time.Now().Add(read))
		}
		n, err := src.Read(buf)
		if n > 0 {
			dst.SetWriteDeadline(time.Now().Add(write))
			m, werr := dst.Write(buf[:n])
			total += int64(m)
			if werr != nil {
				return total, werr
			}
		}
		if err != nil {
			return total, err
		}
	}
}
