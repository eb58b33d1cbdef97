package hbone

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// The peers here are x/net/http2's own client and server.

// mixedTLS is a pair of which one side is crypto/tls alone.
func mixedTLS(t testing.TB, oursIsClient bool, tweak func(client, server *tls.Config)) (client, server net.Conn) {
	t.Helper()
	a, b := tcpPair(t)
	ccfg, scfg := testTLS(t)
	if tweak != nil {
		tweak(ccfg, scfg)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		var err error
		if oursIsClient {
			s := tls.Server(b, scfg)
			server, err = s, s.HandshakeContext(ctx)
		} else {
			server, _, err = Server(ctx, b, scfg, nil)
		}
		done <- err
	}()
	var err error
	if oursIsClient {
		client, _, err = Client(ctx, a, ccfg, nil)
	} else {
		c := tls.Client(a, ccfg)
		client, err = c, c.HandshakeContext(ctx)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	return client, server
}

func payload(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	r.Read(b)
	return b
}

func TestInteropClientOfXNet(t *testing.T) {
	client, server := mixedTLS(t, false, nil)
	sc := NewServerConn(server, Config{}, func(ss *ServerStream) {
		if ss.Authority() == "10.0.0.1:1" {
			ss.Refuse(503)
			return
		}
		s, err := ss.Accept(&Response{Status: 200, HasBaggage: true, Baggage: "a=b"})
		if err != nil {
			t.Error(err)
			return
		}
		// Everything is taken in before anything is answered: half-close has to work.
		all, err := io.ReadAll(s)
		if err != nil {
			t.Error(err)
		}
		s.Write(all)
		s.CloseWrite()
	})
	served := make(chan error, 1)
	go func() { served <- sc.Serve(context.Background()) }()
	//lint:ignore SA1019 the point is this very implementation, on a connection of ours
	tr := &http2.Transport{}
	//lint:ignore SA1019 as above
	cc, err := tr.NewClientConn(client)
	if err != nil {
		t.Fatal(err)
	}
	want := payload(3 << 20)
	for range 3 {
		pr, pw := io.Pipe()
		req := &http.Request{Method: "CONNECT", URL: &url.URL{Scheme: "https", Host: "10.0.0.1:80"}, Host: "10.0.0.1:80",
			Body: pr, Header: http.Header{}}
		go func() { pw.Write(want); pw.Close() }()
		resp, err := cc.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		if err != nil || !bytes.Equal(got, want) || resp.Header.Get("baggage") != "a=b" {
			t.Fatal(len(got), err, resp.Header)
		}
	}
	resp, err := cc.RoundTrip(&http.Request{Method: "CONNECT", URL: &url.URL{Scheme: "https", Host: "10.0.0.1:1"},
		Host: "10.0.0.1:1", Body: http.NoBody, Header: http.Header{}})
	if err != nil || resp.StatusCode != 503 {
		t.Fatal(resp, err)
	}
	cc.Close()
	client.Close()
	if err := <-served; err != nil {
		t.Log(err)
	}
}

func TestInteropServerOfXNet(t *testing.T) {
	client, server := mixedTLS(t, true, nil)
	want := payload(3 << 20)
	done := make(chan struct{})
	go func() {
		defer close(done)
		//lint:ignore SA1019 as above
		srv := &http2.Server{}
		//lint:ignore SA1019 as above
		srv.ServeConn(server, &http2.ServeConnOpts{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method != "CONNECT" || r.Header.Get("forwarded") == "" || r.Header.Get("traceparent") == "" {
				t.Error(r.Method, r.Header)
			}
			if r.Host == "10.0.0.1:1" {
				w.WriteHeader(401)
				return
			}
			w.Header().Set("baggage", "x=y")
			w.WriteHeader(200)
			http.NewResponseController(w).Flush()
			all, err := io.ReadAll(r.Body)
			if err != nil {
				t.Error(err)
			}
			w.Write(all)
		})})
	}()
	cc, err := NewClientConn(client, Config{})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		s, resp, err := cc.Open(context.Background(), &Request{Authority: "10.0.0.1:80", Forwarded: `for="1.1.1.1:1"`,
			Traceparent: NewTraceparent()})
		if err != nil || resp.Baggage != "x=y" {
			t.Fatal(resp, err)
		}
		if n, err := s.ReadFrom(bytes.NewReader(want)); err != nil || n != int64(len(want)) {
			t.Fatal(n, err)
		}
		s.CloseWrite()
		var got bytes.Buffer
		if _, err := s.WriteTo(&got); err != nil || !bytes.Equal(got.Bytes(), want) {
			t.Fatal(got.Len(), err)
		}
		s.Close()
	}
	_, resp, err := cc.Open(context.Background(), &Request{Authority: "10.0.0.1:1", Forwarded: "x", Traceparent: "y"})
	var se *StatusError
	if !errors.As(err, &se) || se.Status != 401 || resp.Status != 401 {
		t.Fatal(resp, err)
	}
	cc.Close()
	<-done
}

// TestFallback: what is not TLS 1.3 with AES-GCM stays with crypto/tls and works all the same.
func TestFallback(t *testing.T) {
	a, b := tcpPair(t)
	ccfg, scfg := testTLS(t)
	for _, c := range []*tls.Config{ccfg, scfg} {
		c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	}
	got := make(chan net.Conn, 1)
	go func() {
		c, _, err := Server(context.Background(), b, scfg, nil)
		if err != nil {
			t.Error(err)
		}
		got <- c
	}()
	x, _, err := Client(context.Background(), a, ccfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	y := <-got
	if _, ours := x.(*tlsConn); ours {
		t.Error("took over TLS 1.2")
	}
	cc, _, reqs, stop := link(t, x, y, Config{})
	c, s := pair(t, cc, reqs)
	want := payload(1 << 20)
	go func() { c.Write(want); c.CloseWrite() }()
	all, err := io.ReadAll(s)
	if err != nil || !bytes.Equal(all, want) {
		t.Error(len(all), err)
	}
	stop()
}

// TestDoubleTunnel: TLS and HTTP/2 within a stream of another connection, as double HBONE has it.
func TestDoubleTunnel(t *testing.T) {
	a, b := tlsPair(t, false)
	outer, _, reqs, stopOuter := link(t, a, b, Config{})
	x, y := pair(t, outer, reqs)
	ccfg, scfg := testTLS(t)
	got := make(chan net.Conn, 1)
	go func() {
		c, _, err := Server(t.Context(), y, scfg, nil)
		if err != nil {
			t.Error(err)
		}
		got <- c
	}()
	ic, _, err := Client(t.Context(), x, ccfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, ours := ic.(*tlsConn); !ours {
		t.Errorf("%T", ic)
	}
	inner, _, ireqs, stopInner := link(t, ic, <-got, Config{})
	c, s := pair(t, inner, ireqs)
	want := payload(5 << 20)
	go func() {
		c.ReadFrom(bytes.NewReader(want))
		c.CloseWrite()
	}()
	var back bytes.Buffer
	if _, err := s.WriteTo(&back); err != nil || !bytes.Equal(back.Bytes(), want) {
		t.Error(back.Len(), err)
	}
	stopInner()
	eventually(t, func() bool { return outer.Streams() == 0 })
	stopOuter()
}
