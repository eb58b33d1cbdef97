package identity

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// crlOpt changes a list before it is signed.
type crlOpt func(*x509.RevocationList)

func extension(critical bool, value []byte, oid ...int) crlOpt {
	return func(l *x509.RevocationList) {
		l.ExtraExtensions = append(l.ExtraExtensions, pkix.Extension{Id: oid, Critical: critical, Value: value})
	}
}

func ended(l *x509.RevocationList) {
	l.ThisUpdate, l.NextUpdate = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
}

// list signs a revocation list in DER. crypto/x509 makes one only for a CA that may sign lists; the name and key are
// what counts.
func (ca *testCA) list(t testing.TB, revoked []*x509.Certificate, opts ...crlOpt) []byte {
	t.Helper()
	l := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Hour),
		NextUpdate: time.Now().Add(time.Hour)}
	for _, c := range revoked {
		l.RevokedCertificateEntries = append(l.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: c.SerialNumber, RevocationTime: time.Now()})
	}
	for _, o := range opts {
		o(l)
	}
	issuer := *ca.cert
	issuer.KeyUsage |= x509.KeyUsageCRLSign
	issuer.SubjectKeyId = []byte{1}
	der, err := x509.CreateRevocationList(rand.Reader, l, &issuer, ca.key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func pemCRL(ders ...[]byte) (text []byte) {
	for _, der := range ders {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: crlBlock, Bytes: der})...)
	}
	return text
}

func mustCRL(t testing.TB, data []byte) *CRL {
	t.Helper()
	c, err := ParseCRL(data)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestParseCRL(t *testing.T) {
	ca, other := newTestCA(t, "root"), newTestCA(t, "other")
	_, one := ca.leaf(t, []string{uriA})
	_, two := ca.leaf(t, []string{uriB})
	der := ca.list(t, []*x509.Certificate{one, two})
	idp := func(body ...byte) []byte { return append([]byte{0x30, byte(len(body))}, body...) }
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw})
	broken := bytes.Clone(der)
	// the signature, in what looks like white space: seen when it is needed, there is no issuer here
	broken[len(broken)-1] = '\n'
	for _, c := range []struct {
		name           string
		data           []byte
		lists, entries int
		err            string
	}{
		{"empty", nil, 0, 0, ""},
		{"white space", []byte(" \n\t"), 0, 0, ""},
		{"no list", certPEM, 0, 0, ""},
		{"DER", der, 1, 2, ""},
		{"PEM", pemCRL(der), 1, 2, ""},
		{"several, text and others between", slices.Concat(pemCRL(der), []byte("text\n"), certPEM,
			pemCRL(other.list(t, nil))), 2, 2, ""},
		{"the same serial twice", pemCRL(ca.list(t, []*x509.Certificate{one, one})), 1, 1, ""},
		{"ended", ca.list(t, nil, ended), 1, 0, ""},
		{"signature of nobody", broken, 1, 2, ""},
		{"user certificates only", ca.list(t, nil, extension(true, idp(0x81, 1, 0xff), 2, 5, 29, 28)), 1, 0, ""},
		{"indirect, false", ca.list(t, nil, extension(true, idp(0x84, 1, 0), 2, 5, 29, 28)), 1, 0, ""},
		{"unknown extension", ca.list(t, nil, extension(false, []byte{5, 0}, 1, 2, 3)), 1, 0, ""},

		{"garbage", []byte("garbage"), 0, 0, "CRL, taken for DER as there is no PEM block in it: x509: malformed crl"},
		{"garbage in PEM", pemCRL(der, []byte{1}), 0, 0, "CRL 2 of 2: x509: malformed crl"},
		{"cut short", pemCRL(der, der)[:len(pemCRL(der, der))-30], 0, 0,
			"CRL: only 1 of 2 PEM blocks are whole: is the file cut short?"},
		{"delta", ca.list(t, nil, extension(true, []byte{2, 1, 1}, 2, 5, 29, 27)), 0, 0,
			"CRL, taken for DER as there is no PEM block in it: it is a delta CRL: the complete one is needed"},
		{"indirect", pemCRL(ca.list(t, nil, extension(true, idp(0x84, 1, 0xff), 2, 5, 29, 28))), 0, 0,
			"CRL 1 of 1: it is an indirect CRL, with other issuers' certificates: each issuer's own is needed"},
		{"broken distribution point", pemCRL(ca.list(t, nil, extension(true, []byte{0x30, 5}, 2, 5, 29, 28))), 0, 0,
			"CRL 1 of 1: its issuing distribution point cannot be read"},
		{"unknown critical extension", pemCRL(ca.list(t, nil, extension(true, []byte{5, 0}, 1, 2, 3))), 0, 0,
			"CRL 1 of 1: it has a critical extension that is unknown here: 1.2.3"},
		{"too large", make([]byte, MaxCRL+1), 0, 0, "CRL: 8388609 bytes, at most 8388608 are read"},
	} {
		t.Run(c.name, func(t *testing.T) {
			crl, err := ParseCRL(c.data)
			if c.err != "" {
				if err == nil || err.Error() != c.err || crl != nil {
					t.Errorf("got %v\nwant %s", err, c.err)
				}
				return
			}
			if err != nil || crl.Lists() != c.lists || crl.Entries() != c.entries {
				t.Errorf("%+v, %v", crl, err)
			}
		})
	}
	if next := mustCRL(t, pemCRL(der, ca.list(t, nil, ended))).NextUpdate(); time.Since(next) < 50*time.Minute ||
		time.Since(next) > 70*time.Minute {
		t.Errorf("next update %v", next)
	}
}

// TestRevoked: which certificates of a chain count, and whose word. Checklist 136, at the handshake, in both roles.
func TestRevoked(t *testing.T) {
	root, other := newTestCA(t, "root"), newTestCA(t, "root") // the same name, another key
	middleKey, middleCert := root.leaf(t, []string{"spiffe://cluster.local"}, isCA, func(c *x509.Certificate) {
		c.Subject.CommonName, c.ExtKeyUsage = "middle", nil
	})
	middle := &testCA{middleCert, middleKey}
	make := func(uri string) *Certificate {
		key, leaf := middle.leaf(t, []string{uri})
		c, err := New(ID{}, key, []*x509.Certificate{leaf, middleCert}, []*x509.Certificate{root.cert})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	a, b, bystander := make(uriA), make(uriB), make(uriB)
	for _, c := range []struct {
		name string
		crl  []byte
		peer *Certificate // revoked; nil: nobody
		cert *x509.Certificate
	}{
		{"nothing", nil, nil, nil},
		{"the server", middle.list(t, []*x509.Certificate{b.Leaf}), b, b.Leaf},
		{"the client", middle.list(t, []*x509.Certificate{a.Leaf}), a, a.Leaf},
		{"the server, by a list that has ended", middle.list(t, []*x509.Certificate{b.Leaf}, ended), b, b.Leaf},
		{"the server, by the second list of its issuer",
			pemCRL(middle.list(t, nil), middle.list(t, []*x509.Certificate{b.Leaf})), b, b.Leaf},
		// both, but the client sees it first
		{"the intermediate", root.list(t, []*x509.Certificate{middleCert}), b, middleCert},
		{"another certificate of the issuer", middle.list(t, []*x509.Certificate{bystander.Leaf}), nil, nil},
		{"the leaf, by the root", root.list(t, []*x509.Certificate{a.Leaf, b.Leaf}), nil, nil},
		{"the intermediate, by a stranger of its issuer's name", other.list(t, []*x509.Certificate{middleCert}), nil, nil},
		{"the root, by itself", root.list(t, []*x509.Certificate{root.cert}), nil, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			rev := &Revocation{}
			p := Params{Revocation: rev}
			// The first handshake without the list, so that the chain is remembered as verified.
			if o := shake(t, pipe, ServerTLS(b, p), ClientTLS(a, []ID{idB}, p)); o.client != nil || o.server != nil {
				t.Fatal(o.client, o.server)
			}
			rev.Replace(mustCRL(t, c.crl))
			o := shake(t, pipe, ServerTLS(b, p), ClientTLS(a, []ID{idB}, p))
			var got, remote error
			var want RevocationStats
			switch c.peer {
			case nil:
				if o.client != nil || o.server != nil {
					t.Fatal(o.client, o.server)
				}
			case a:
				got, remote = o.server, o.client
				want.Rejected[ServerSide] = 1
			case b:
				got, remote = o.client, o.server
				want.Rejected[ClientSide] = 1
			}
			if c.peer != nil {
				var revoked *PeerRevokedError
				if !errors.As(got, &revoked) || revoked.Serial.Cmp(c.cert.SerialNumber) != 0 ||
					got.Error() != "identity verification error: peer certificate revoked by CRL: serial number "+
						c.cert.SerialNumber.String()+" of "+c.cert.Issuer.String() {
					t.Errorf("got %v", got)
				}
				if remote == nil || remote.Error() != "remote error: tls: bad certificate" {
					t.Errorf("the other end got %v", remote)
				}
			}
			if s := rev.Stats(); s != want {
				t.Errorf("%+v, want %+v", s, want)
			}
			rev.Replace(nil)
			if o := shake(t, pipe, ServerTLS(b, p), ClientTLS(a, []ID{idB}, p)); o.client != nil || o.server != nil {
				t.Errorf("after the list was withdrawn: %v, %v", o.client, o.server)
			}
		})
	}
}

// TestTrack: open tunnels are cut once, when their peer is revoked and not when it ends; checklist 136, mid-connection.
func TestTrack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newTestCA(t, "root")
		a, b, c := ca.issue(t, []string{uriA}, nil), ca.issue(t, []string{uriB}, nil), ca.issue(t, []string{uriB}, nil)
		rev := &Revocation{}
		p := Params{Revocation: rev}
		open := func(server *Certificate) outcome {
			o := shake(t, pipe, ServerTLS(server, p), ClientTLS(a, []ID{idB}, p))
			if o.client != nil || o.server != nil {
				t.Fatal(o.client, o.server)
			}
			return o
		}
		cuts := map[string][]error{}
		track := func(name string, own *Certificate, cs tls.ConnectionState, side Side) func() {
			release, err := rev.Track(own, cs, side, func(err error) { cuts[name] = append(cuts[name], err) })
			if err != nil {
				t.Fatal(err)
			}
			return release
		}
		toB, toC := open(b), open(c)
		track("a to b, client", a, toB.clientState, ClientSide)
		releaseServer := track("a to b, server", b, toB.serverState, ServerSide)
		track("a to c, client", a, toC.clientState, ClientSide)
		gone := track("gone", a, toB.clientState, ClientSide)
		gone()
		gone()
		if s := rev.Stats(); s.Tracked != 3 {
			t.Fatalf("%+v", s)
		}

		time.Sleep(2 * time.Hour) // all leaves have ended
		if n := rev.Replace(mustCRL(t, ca.list(t, nil))); n != 0 || len(cuts) != 0 {
			t.Fatalf("%d cut by an empty list: %v", n, cuts)
		}
		revoked := mustCRL(t, ca.list(t, []*x509.Certificate{b.Leaf}))
		if n := rev.Replace(revoked); n != 1 || len(cuts) != 1 || len(cuts["a to b, client"]) != 1 {
			t.Fatalf("%d cut: %v", n, cuts)
		}
		if n := rev.Replace(revoked); n != 0 {
			t.Fatalf("%d cut again", n)
		}
		releaseServer()
		if s, want := rev.Stats(), (RevocationStats{Rejected: [2]uint64{1, 0}, Tracked: 1}); s != want {
			t.Fatalf("%+v, want %+v", s, want)
		}

		// A list that comes between handshake and registration is not missed.
		called := false
		if _, err := rev.Track(a, toB.clientState, ClientSide, func(error) { called = true }); err == nil || called {
			t.Fatalf("registered: %v, cut %v", err, called)
		} else if want := (RevocationStats{Rejected: [2]uint64{2, 0}, Tracked: 1}); rev.Stats() != want {
			t.Fatalf("%+v, want %+v", rev.Stats(), want)
		}
	})
}

func TestTrackBound(t *testing.T) {
	rev := &Revocation{tunnels: map[*tracked]struct{}{}}
	for range maxTracked {
		rev.tunnels[&tracked{}] = struct{}{}
	}
	c := newTestCA(t, "root").issue(t, []string{uriA}, nil)
	release, err := rev.Track(c, tls.ConnectionState{PeerCertificates: []*x509.Certificate{c.Leaf}}, ServerSide, nil)
	if err != nil {
		t.Fatal(err)
	}
	release()
	if s := rev.Stats(); s.Untracked != [2]uint64{0, 1} || s.Tracked != maxTracked {
		t.Errorf("%+v", s)
	}
}

// TestNoRevocation: without CRL_PATH nothing is revoked and nothing is remembered.
func TestNoRevocation(t *testing.T) {
	var rev *Revocation
	release, err := rev.Track(nil, tls.ConnectionState{}, ClientSide, nil)
	if err != nil || rev.Stats() != (RevocationStats{}) || rev.CRL() != nil {
		t.Error(err, rev.Stats())
	}
	release()
}

// TestUntouchedHandshakeCost: certificates that no list mentions cost no signature check and no allocation.
func TestUntouchedHandshakeCost(t *testing.T) {
	ca := newTestCA(t, "root")
	_, listed := ca.leaf(t, []string{uriA})
	_, free := ca.leaf(t, []string{uriB})
	crl := mustCRL(t, ca.list(t, []*x509.Certificate{listed}))
	certs := []*x509.Certificate{free}
	if n := testing.AllocsPerRun(100, func() {
		if crl.check(certs, nil, x509.ExtKeyUsageServerAuth, time.Time{}) != nil {
			t.Error("refused")
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestLongSerial: twenty bytes and more are compared whole.
func TestLongSerial(t *testing.T) {
	ca := newTestCA(t, "root")
	big1 := new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), 159), big.NewInt(1))
	serial := func(n *big.Int) leafOpt { return func(c *x509.Certificate) { c.SerialNumber = n } }
	_, one := ca.leaf(t, []string{uriA}, serial(big1))
	_, two := ca.leaf(t, []string{uriA}, serial(new(big.Int).Sub(big1, big.NewInt(1))))
	crl := mustCRL(t, ca.list(t, []*x509.Certificate{one}))
	if !crl.mentions([]*x509.Certificate{two, one}) || crl.mentions([]*x509.Certificate{two}) {
		t.Error("wrong certificate listed")
	}
}

// FuzzParseCRL: whatever the file holds, there is an answer, within the bound.
func FuzzParseCRL(f *testing.F) {
	corpus, err := os.ReadFile("testdata/crl.pem")
	if err != nil {
		f.Fatal(err)
	}
	block, _ := pem.Decode(corpus)
	f.Add(corpus)
	f.Add(block.Bytes)
	f.Add([]byte(strings.Replace(string(corpus), "BEGIN X509", "BEGIN  X509", 1)))
	f.Add([]byte("\x30\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		crl, err := ParseCRL(data)
		if (crl == nil) == (err == nil) {
			t.Fatalf("%v, %v", crl, err)
		}
		if crl != nil && crl.Entries() > len(data) {
			t.Fatalf("%d entries of %d bytes", crl.Entries(), len(data))
		}
	})
}
