package e2e

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2/hpack"

	"ztun/test/lab"
	"ztun/test/load"
)

// TestMalformedInput throws at 15008 what does not belong there, while an innocent connection of another client and
// one of the same pod's mesh peers go on undisturbed. Each gets its right refusal, the daemon stays the same process,
// and holds afterwards what it held before.
func TestMalformedInput(t *testing.T) {
	m := newMesh(t, meshOptions{})
	ca := loadCA(t, m.Path("ca"))
	const good = "spiffe://cluster.local/ns/default/sa/a"
	dst := lab.HostPort(m.c.V4(), 15008)

	innocent, err := load.Idle(m.ctx, target(m.a.NS, m.c.V4()), 5)
	must(t, err)
	defer innocent.Close()
	echoCtx, stopEcho := context.WithCancel(m.ctx)
	defer stopEcho()
	echo := make(chan *load.EchoResult, 1)
	go func() { echo <- load.OpenLoop(echoCtx, target(m.a.NS, m.c.V4()), 2, 50, 100, 15*time.Second) }()
	before := m.usage(m.N2.Daemon)
	pid := m.N2.Daemon.Pid()

	raw := func(t *testing.T) net.Conn {
		t.Helper()
		c, err := m.h1.NS.Dial(m.ctx, "tcp", dst)
		must(t, err)
		c.SetDeadline(time.Now().Add(30 * time.Second))
		t.Cleanup(func() { c.Close() })
		return c
	}
	h2 := func(t *testing.T, conf *tls.Config) *h2Client {
		t.Helper()
		h, err := dialH2(t, raw(t), conf)
		must(t, err)
		go h.run()
		t.Cleanup(h.close)
		return h
	}
	// refused asserts that the handshake, or in TLS 1.3 the first read after it, fails with a text.
	refused := func(t *testing.T, conf *tls.Config, want string) {
		t.Helper()
		tc := tls.Client(raw(t), conf)
		err := tc.Handshake()
		if err == nil {
			_, err = io.Copy(io.Discard, tc)
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	stream := func(t *testing.T, h *h2Client, id uint32, want ...string) {
		t.Helper()
		eventually(t, 20*time.Second, func() error {
			got, end := h.of(id)
			if strings.Join(got, "|") == strings.Join(want, "|") {
				return nil
			}
			return fmt.Errorf("stream %d: %q, want %q (connection: %v)", id, got, want, end)
		})
	}

	t.Run("not TLS", func(t *testing.T) {
		for _, junk := range []string{"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "\x00\x00\x00\x00\x00",
			strings.Repeat("\xff", 70000), "SSH-2.0-x\r\n", "\x16\x03\x01\xff\xff"} {
			c := raw(t)
			if _, err := io.WriteString(c, junk); err != nil && !isReset(err) {
				t.Errorf("%.20q: %v", junk, err)
			}
			if junk == "\x16\x03\x01\xff\xff" || junk == "\x00\x00\x00\x00\x00" {
				c.(*net.TCPConn).CloseWrite() // a record that never comes
			}
			if _, err := io.Copy(io.Discard, c); err != nil && !isReset(err) {
				t.Errorf("%.20q: not closed: %v", junk, err)
			}
		}
	})
	t.Run("no client certificate", func(t *testing.T) { refused(t, ca.client(t, ""), "tls: certificate required") })
	t.Run("wrong trust domain", func(t *testing.T) {
		refused(t, ca.client(t, "spiffe://other.domain/ns/default/sa/a"), "tls: ")
	})
	t.Run("no SPIFFE id", func(t *testing.T) { refused(t, ca.client(t, "https://example.com/x"), "tls: ") })
	t.Run("stranger's CA", func(t *testing.T) {
		conf := ca.client(t, "")
		cert := newCA(t).issue(t, good, time.Now().Add(-time.Minute), time.Now().Add(time.Hour))
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
		refused(t, conf, "tls: ")
	})
	t.Run("expired certificate", func(t *testing.T) {
		conf := ca.client(t, "")
		cert := ca.issue(t, good, time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour))
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
		refused(t, conf, "tls: ")
	})
	t.Run("TLS 1.2", func(t *testing.T) {
		conf := ca.client(t, good)
		conf.MinVersion, conf.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
		refused(t, conf, "protocol version not supported")
	})
	t.Run("HTTP 1.1 by ALPN", func(t *testing.T) {
		conf := ca.client(t, good)
		conf.NextProtos = []string{"http/1.1"}
		refused(t, conf, "no application protocol")
	})
	t.Run("HTTP 1.1 in spite of ALPN h2", func(t *testing.T) {
		tc := tls.Client(raw(t), ca.client(t, good))
		must(t, tc.Handshake())
		io.WriteString(tc, "CONNECT 10.91.2.2:9000 HTTP/1.1\r\nHost: 10.91.2.2:9000\r\n\r\n")
		b, err := io.ReadAll(tc)
		if err != nil && !isReset(err) && !strings.Contains(err.Error(), "EOF") {
			t.Errorf("not closed: %v", err)
		}
		if strings.Contains(string(b), "200") {
			t.Errorf("answer %q", b)
		}
	})
	t.Run("GET", func(t *testing.T) {
		h := h2(t, ca.client(t, good))
		must(t, h.headers(1, hpack.HeaderField{Name: ":method", Value: "GET"},
			hpack.HeaderField{Name: ":scheme", Value: "http"},
			hpack.HeaderField{Name: ":path", Value: "/"}, hpack.HeaderField{Name: ":authority", Value: dst}))
		stream(t, h, 1, "HEADERS END_STREAM :status=400 x-ztun-reason=expected method CONNECT, got GET",
			"RST_STREAM NO_ERROR")
	})
	t.Run("bad authority", func(t *testing.T) {
		h := h2(t, ca.client(t, good))
		must(t, h.connect(1, "10.91.2.2"))
		must(t, h.connect(3, "10.91.2.2:99999"))
		must(t, h.connect(5, "a b c"))
		must(t, h.connect(7, "10.91.1.2:9000"))
		stream(t, h, 1, "HEADERS END_STREAM :status=400 x-ztun-reason=no valid authority pseudo header: 10.91.2.2",
			"RST_STREAM NO_ERROR")
		stream(t, h, 5, "RST_STREAM PROTOCOL_ERROR")
		stream(t, h, 7, "HEADERS END_STREAM :status=400 x-ztun-reason=ip mismatch: 10.91.2.2 != 10.91.1.2",
			"RST_STREAM NO_ERROR")
		eventually(t, 10*time.Second, func() error {
			if got, _ := h.of(3); len(got) == 0 || strings.Contains(strings.Join(got, ""), "200") {
				return fmt.Errorf("port out of range: %q", got)
			}
			return nil
		})
	})
	t.Run("10,000 rapid resets", func(t *testing.T) {
		h := h2(t, ca.client(t, good))
		sent := 0
		for i := range uint32(10_000) {
			if h.connect(2*i+1, lab.HostPort(m.c.V4(), 9000)) != nil || h.reset(2*i+1) != nil {
				break
			}
			sent++
		}
		var goaway bool
		select {
		case <-h.done:
			for _, e := range must2(h.of(0)) {
				goaway = goaway || strings.Contains(e, "ENHANCE_YOUR_CALM")
			}
			if _, end := h.of(0); !goaway && !isReset(end) {
				t.Errorf("the connection ended with %v and without ENHANCE_YOUR_CALM", end)
			}
		case <-time.After(20 * time.Second):
			t.Errorf("the connection is still open after %d resets", sent)
		}
		t.Logf("%d of 10,000 sent; GOAWAY ENHANCE_YOUR_CALM seen: %v", sent, goaway)
	})
	t.Run("half a handshake, many times", func(t *testing.T) {
		for range 200 {
			c := raw(t)
			c.Write([]byte{0x16, 3, 1, 2, 0, 1})
			c.Close()
		}
	})

	must(t, innocent.Check())
	stopped := <-echo
	if len(stopped.Errors) != 0 || stopped.Lost != 0 {
		t.Errorf("the innocent echo was disturbed: %+v", stopped)
	}
	t.Logf("the innocent echo meanwhile: %+v", stopped.Latency)
	if m.N2.Daemon.Pid() != pid || !m.N2.Daemon.Running() {
		t.Error("the daemon was harmed")
	}
	eventually(t, 60*time.Second, func() error {
		if u := m.usage(m.N2.Daemon); u.fds > before.fds+8 || u.goroutines > before.goroutines+40 ||
			u.opened-u.closed > before.opened-before.closed {
			return fmt.Errorf("fds %v -> %v, goroutines %v -> %v, open connections %v -> %v", before.fds, u.fds,
				before.goroutines, u.goroutines, before.opened-before.closed, u.opened-u.closed)
		}
		return nil
	})
}

func must2(s []string, _ error) []string { return s }

// isReset tells the errors of a connection that the other end cut off.
func isReset(err error) bool {
	if err == nil {
		return false
	}
	s := err.Error()
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || strings.Contains(s, "reset by peer") ||
		strings.Contains(s, "broken pipe") || strings.Contains(s, "tls: ")
}
