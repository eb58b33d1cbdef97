package hbone

import (
	"context"
	"crypto/tls"
	"net"
)

// Conn is a TLS connection for HBONE, from Client or Server.
type Conn struct {
	*tls.Conn
	raw net.Conn
	rec *records
}

// Client does the TLS handshake as a client on raw, within ctx. On failure raw is closed.
func Client(ctx context.Context, raw net.Conn, cfg *tls.Config) (net.Conn, tls.ConnectionState, error) {
	t := tls.Client(raw, cfg)
	if err := t.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, tls.ConnectionState{}, err
	}
	return t, t.ConnectionState(), nil
}

// Server does the TLS handshake as a server on raw, within ctx. On failure raw is closed.
func Server(ctx context.Context, raw net.Conn, cfg *tls.Config) (net.Conn, tls.ConnectionState, error) {
	t := tls.Server(raw, cfg)
	if err := t.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, tls.ConnectionState{}, err
	}
	return t, t.ConnectionState(), nil
}

type records struct{ *wire }

func (r *records) adopt(b *Buffers)                       {}
func (r *records) wait() error                            { return nil }
func (r *records) fill(b []byte) (int, error)             { return 0, nil }
func (r *records) pending() bool                          { return false }
func (r *records) seal(out, plain []byte) ([]byte, error) { return out, nil }
func (r *records) farewell(out []byte) []byte             { return out }
func (r *records) urgent() bool                           { return false }
