package istio

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"testing"

	"golang.org/x/net/http2"
	istio "istio.io/istio/pkg/hbone"
	istiolog "istio.io/istio/pkg/log"

	"ztun/proxy/identity"
	"ztun/test/interop/rig"
)

// bulk and large are what transfers carry, in bytes: large where the end of the transfer is the point, rather than
// the transfer.
const (
	bulk  = 64 * rig.MiB
	large = 16 * rig.MiB
)

func TestMain(m *testing.M) {
	for _, s := range istiolog.Scopes() { // two lines per stream
		s.SetOutputLevel(istiolog.NoneLevel)
	}
	os.Exit(m.Run())
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// server is an HTTP/2 server over mTLS at the peer pod's HBONE port.
type server struct {
	http *http.Server
	done chan struct{}
	mu   sync.Mutex
	raw  map[net.Conn]struct{}
	all  int
}

// serve starts srv with the certificate of a service account.
func serve(t testing.TB, r *rig.Rig, srv *http.Server, account string) *server {
	t.Helper()
	ln, err := net.Listen("tcp4", netip.AddrPortFrom(r.Peer, rig.Port).String())
	must(t, err)
	s := &server{http: srv, done: make(chan struct{}), raw: map[net.Conn]struct{}{}}
	// Not ServeTLS: of Istio's protocols it would offer only HTTP/1.1.
	go func() {
		defer close(s.done)
		srv.Serve(tls.NewListener(&watched{ln, s}, rig.ForeignServerTLS(r.Identity(account))))
	}()
	t.Cleanup(s.kill)
	return s
}

// kill ends the server as a crash does: sockets are reset, nothing is said.
func (s *server) kill() {
	s.each(reset)
	s.http.Close()
	<-s.done
}

// each calls f for every socket.
func (s *server) each(f func(*net.TCPConn)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.raw {
		f(c.(*net.TCPConn))
	}
}

// reset and cutOff are the two ends that a connection meets when its process or its machine dies: RST, or FIN where
// TLS and HTTP/2 have not said that they were through.
func reset(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
}

func cutOff(c *net.TCPConn) { c.CloseWrite() }

// ends are both of them.
var ends = map[string]func(*net.TCPConn){"RST": reset, "FIN": cutOff}

// accepted is how many connections came.
func (s *server) accepted() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.all
}

// watched remembers the sockets beneath TLS.
type watched struct {
	net.Listener
	s *server
}

func (w *watched) Accept() (net.Conn, error) {
	c, err := w.Listener.Accept()
	if err == nil {
		w.s.mu.Lock()
		w.s.raw[c] = struct{}{}
		w.s.all++
		w.s.mu.Unlock()
	}
	return c, err
}

// dialer is Istio's client with a certificate.
func dialer(r *rig.Rig, c *identity.Certificate) istio.Dialer {
	return istio.NewDialer(istio.Config{ProxyAddress: r.Mesh(), TLS: rig.ForeignClientTLS(c)})
}

// transport is the library beneath Istio's client; the sockets can be got at.
type transport struct {
	*http2.Transport
	addr string
	mu   sync.Mutex
	raw  []net.Conn
}

// newTransport makes tunnels to the served pod.
func newTransport(t testing.TB, r *rig.Rig) *transport {
	return newTransportTo(t, r, r.Mesh(), new(net.Dialer).DialContext)
}

func newTransportTo(t testing.TB, r *rig.Rig, addr string,
	dial func(ctx context.Context, network, addr string) (net.Conn, error)) *transport {
	tr := &transport{addr: addr}
	tr.Transport = &http2.Transport{
		TLSClientConfig: rig.ForeignClientTLS(r.Identity("client")),
		DialTLSContext: func(ctx context.Context, network, addr string, cfg *tls.Config) (net.Conn, error) {
			raw, err := dial(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			tr.mu.Lock()
			tr.raw = append(tr.raw, raw)
			tr.mu.Unlock()
			c := tls.Client(raw, cfg)
			return c, c.HandshakeContext(ctx)
		},
	}
	t.Cleanup(tr.CloseIdleConnections)
	return tr
}

// each calls f for every socket.
func (tr *transport) each(f func(*net.TCPConn)) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	for _, c := range tr.raw {
		f(c.(*net.TCPConn))
	}
}

// connect sends a CONNECT the way Istio's client does.
func (tr *transport) connect(ctx context.Context, authority string) (*tunnel, *http.Response, error) {
	pr, pw := io.Pipe()
	req, err := http.NewRequestWithContext(ctx, http.MethodConnect, "https://"+tr.addr, pr)
	if err != nil {
		return nil, nil, err
	}
	req.Host = authority
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return nil, nil, err
	}
	if resp.StatusCode != http.StatusOK {
		resp.Body.Close()
		return nil, resp, errors.New(resp.Status)
	}
	return &tunnel{resp.Body, pw}, resp, nil
}

// tunnel is a request's body and its response's.
type tunnel struct {
	io.ReadCloser
	w *io.PipeWriter
}

func (t *tunnel) Write(p []byte) (int, error) { return t.w.Write(p) }
func (t *tunnel) CloseWrite() error           { return t.w.Close() }
func (t *tunnel) Close() error                { return errors.Join(t.ReadCloser.Close(), t.w.Close()) }
