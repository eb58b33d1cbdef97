package proxy

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"ztun/admin/ca"
	"ztun/proxy/identity"
)

// wireCase is one thing that can happen to a connection between two pods of one daemon.
type wireCase struct {
	name   string
	change func(t *testing.T, w *world, i int, o *Options)
	dst    string // appB, if it is ""
	serve  func(net.Conn)
	// run does what the applications do and returns what they saw.
	run func(t *testing.T, w *world, dst string) string
	// want is a part of what they saw: the case is none if both ways fail alike for another reason.
	want string
	// wire: the certificates do not do, which is left to the wire.
	wire bool
}

// seenWorld is all that a case leaves to be seen.
type seenWorld struct {
	app     string
	lines   [2][]string
	metrics [2]map[string]string
	crl     identity.RevocationStats
	turned  [2]uint64
}

// saw tells what an application saw, without what differs from run to run.
func saw(data string, err error) string {
	var no syscall.Errno
	switch {
	case errors.As(err, &no):
		return fmt.Sprintf("%q, %v", data, no)
	case err != nil && isDeadline(err):
		return fmt.Sprintf("%q, nothing more", data)
	}
	return fmt.Sprintf("%q, %v", data, err)
}

// ask opens a connection from a, sends a request, ends its half, and reads all there is.
func (w *world) ask(dst, request string) string {
	app, way, done, err := w.connect(w.proxies[0].ServeOutbound, srcA, dst)
	if err != nil {
		<-done
		return fmt.Sprintf("refused: %v", way)
	}
	defer app.Close()
	app.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.WriteString(app, request); err != nil {
		return saw("", err)
	}
	app.CloseWrite()
	b, err := io.ReadAll(app)
	return saw(string(b), err)
}

// stand opens a connection from a whose application at b is an echo, and proves that it carries.
func (w *world) stand(t *testing.T, dst string) *net.TCPConn {
	t.Helper()
	app, way, _, err := w.connect(w.proxies[0].ServeOutbound, srcA, dst)
	if err != nil {
		t.Fatalf("refused: %v %v %v", way, w.lines(0), w.lines(1))
	}
	t.Cleanup(func() { app.Close() })
	roundTrip(t, app)
	return app
}

// rest is how a connection ends.
func rest(app net.Conn) string {
	app.SetReadDeadline(time.Now().Add(20 * time.Second))
	b, err := io.ReadAll(app)
	return saw(string(b), err)
}

func asking(request string) func(*testing.T, *world, string) string {
	return func(_ *testing.T, w *world, dst string) string { return w.ask(dst, request) }
}

// deniesB has the policy of samples/workloads.yaml deny port 9000, too.
func deniesB(w *world) {
	w.know.publish(loadView(w.t, func(s string) string {
		return strings.Replace(s, "destinationPorts: [7777]", "destinationPorts: [7777, 9000]", 1)
	}))
}

// proofs are certificates that no manager would hand out.
type proofs struct {
	key  *ecdsa.PrivateKey
	root *x509.Certificate
}

func newProofs(t *testing.T) *proofs {
	t.Helper()
	p := &proofs{key: newTestKey(t)}
	p.root = p.sign(t, &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}, nil, &p.key.PublicKey)
	return p
}

func newTestKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (p *proofs) sign(t *testing.T, what, by *x509.Certificate, key *ecdsa.PublicKey) *x509.Certificate {
	t.Helper()
	if by == nil {
		by = what
	}
	der, err := x509.CreateCertificate(rand.Reader, what, by, key, p.key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// of issues a certificate of an identity, as change has it; it trusts the roots of p and of the others.
func (p *proofs) of(t *testing.T, uri string, change func(*x509.Certificate), trusts ...*proofs) fixedCert {
	t.Helper()
	key := newTestKey(t)
	u, err := url.Parse(uri)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Minute),
		NotAfter: time.Now().Add(time.Hour), URIs: []*url.URL{u}, BasicConstraintsValid: true,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	if change != nil {
		change(c)
	}
	roots := []*x509.Certificate{p.root}
	for _, o := range trusts {
		roots = append(roots, o.root)
	}
	cert, err := identity.New(identity.ID{}, key, []*x509.Certificate{p.sign(t, c, p.root, &key.PublicKey)}, roots)
	if err != nil {
		t.Fatal(err)
	}
	return fixedCert{cert: cert}
}

// fixedCert is what a proxy has for a certificate.
type fixedCert struct {
	cert *identity.Certificate
	err  error
}

func (f fixedCert) Certificate(context.Context, identity.ID) (*identity.Certificate, error) {
	return f.cert, f.err
}

const (
	uriA = "spiffe://cluster.local/ns/default/sa/a"
	uriB = "spiffe://cluster.local/ns/default/sa/b"
)

// shows gives the two sides the certificates that a case calls for.
func shows(make func(t *testing.T) [2]fixedCert) func(*testing.T, *world, int, *Options) {
	var certs [2]fixedCert
	return func(t *testing.T, _ *world, i int, o *Options) {
		if i == 0 {
			certs = make(t)
		}
		o.Certs = certs[i]
	}
}

func hasEnded(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }
func notYet(c *x509.Certificate)   { c.NotBefore = time.Now().Add(time.Minute) }
func only(u x509.ExtKeyUsage) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{u} }
}

// twoCerts is two sides with certificates of one root, as a and b change them.
func twoCerts(a, b func(*x509.Certificate)) func(*testing.T) [2]fixedCert {
	return func(t *testing.T) [2]fixedCert {
		p := newProofs(t)
		return [2]fixedCert{p.of(t, uriA, a), p.of(t, uriB, b)}
	}
}

var wireCases = []wireCase{
	{name: "an answer", serve: answer(5, "hello"), run: asking("hello"), want: `"hello", <nil>`},
	{name: "by a service's address", dst: "10.96.0.10:80", serve: answer(5, "hello"), run: asking("hello"),
		want: `"hello", <nil>`},
	{name: "much, half closed", run: func(t *testing.T, w *world, dst string) string {
		body := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
		w.listen(appB, func(c net.Conn) {
			if got, _ := io.ReadAll(c); bytes.Equal(got, body) { // when the caller's half has ended
				c.Write(body)
			}
		})
		app, _, _, err := w.connect(w.proxies[0].ServeOutbound, srcA, dst)
		if err != nil {
			return "refused"
		}
		defer app.Close()
		app.SetDeadline(time.Now().Add(20 * time.Second))
		if _, err := app.Write(body); err != nil {
			return err.Error()
		}
		app.CloseWrite()
		got, err := io.ReadAll(app)
		return fmt.Sprint(bytes.Equal(got, body), err)
	}, want: "true <nil>"},
	{name: "the server ends first", serve: func(c net.Conn) {
		io.WriteString(c, "greeting")
		c.(*net.TCPConn).CloseWrite()
		io.Copy(io.Discard, c)
	}, run: func(_ *testing.T, w *world, dst string) string {
		app, _, _, err := w.connect(w.proxies[0].ServeOutbound, srcA, dst)
		if err != nil {
			return "refused"
		}
		defer app.Close()
		got := rest(app)
		_, err = io.WriteString(app, "still open")
		return saw(got, err)
	}, want: `greeting`},
	{name: "nobody listens", run: asking("x"), want: "refused: "},
	{name: "a denied port", dst: "10.91.2.2:7777", run: asking("x"), want: "refused: "},
	{name: "an illegal port", dst: "10.91.2.2:15006", run: asking("x"), want: "refused: "},
	{name: "reset by the client", serve: echo, run: func(t *testing.T, w *world, dst string) string {
		got := make(chan error, 1)
		w.listen(appB, func(c net.Conn) {
			io.ReadFull(c, make([]byte, 4))
			io.WriteString(c, "ping")
			_, err := io.ReadAll(c)
			got <- err
		})
		abort(w.stand(t, dst))
		return saw("", <-got)
	}, want: "connection reset"},
	{name: "reset by the server", serve: func(c net.Conn) {
		io.CopyN(c, c, 4)
		io.ReadFull(c, make([]byte, 1))
		abort(c)
	}, run: func(t *testing.T, w *world, dst string) string {
		app := w.stand(t, dst)
		io.WriteString(app, "x")
		return rest(app)
	}, want: "connection reset"},
	{name: "policy changes", serve: echo, run: func(t *testing.T, w *world, dst string) string {
		app := w.stand(t, dst)
		deniesB(w)
		w.proxies[1].Recheck()
		got := rest(app)
		return got + w.ask(dst, "x")
	}, want: "connection reset"},
	{name: "the server's pod ends", serve: echo, run: func(t *testing.T, w *world, dst string) string {
		app := w.stand(t, dst)
		w.proxies[1].Close()
		return rest(app)
	}, want: "connection reset"},
	{name: "the client's pod ends", serve: echo, run: func(t *testing.T, w *world, dst string) string {
		app := w.stand(t, dst)
		w.proxies[0].Close()
		return rest(app)
	}, want: "connection reset"},
	{name: "the server's record is not there", change: func(t *testing.T, w *world, _ int, _ *Options) {
		w.know.publish(loadView(t, func(s string) string {
			return strings.Replace(s, "workloadIps: [\"10.91.2.2\"]", "workloadIps: [\"10.91.2.77\"]", 1)
		}))
	}, serve: answer(5, "hello"), run: asking("hello"), want: `"hello", <nil>`},
	{name: "a manager without certificates", change: shows(func(*testing.T) [2]fixedCert {
		return [2]fixedCert{{err: errors.New("no CA")}, {err: errors.New("no CA")}}
	}), serve: echo, run: asking("x"), want: "refused: "},
	{name: "the server has no certificate", change: shows(func(t *testing.T) [2]fixedCert {
		return [2]fixedCert{newProofs(t).of(t, uriA, nil), {err: errors.New("no CA")}}
	}), serve: echo, run: asking("x"), want: "refused: ", wire: true},
	{name: "good certificates", change: shows(twoCerts(nil, nil)), serve: answer(1, "y"), run: asking("x"), want: `"y"`},
	{name: "the client's has ended", change: shows(twoCerts(hasEnded, nil)), serve: echo, run: asking("x"), want: "refused: ", wire: true},
	{name: "the server's has ended", change: shows(twoCerts(nil, hasEnded)), serve: echo, run: asking("x"), want: "refused: ", wire: true},
	{name: "the client's has not begun", change: shows(twoCerts(notYet, nil)), serve: echo, run: asking("x"),
		want: "refused: ", wire: true},
	{name: "the client's is no client's", change: shows(twoCerts(only(x509.ExtKeyUsageServerAuth), nil)), serve: echo,
		run: asking("x"), want: "refused: ", wire: true},
	{name: "the server's is no server's", change: shows(twoCerts(nil, only(x509.ExtKeyUsageClientAuth))), serve: echo,
		run: asking("x"), want: "refused: ", wire: true},
	{name: "the server is somebody else", change: shows(func(t *testing.T) [2]fixedCert {
		p := newProofs(t)
		return [2]fixedCert{p.of(t, uriA, nil), p.of(t, uriA, nil)}
	}), serve: echo, run: asking("x"), want: "refused: ", wire: true},
	{name: "the client is of another trust domain", change: shows(func(t *testing.T) [2]fixedCert {
		p := newProofs(t)
		return [2]fixedCert{p.of(t, "spiffe://elsewhere/ns/default/sa/a", nil), p.of(t, uriB, nil)}
	}), serve: echo, run: asking("x"), want: "refused: ", wire: true},
	{name: "the server does not trust the client's root", change: shows(func(t *testing.T) [2]fixedCert {
		p, q := newProofs(t), newProofs(t)
		return [2]fixedCert{p.of(t, uriA, nil, q), q.of(t, uriB, nil)}
	}), serve: echo, run: asking("x"), want: "refused: ", wire: true},
	{name: "the client does not trust the server's root", change: shows(func(t *testing.T) [2]fixedCert {
		p, q := newProofs(t), newProofs(t)
		return [2]fixedCert{p.of(t, uriA, nil), q.of(t, uriB, nil, p)}
	}), serve: echo, run: asking("x"), want: "refused: ", wire: true},
}

// revokes is a case in which a certificate is revoked: of the pod that is named, before there is a connection or while
// one is open.
func revokes(name string, open bool) wireCase {
	var certs *ca.Manager
	var sign func(*big.Int) *identity.CRL
	x := wireCase{name: name + "'s is revoked", serve: echo, want: "refused: ", wire: true}
	x.change = func(t *testing.T, _ *world, i int, o *Options) {
		if i == 0 {
			certs, sign = crlCA(t)
		}
		o.Certs = certs
	}
	x.run = func(t *testing.T, w *world, dst string) string {
		id := identity.ID{TrustDomain: "cluster.local", Namespace: "default", ServiceAccount: name}
		cert, err := certs.Certificate(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		list := sign(cert.Leaf.SerialNumber)
		if !open {
			w.revocation.Replace(list)
			return w.ask(dst, "x")
		}
		app := w.stand(t, dst)
		if cut := w.revocation.Replace(list); cut != 1 {
			t.Errorf("%d were cut", cut)
		}
		return rest(app)
	}
	if open {
		x.name, x.want, x.wire = x.name+" while it is open", "connection reset", false
	}
	return x
}

// unlike is what may differ: by the wire a revocation is the end of a tunnel, in memory it is that of a stream.
var unlike = regexp.MustCompile(`hbone: connection lost: unexpected EOF|hbone: stream reset by peer: CANCEL`)

// see runs a case by the wire, or in memory, there by a copy or a shortcut.
func (x wireCase) see(t *testing.T, local, short bool) (s seenWorld) {
	t.Helper()
	w := newWorldWith(t, func(w *world, i int, o *Options) {
		if local {
			o.Local = w.proxyAt
		}
		o.Config.SendReason = true
		o.Config.TLS.Revocation = &w.revocation
		if x.change != nil {
			x.change(t, w, i, o)
		}
	})
	w.short = short
	dst := x.dst
	if dst == "" {
		dst = appB.String()
	}
	if x.serve != nil {
		w.listen(appB, x.serve)
	}
	s.app = x.run(t, w, dst)
	w.settle()
	if n := w.proxies[0].Stats().Pool.Dials; local && !x.wire && n != 0 {
		t.Errorf("%d tunnels were dialled for a pod of the same daemon", n)
	} else if local && n == 0 && x.wire {
		t.Error("it was not left to the wire")
	}
	if n := w.shortcuts.Load(); short && n == 0 && !x.wire && !strings.HasPrefix(s.app, "refused") && x.name !=
		"the server's record is not there" {
		t.Error("it went by no shortcut")
	}
	for i, p := range w.proxies {
		s.turned[i] = p.Stats().Overloaded
	}
	w.stop()
	for i := range w.proxies {
		for _, l := range w.lines(i) {
			s.lines[i] = append(s.lines[i], unlike.ReplaceAllString(stable(l), "hbone: LOST"))
		}
		slices.Sort(s.lines[i])
		s.metrics[i] = gather(t, w.metrics[i])
	}
	s.crl = w.revocation.Stats()
	return s
}

// proxyAt is the Local of the two proxies.
func (w *world) proxyAt(a netip.Addr) *Proxy {
	switch a {
	case addrA:
		return w.proxies[0]
	case addrB:
		return w.proxies[1]
	}
	return nil
}

// TestLocalLooksLikeTheWire: whatever happens to a connection between two pods of one daemon, the applications, the
// access logs and the metrics cannot tell whether it took the wire, was copied in memory, or took a shortcut.
func TestLocalLooksLikeTheWire(t *testing.T) {
	cases := append(slices.Clone(wireCases), revokes("a", false), revokes("b", false), revokes("a", true),
		revokes("b", true))
	for _, x := range cases {
		t.Run(x.name, func(t *testing.T) {
			wire := x.see(t, false, false)
			if !strings.Contains(wire.app, x.want) {
				t.Errorf("the applications saw %s, want %s", wire.app, x.want)
			}
			t.Run("copied", func(t *testing.T) { x.compare(t, wire, x.see(t, true, false)) })
			t.Run("by a shortcut", func(t *testing.T) { x.compare(t, wire, x.see(t, true, true)) })
		})
	}
}

// compare fails if a case in memory does not look as it does by the wire.
func (x wireCase) compare(t *testing.T, wire, memory seenWorld) {
	if wire.app != memory.app {
		t.Errorf("by the wire: %s\nin memory:   %s", wire.app, memory.app)
	}
	if len(wire.lines[0])+len(wire.lines[1]) == 0 {
		t.Error("no line at all")
	}
	if x.wire { // it is the wire, whose refusals are said and counted as often as it tries
		return
	}
	for i, pod := range []string{"a", "b"} {
		if !slices.Equal(wire.lines[i], memory.lines[i]) {
			t.Errorf("lines of pod %s by the wire:\n\t%s\nin memory:\n\t%s", pod, strings.Join(wire.lines[i], "\n\t"),
				strings.Join(memory.lines[i], "\n\t"))
		}
		if !maps.Equal(wire.metrics[i], memory.metrics[i]) {
			t.Errorf("metrics of pod %s by the wire: %v\nin memory: %v", pod, wire.metrics[i], memory.metrics[i])
		}
	}
	if wire.crl != memory.crl || wire.turned != memory.turned {
		t.Errorf("revocations and bounds by the wire: %+v %v, in memory: %+v %v", wire.crl, wire.turned, memory.crl,
			memory.turned)
	}
}
