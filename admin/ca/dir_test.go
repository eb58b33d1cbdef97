package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"ztun/proxy/identity"
)

func initDir(t *testing.T, trustDomain string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "new", "ca")
	if err := InitDir(dir, trustDomain); err != nil {
		t.Fatal(err)
	}
	return dir
}

func read(t *testing.T, dir, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func write(t *testing.T, dir, name string, mode fs.FileMode, b []byte) {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, b, mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func sign(t *testing.T, l *Local, who identity.ID) (*identity.Certificate, error) {
	t.Helper()
	key, csr, err := NewRequest(who)
	if err != nil {
		t.Fatal(err)
	}
	chain, roots, err := l.Sign(t.Context(), who, csr, time.Hour)
	if err != nil {
		return nil, err
	}
	return identity.New(who, key, chain, roots)
}

func TestInitAndLoad(t *testing.T) {
	dir := initDir(t, "cluster.local")
	for name, mode := range map[string]fs.FileMode{rootFile: 0o644, keyFile: 0o600} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
	if files, err := os.ReadDir(dir); err != nil || len(files) != 2 {
		t.Errorf("left over: %v, %v", files, err)
	}
	one, err := LoadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	two, err := LoadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if one.TrustDomain() != "cluster.local" || one.Fake() {
		t.Errorf("%q %v", one.TrustDomain(), one.Fake())
	}
	a, err := sign(t, one, id("a"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Leaf.Verify(x509.VerifyOptions{Roots: pool(two.Roots()),
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		t.Error(err)
	}
	if len(a.Intermediates) != 0 {
		t.Error("the root was sent along")
	}
	_, err = sign(t, one, identity.ID{TrustDomain: "other", Namespace: "n", ServiceAccount: "s"})
	if err == nil ||
		err.Error() != "local CA signs for trust domain cluster.local only, not for spiffe://other/ns/n/sa/s" {
		t.Error(err)
	}
}

func pool(certs []*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, c := range certs {
		p.AddCert(c)
	}
	return p
}

func TestInitNeverOverwrites(t *testing.T) {
	dir := initDir(t, "cluster.local")
	root, key := read(t, dir, rootFile), read(t, dir, keyFile)
	for _, present := range [][]string{{rootFile, keyFile}, {rootFile}, {keyFile}} {
		d := t.TempDir()
		for _, name := range present {
			write(t, d, name, 0o600, []byte("precious"))
		}
		err := InitDir(d, "cluster.local")
		if !errors.Is(err, fs.ErrExist) || !strings.Contains(err.Error(), "refusing to overwrite") {
			t.Errorf("%v: %v", present, err)
		}
		files, _ := os.ReadDir(d)
		if len(files) != len(present) {
			t.Errorf("%v: files %v", present, files)
		}
	}
	if err := InitDir(dir, "cluster.local"); !errors.Is(err, fs.ErrExist) {
		t.Error(err)
	}
	if string(read(t, dir, rootFile)) != string(root) || string(read(t, dir, keyFile)) != string(key) {
		t.Error("changed")
	}
	for _, td := range []string{"", "a/b", "a b", "spiffe://x"} {
		if err := InitDir(t.TempDir(), td); err == nil {
			t.Errorf("trust domain %q accepted", td)
		}
	}
}

// TestInitRace: many at once make one CA, whole.
func TestInitRace(t *testing.T) {
	dir := t.TempDir()
	var all sync.WaitGroup
	errs := make([]error, 16)
	for i := range errs {
		all.Go(func() { errs[i] = InitDir(dir, "cluster.local") })
	}
	all.Wait()
	made := 0
	for _, err := range errs {
		if err == nil {
			made++
		} else if !errors.Is(err, fs.ErrExist) {
			t.Error(err)
		}
	}
	if _, err := LoadDir(dir); made != 1 || err != nil {
		t.Errorf("%d made, %v", made, err)
	}
}

// TestBrokenDirs: each file missing, empty, garbage, of another CA: an error that names it and says what to do.
func TestBrokenDirs(t *testing.T) {
	foreign := initDir(t, "cluster.local")
	ended := func(dir string) {
		key, err := parseKey(read(t, dir, keyFile))
		if err != nil {
			t.Fatal(err)
		}
		tmpl := &x509.Certificate{Subject: pkix.Name{CommonName: "old"}, NotBefore: time.Now().Add(-2 * time.Hour),
			NotAfter: time.Now().Add(-time.Hour), IsCA: true, BasicConstraintsValid: true}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		write(t, dir, rootFile, 0o644, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	notCA := func(dir string) {
		l, err := LoadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		tmpl := &x509.Certificate{Subject: pkix.Name{CommonName: "leaf"}, NotBefore: time.Now().Add(-time.Hour),
			NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, l.key.Public(), l.key)
		if err != nil {
			t.Fatal(err)
		}
		write(t, dir, rootFile, 0o644, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	for _, c := range []struct {
		name  string
		spoil func(dir string)
		file  string
		want  string
	}{
		{"no root", func(d string) {
			os.Remove(filepath.Join(d, rootFile))
		}, rootFile, "no such file or directory (make a CA with `ztun ca init DIR`"},
		{"no key", func(d string) {
			os.Remove(filepath.Join(d, keyFile))
		}, keyFile, "no such file or directory (make a CA with `ztun ca init DIR`"},
		{"no directory", func(d string) { os.RemoveAll(d) }, rootFile, "no such file or directory"},
		{"root empty", func(d string) { write(t, d, rootFile, 0o644, nil) }, rootFile, "no PEM certificate in it"},
		{"key empty", func(d string) { write(t, d, keyFile, 0o600, nil) }, keyFile, "no PEM private key in it"},
		{"key is a certificate", func(d string) {
			write(t, d, keyFile, 0o600, read(t, d, rootFile))
		}, keyFile, "no PEM private key in it"},
		{"root garbage", func(d string) {
			write(t, d, rootFile, 0o644,
				append(read(t, d, rootFile), "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"...))
		}, rootFile, "certificate 2: "},
		{"key garbage", func(d string) {
			write(t, d, keyFile, 0o600, []byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"))
		}, keyFile, "private key: "},
		{"key encrypted", func(d string) {
			write(t, d, keyFile, 0o600,
				[]byte("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n"))
		}, keyFile, "the key is encrypted"},
		{"another CA's key", func(d string) {
			write(t, d, keyFile, 0o600, read(t, foreign, keyFile))
		}, keyFile, "is not the key of any certificate in root-cert.pem"},
		{"root is a directory", func(d string) {
			os.Remove(filepath.Join(d, rootFile))
			os.Mkdir(filepath.Join(d, rootFile), 0o755)
		}, rootFile, "not a regular file"},
		{"root too large", func(d string) {
			write(t, d, rootFile, 0o644, make([]byte, maxFile+1))
		}, rootFile, "not a regular file of at most"},
		{"root expired", ended, rootFile, "the signing certificate expired at "},
		{"root is no CA", notCA, rootFile, "not a CA"},
		{"another CA's certificate", func(d string) {
			write(t, d, certFile, 0o644, read(t, foreign, rootFile))
		}, keyFile, "is not the key of ca-cert.pem"},
		{"chain garbage", func(d string) {
			write(t, d, certFile, 0o644, read(t, d, rootFile))
			write(t, d, chainFile, 0o644, []byte("x"))
		}, chainFile, "no PEM certificate in it"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := initDir(t, "cluster.local")
			c.spoil(dir)
			l, err := LoadDir(dir)
			if err == nil || !strings.HasPrefix(err.Error(), filepath.Join(dir, c.file)+": ") ||
				!strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, %v", l, err)
			}
			if strings.HasPrefix(c.name, "no ") && !errors.Is(err, fs.ErrNotExist) {
				t.Error("not fs.ErrNotExist")
			}
		})
	}
}

// TestOpenKeys: a key that too many may read or write is taken, with a warning; a group that shares it may read it.
func TestOpenKeys(t *testing.T) {
	for mode, want := range map[fs.FileMode]string{0o600: "", 0o640: "", 0o400: "", 0o644: "permissions 0644 are too open",
		0o660: "permissions 0660 are too open"} {
		dir := initDir(t, "cluster.local")
		write(t, dir, keyFile, mode, read(t, dir, keyFile))
		l, err := LoadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(l.Warnings(), "\n"); (got == "") != (want == "") || !strings.Contains(got, want) {
			t.Errorf("%04o: %q", mode, got)
		}
	}
}

// TestRootRotation: two roots in the bundle; the key decides which one signs, both are given to peers.
func TestRootRotation(t *testing.T) {
	old, next := initDir(t, "cluster.local"), initDir(t, "cluster.local")
	both := append(read(t, old, rootFile), read(t, next, rootFile)...)
	write(t, old, rootFile, 0o644, both)
	write(t, next, rootFile, 0o644, both)
	for _, dir := range []string{old, next} {
		l, err := LoadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		a, err := sign(t, l, id("a"))
		if err != nil || len(a.Roots) != 2 {
			t.Fatal(a, err)
		}
		if _, err := a.Leaf.Verify(x509.VerifyOptions{Roots: a.Pool}); err != nil {
			t.Error(err)
		}
	}
}

// TestPluginLayout: Istio's files, an intermediate CA with a PKCS#1-style EC key, signing below a root it has no key
// of.
func TestPluginLayout(t *testing.T) {
	root := NewFake()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		Subject:   pkix.Name{Organization: []string{"Istio"}, CommonName: "Intermediate CA"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(30 * time.Minute),
		KeyUsage: x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
	}, root.cert, key.Public(), root.key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	dir := t.TempDir()
	write(t, dir, rootFile, 0o644, fakeCert)
	write(t, dir, certFile, 0o644, cert)
	write(t, dir, chainFile, 0o644, append(cert, fakeCert...))
	write(t, dir, keyFile, 0o600,
		append([]byte("-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"),
			pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER})...))
	l, err := LoadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	a, err := sign(t, l, id("a"))
	if err != nil {
		t.Fatal(err)
	}
	if len(a.Intermediates) != 1 || len(a.Roots) != 1 || a.Leaf.NotAfter.After(a.Intermediates[0].NotAfter) {
		t.Errorf("%d intermediates, %d roots, ends %v", len(a.Intermediates), len(a.Roots), a.Leaf.NotAfter)
	}
	if _, err := a.Leaf.Verify(x509.VerifyOptions{Roots: a.Pool, Intermediates: pool(a.Intermediates)}); err != nil {
		t.Error(err)
	}
}
