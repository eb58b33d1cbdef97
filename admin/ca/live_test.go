package ca

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"testing"
	"time"

	"ztun/proxy/identity"
)

// TestLiveConnectionOutlivesRotation: over many renewals new handshakes take the new certificate, and a connection made
// with the first works on, long after that one has ended.
func TestLiveConnectionOutlivesRotation(t *testing.T) {
	local := NewFake()
	bubble(t, ManagerOptions{Signer: local, TTL: 100 * time.Second}, func(t *testing.T, m *Manager) {
		// connect makes a tunnel from a to b, whose server echoes until the client ends.
		connect := func() (*tls.Conn, func()) {
			server, err := m.Certificate(t.Context(), id("b"))
			if err != nil {
				t.Fatal(err)
			}
			client, err := m.Certificate(t.Context(), id("a"))
			if err != nil {
				t.Fatal(err)
			}
			s, c := net.Pipe()
			done := make(chan error, 1)
			go func() {
				conn := tls.Server(s, identity.ServerTLS(server, identity.Params{}))
				_, err := io.Copy(conn, conn)
				done <- err
				s.Close()
			}()
			conn := tls.Client(c, identity.ClientTLS(client, []identity.ID{id("b")}, identity.Params{}))
			if err := conn.HandshakeContext(t.Context()); err != nil {
				t.Fatalf("at %v: %v", time.Now(), err)
			}
			return conn, func() {
				conn.Close()
				if err := <-done; err != nil {
					t.Error(err)
				}
			}
		}
		echo := func(conn *tls.Conn) {
			t.Helper()
			b := make([]byte, 5)
			if _, err := conn.Write([]byte("hello")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(conn, b); err != nil || string(b) != "hello" {
				t.Fatalf("%q, %v", b, err)
			}
		}
		serial := func(conn *tls.Conn) string { return conn.ConnectionState().PeerCertificates[0].SerialNumber.String() }

		first, closeFirst := connect()
		defer closeFirst()
		echo(first)
		seen := map[string]bool{serial(first): true}
		for range 20 {
			time.Sleep(60 * time.Second)
			echo(first)
			conn, end := connect()
			echo(conn)
			if s := serial(conn); seen[s] {
				t.Error("a new connection took an old certificate")
			} else {
				seen[s] = true
			}
			end()
		}
		if end := first.ConnectionState().PeerCertificates[0].NotAfter; time.Since(end) < 15*time.Minute {
			t.Errorf("the first certificate ended at %v only", end)
		}
	})
}

// TestTwoDaemonsShareTheFakeCA: what one process's fake CA signs, another's trusts.
func TestTwoDaemonsShareTheFakeCA(t *testing.T) {
	one, two := NewFake(), NewFake()
	if !one.cert.Equal(two.cert) || !one.Fake() || one.TrustDomain() != "" {
		t.Fatal("two different fake CAs")
	}
	certificate := func(l *Local, who identity.ID) *identity.Certificate {
		key, csr, err := NewRequest(who)
		if err != nil {
			t.Fatal(err)
		}
		chain, roots, err := l.Sign(context.Background(), who, csr, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		c, err := identity.New(who, key, chain, roots)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	s, c := net.Pipe()
	defer s.Close()
	defer c.Close()
	go func() {
		_ = tls.Server(s, identity.ServerTLS(certificate(one, id("b")), identity.Params{})).Handshake()
	}()
	conn := tls.Client(c, identity.ClientTLS(certificate(two, id("a")), []identity.ID{id("b")}, identity.Params{}))
	if err := conn.Handshake(); err != nil {
		t.Fatal(err)
	}
}
