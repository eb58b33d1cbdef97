package identity

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// testCA issues certificates that a real one would not.
type testCA struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func newTestCA(t testing.TB, name string) *testCA {
	t.Helper()
	key := newKey(t)
	now := time.Now()
	tmpl := &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(1000 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true,
	}
	return &testCA{parse(t, tmpl, tmpl, key.Public(), key), key}
}

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func parse(t testing.TB, tmpl, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// leafOpt changes what is issued.
type leafOpt func(*x509.Certificate)

func usage(u ...x509.ExtKeyUsage) leafOpt { return func(c *x509.Certificate) { c.ExtKeyUsage = u } }
func valid(from, to time.Duration) leafOpt {
	return func(c *x509.Certificate) { c.NotBefore, c.NotAfter = time.Now().Add(from), time.Now().Add(to) }
}
func isCA(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign }

// sans is a subjectAltName of these URIs, byte for byte.
func sans(t testing.TB, uris ...string) pkix.Extension {
	t.Helper()
	var b cryptobyte.Builder
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		for _, u := range uris {
			b.AddASN1(tagURI, func(b *cryptobyte.Builder) { b.AddBytes([]byte(u)) })
		}
	})
	der, err := b.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return pkix.Extension{Id: sanOID(), Critical: true, Value: der}
}

// leaf issues a certificate with these URI SANs.
func (ca *testCA) leaf(t testing.TB, uris []string, opts ...leafOpt) (crypto.Signer, *x509.Certificate) {
	t.Helper()
	key := newKey(t)
	tmpl := &x509.Certificate{
		NotBefore: time.Now().Add(-2 * time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	if len(uris) > 0 {
		tmpl.ExtraExtensions = []pkix.Extension{sans(t, uris...)}
	} else {
		tmpl.Subject = pkix.Name{CommonName: "nobody"}
	}
	for _, o := range opts {
		o(tmpl)
	}
	return key, parse(t, tmpl, ca.cert, key.Public(), ca.key)
}

// issue makes a Certificate (its ID is not checked against the SANs) that trusts roots, or only its own CA.
func (ca *testCA) issue(t testing.TB, uris []string, roots []*testCA, opts ...leafOpt) *Certificate {
	t.Helper()
	key, leaf := ca.leaf(t, uris, opts...)
	certs := []*x509.Certificate{ca.cert}
	if roots != nil {
		certs = nil
		for _, r := range roots {
			certs = append(certs, r.cert)
		}
	}
	c, err := New(ID{}, key, []*x509.Certificate{leaf}, certs)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// outcome is what both ends of a connection saw. A client of TLS 1.3 believes in success until it reads.
type outcome struct {
	server, client           error
	serverState, clientState tls.ConnectionState
}

type dialer func(t testing.TB) (server, client net.Conn)

func pipe(testing.TB) (server, client net.Conn) { return net.Pipe() }

func loopback(t testing.TB) (server, client net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err = net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err = l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return server, client
}

// shake makes a handshake, then the server says "ok" and the client reads it.
func shake(t testing.TB, dial dialer, server, client *tls.Config) (o outcome) {
	t.Helper()
	s, c := dial(t)
	defer s.Close()
	defer c.Close()
	deadline := time.Now().Add(30 * time.Second)
	if err := errors.Join(s.SetDeadline(deadline), c.SetDeadline(deadline)); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn := tls.Server(s, server)
		if o.server = conn.Handshake(); o.server == nil {
			_, o.server = conn.Write([]byte("ok"))
		}
		o.serverState = conn.ConnectionState()
	}()
	conn := tls.Client(c, client)
	if o.client = conn.Handshake(); o.client == nil {
		_, o.client = io.ReadFull(conn, make([]byte, 2))
	}
	o.clientState = conn.ConnectionState()
	<-done
	return o
}
