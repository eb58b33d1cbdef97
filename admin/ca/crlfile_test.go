package ca

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"ztun/proxy/identity"
)

// fakeCRL is a list of the fake CA.
func fakeCRL(t testing.TB, life time.Duration, revoked ...*x509.Certificate) []byte {
	t.Helper()
	l := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-2 * time.Hour),
		NextUpdate: time.Now().Add(life)}
	for _, c := range revoked {
		l.RevokedCertificateEntries = append(l.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: c.SerialNumber, RevocationTime: time.Now()})
	}
	ca := NewFake()
	issuer := *ca.cert
	issuer.KeyUsage |= x509.KeyUsageCRLSign
	der, err := x509.CreateRevocationList(rand.Reader, l, &issuer, ca.key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})
}

func fakeCertificate(t testing.TB, name string) *identity.Certificate {
	t.Helper()
	key, csr, err := NewRequest(id(name))
	if err != nil {
		t.Fatal(err)
	}
	chain, roots, err := NewFake().Sign(t.Context(), id(name), csr, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	c, err := identity.New(id(name), key, chain, roots)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// lockedBuffer is a log that is read while it is written.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func newCRLFile(path string, rev *identity.Revocation, also ...string) (*CRLFile, *lockedBuffer) {
	log := new(lockedBuffer)
	f := NewCRLFile(path, rev, slog.New(slog.NewTextHandler(log, nil)), also...)
	f.wait.settle, f.wait.poll = 10*time.Millisecond, 50*time.Millisecond
	return f, log
}

// TestCRLFile: what each content of the file leads to. Checklist 137 among them.
func TestCRLFile(t *testing.T) {
	one, two := fakeCertificate(t, "a"), fakeCertificate(t, "b")
	path := filepath.Join(t.TempDir(), "ca-crl.pem")
	rev := &identity.Revocation{}
	f, log := newCRLFile(path, rev)
	var lines int
	list := fakeCRL(t, time.Hour, one.Leaf)
	for _, step := range []struct {
		name    string
		put     []byte // nil: no file
		err     string // after the path
		entries int    // in force; -1: none at all
		log     string
	}{
		{"missing at the start", nil, "no such file or directory", -1,
			`level=WARN msg="cannot load certificate revocation lists: nothing is revoked, the file is read when it appears"`},
		{"corrupt at the start", []byte("garbage"), "CRL, taken for DER as there is no PEM block in it: x509: malformed crl",
			-1, `level=WARN msg="cannot load certificate revocation lists: nothing is revoked"`},
		{"the same again", []byte("garbage"), "CRL, taken for DER as there is no PEM block in it: x509: malformed crl",
			-1, ""},
		{"empty", []byte{}, "", 0, `level=INFO msg="certificate revocation lists loaded"`},
		{"one", list, "", 1, "lists=1 entries=1 tunnelsCut=0 nextUpdate="},
		{"one, written again", list, "", 1, ""},
		{"corrupt", []byte("-----BEGIN X509 CRL-----\n"), "CRL: only 0 of 1 PEM blocks are whole: is the file cut short?", 1,
			"what was loaded before stays in force"},
		{"missing", nil, "no such file or directory", 1,
			"what was loaded before stays in force, the file is read when it appears"},
		{"two, ended", fakeCRL(t, -time.Hour, one.Leaf, two.Leaf), "", 2,
			"level=WARN msg=\"certificate revocation lists loaded; one is older than it wants to be, and obeyed all the same\""},
		{"too large", make([]byte, identity.MaxCRL+1), "larger than 8388608 bytes: is this the right file?", 2,
			"what was loaded before stays in force"},
	} {
		if step.put == nil {
			os.Remove(path)
		} else {
			writeFile(t, path, step.put)
		}
		err := f.Load()
		if (err == nil) != (step.err == "") || err != nil && (!strings.Contains(err.Error(), path+": ") ||
			!strings.HasSuffix(err.Error(), step.err)) {
			t.Errorf("%s: %v", step.name, err)
		}
		if crl := rev.CRL(); (crl == nil) != (step.entries < 0) || crl != nil && crl.Entries() != step.entries {
			t.Errorf("%s: %+v in force", step.name, crl)
		}
		new := log.String()[lines:]
		lines += len(new)
		if step.log == "" && new != "" || !strings.Contains(new, step.log) {
			t.Errorf("%s: logged %q", step.name, new)
		}
	}
	if s := f.Stats(); s.Loads != 3 || s.Failures != 6 || !strings.HasSuffix(s.LastError, "is this the right file?") {
		t.Errorf("%+v", s)
	}
}

// TestCRLCutsTunnel: checklist 136 from the file to the wire: an open tunnel breaks, new ones are refused, and when the
// list takes the certificate back new ones work.
func TestCRLCutsTunnel(t *testing.T) {
	client, server := fakeCertificate(t, "a"), fakeCertificate(t, "b")
	v := newVolume(t, "ca-crl.pem", nil)
	rev := &identity.Revocation{}
	f, _ := newCRLFile(v.path(), rev)
	runs(t, f.Run)
	eventually(t, "the file to be loaded", func() bool { return rev.CRL() != nil })
	p := identity.Params{Revocation: rev}

	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	defer all.Wait()
	defer l.Close()
	all.Go(func() { // a server that has no list of its own
		for {
			raw, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer raw.Close()
				conn := tls.Server(raw, identity.ServerTLS(server, identity.Params{}))
				b := make([]byte, 1)
				for {
					if _, err := conn.Read(b); err != nil {
						return
					}
					conn.Write(b)
				}
			})
		}
	})
	dial := func() (*tls.Conn, error) {
		raw, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		conn := tls.Client(raw, identity.ClientTLS(client, []identity.ID{id("b")}, p))
		conn.SetDeadline(time.Now().Add(20 * time.Second))
		return conn, conn.Handshake()
	}
	echo := func(conn *tls.Conn) error {
		b := []byte{1}
		_, err := conn.Write(b)
		if err == nil {
			_, err = conn.Read(b)
		}
		return err
	}
	conn, err := dial()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var reason error
	release, err := rev.Track(client, conn.ConnectionState(), identity.ClientSide, func(err error) {
		reason = err
		conn.NetConn().Close()
	})
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	if err := echo(conn); err != nil {
		t.Fatal(err)
	}
	v.swap(t, fakeCRL(t, time.Hour, server.Leaf))
	for err == nil { // ends with the connection's deadline at the latest
		err = echo(conn)
		time.Sleep(time.Millisecond)
	}
	eventually(t, "the reload to be over", func() bool { return f.Stats().Cut == 1 })
	var revoked *identity.PeerRevokedError
	if !errors.Is(err, net.ErrClosed) || !errors.As(reason, &revoked) {
		t.Errorf("%v, because %v", err, reason)
	}
	if refused, err := dial(); !errors.As(err, &revoked) {
		t.Errorf("a new tunnel: %v", err)
	} else {
		refused.Close()
	}
	if s := rev.Stats(); s.Rejected != [2]uint64{2, 0} || s.Tracked != 0 {
		t.Errorf("%+v", s)
	}
	v.swap(t, fakeCRL(t, time.Hour))
	eventually(t, "tunnels to work again", func() bool {
		conn, err := dial()
		if err == nil {
			err = echo(conn)
		}
		conn.Close()
		return err == nil
	})
}

// TestWatchPolls: a file in a directory that does not exist yet, and a link into another directory, are seen at
// intervals.
func TestWatchPolls(t *testing.T) {
	dir := t.TempDir()
	one := fakeCertificate(t, "a")
	real := filepath.Join(dir, "real.pem")
	link := filepath.Join(t.TempDir(), "link.pem")
	writeFile(t, real, nil)
	if err := os.Symlink(real, link); err != nil {
		t.Fatal(err)
	}
	late := filepath.Join(dir, "late", "ca-crl.pem")
	linked, missing := &identity.Revocation{}, &identity.Revocation{}
	f, _ := newCRLFile(link, linked)
	runs(t, f.Run)
	g, log := newCRLFile(late, missing)
	runs(t, g.Run)
	eventually(t, "both to start", func() bool { return linked.CRL() != nil && g.Stats().Failures > 0 })
	if !strings.Contains(log.String(), "looking at intervals only") {
		t.Errorf("log: %s", log.String())
	}
	writeFile(t, real, fakeCRL(t, time.Hour, one.Leaf))
	if err := os.Mkdir(filepath.Dir(late), 0o700); err != nil {
		t.Fatal(err)
	}
	writeFile(t, late, fakeCRL(t, time.Hour, one.Leaf))
	for _, rev := range []*identity.Revocation{linked, missing} {
		eventually(t, "the list", func() bool { return rev.CRL() != nil && rev.CRL().Entries() == 1 })
	}
}

// TestCRLOfTwoFiles: the operator's list and the control plane's are in force together, each comes and goes wrong by
// itself.
func TestCRLOfTwoFiles(t *testing.T) {
	one, two := fakeCertificate(t, "a"), fakeCertificate(t, "b")
	dir := t.TempDir()
	operators, controls := filepath.Join(dir, "a.pem"), filepath.Join(dir, "b.pem")
	rev := &identity.Revocation{}
	f, log := newCRLFile(operators, rev, controls)
	writeFile(t, operators, fakeCRL(t, time.Hour, one.Leaf))
	for _, step := range []struct {
		name, path string
		put        []byte
		entries    int
		err        bool
	}{
		{"the other is not there yet", "", nil, 1, false},
		{"both", controls, fakeCRL(t, time.Hour, two.Leaf), 2, false},
		{"the operator's is broken", operators, []byte("garbage"), 2, true},
		{"the control plane's changes beside it", controls, fakeCRL(t, time.Hour, one.Leaf, two.Leaf), 3, true},
		{"the operator's is good again", operators, fakeCRL(t, time.Hour), 2, false},
		{"the control plane's is broken", controls, []byte("garbage"), 2, true},
	} {
		if step.path != "" {
			writeFile(t, step.path, step.put)
		}
		if err := f.Load(); (err != nil) != step.err || rev.CRL().Entries() != step.entries {
			t.Fatalf("%s: %v, %d entries", step.name, err, rev.CRL().Entries())
		}
	}
	if n := strings.Count(log.String(), "lists loaded"); n != 4 {
		t.Errorf("%d loads:\n%s", n, log.String())
	}
	// Without an operator's file there is nothing to be missed.
	f, log = newCRLFile("", &identity.Revocation{}, filepath.Join(dir, "none"))
	if err := f.Load(); err != nil || log.String() != "" {
		t.Errorf("%v %s", err, log.String())
	}
}
