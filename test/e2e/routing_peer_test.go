package e2e

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"sort"
	"strings"
	"time"

	"golang.org/x/net/http2"

	"ztun/test/lab"
)

// waypoint makes the host wp a waypoint on a port, with a service account: Go's own HTTP/2 server, which says what it
// was asked, by whom, and then goes on to pod c's port 9000 through a tunnel of its own.
func (r *routing) waypoint(port uint16, account string) {
	r.t.Helper()
	wp, c := r.places["wp"], r.places["c"]
	l, err := wp.ns.Listen("tcp", fmt.Sprintf(":%d", port))
	must(r.t, err)
	id := "spiffe://cluster.local/ns/default/sa/" + account
	cert := r.ca.issue(r.t, id, time.Now().Add(-time.Minute), time.Now().Add(time.Hour))
	client := r.ca.client(r.t, id)
	s := &http.Server{
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{*cert}, ClientAuth: tls.RequireAndVerifyClientCert,
			ClientCAs: r.ca.pool, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}},
		ErrorLog: log.New(io.Discard, "", 0),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			dst, err := netip.ParseAddrPort(q.Host)
			if q.Method != http.MethodConnect || err != nil {
				http.Error(w, "want CONNECT ip:port", http.StatusBadRequest)
				return
			}
			to := pick(c.ips, dst.Addr().Is4())
			up, err := openTunnel(q.Context(), wp.ns, netip.AddrPortFrom(to, 15008), lab.HostPort(to, 9000), client, nil)
			if err != nil {
				http.Error(w, err.Error(), http.StatusServiceUnavailable)
				return
			}
			defer up.Close()
			out := flushed{w, http.NewResponseController(w)}
			if _, err := io.WriteString(out, "wp "+asked(q)+"\n"); err != nil {
				return
			}
			done := make(chan struct{})
			go func() { defer close(done); io.Copy(up, q.Body); up.CloseWrite() }()
			io.Copy(out, up)
			q.Body.Close()
			<-done
		}),
	}
	ended := make(chan struct{})
	go func() { defer close(ended); s.ServeTLS(l, "", "") }()
	r.t.Cleanup(func() { s.Close(); <-ended })
}

var (
	forwardedFor = regexp.MustCompile(`^for="(\S+):[0-9]+"(?:;host=(\S+))?$`)
	traceparent  = regexp.MustCompile(`^00-[0-9a-f]{32}-[0-9a-f]{16}-00$`)
)

// asked is a CONNECT in one line, without what is random: authority, peer, client, service, baggage, and the names of
// all headers.
func asked(q *http.Request) string {
	var names []string
	for name := range q.Header {
		names = append(names, strings.ToLower(name))
	}
	sort.Strings(names)
	forwarded := q.Header.Get("forwarded")
	if m := forwardedFor.FindStringSubmatch(forwarded); m != nil {
		forwarded = m[1] + " " + m[2]
	}
	if !traceparent.MatchString(q.Header.Get("traceparent")) {
		names = append(names, "with traceparent "+q.Header.Get("traceparent"))
	}
	return askedText(q.Host, q.TLS.PeerCertificates[0].URIs[0].String(), forwarded, q.Header.Get("baggage"),
		strings.Join(names, ","))
}

func askedText(authority, peer, forwarded, baggage, headers string) string {
	return fmt.Sprintf("asked for %s by %s, forwarded %s, baggage %s, headers %s", authority, peer, forwarded, baggage,
		headers)
}

type flushed struct {
	w http.ResponseWriter
	c *http.ResponseController
}

func (f flushed) Write(b []byte) (int, error) {
	n, err := f.w.Write(b)
	if err == nil {
		err = f.c.Flush()
	}
	return n, err
}

// duplex is a connection of any making.
type duplex interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// statusError is an answer to a CONNECT other than 200.
type statusError int

func (e statusError) Error() string { return fmt.Sprintf("status %d", int(e)) }

// stream is a CONNECT that was answered with 200, alone on its tunnel.
type stream struct {
	io.Reader
	*io.PipeWriter
	close func()
}

func (s *stream) CloseWrite() error { return s.PipeWriter.Close() }
func (s *stream) Close() error      { s.close(); return nil }

// openTunnel opens HBONE by Go's own HTTP/2 client.
func openTunnel(ctx context.Context, ns *lab.NS, to netip.AddrPort, authority string, conf *tls.Config, h http.Header) (
	duplex, error) {
	raw, err := ns.Dial(ctx, "tcp", to.String())
	if err != nil {
		return nil, err
	}
	tc := tls.Client(raw, conf)
	//lint:ignore SA1019 net/http has no client on a connection that is given
	cc, err := (&http2.Transport{DisableCompression: true}).NewClientConn(tc)
	if err != nil {
		raw.Close()
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	body, w := io.Pipe()
	end := func() { w.Close(); cancel(); cc.Close(); raw.Close() }
	q := (&http.Request{Method: http.MethodConnect, URL: &url.URL{Host: authority}, Host: authority, Header: h, Body: body,
		ContentLength: -1}).WithContext(ctx)
	if q.Header == nil {
		q.Header = http.Header{}
	}
	resp, err := cc.RoundTrip(q)
	if err == nil && resp.StatusCode != 200 {
		err = statusError(resp.StatusCode)
	}
	if err != nil {
		end()
		return nil, err
	}
	return &stream{resp.Body, w, end}, nil
}
