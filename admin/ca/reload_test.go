package ca

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"log/slog"
	"strings"
	"testing"
	"time"
)

// rsaDir is a directory as ztunnel's sources have it: an RSA root of an organization that is a trust domain, without a
// SPIFFE name, its key for everybody to read.
func rsaDir(t *testing.T, keyType string) string {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{Subject: pkix.Name{Organization: []string{"cluster.local"}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER := x509.MarshalPKCS1PrivateKey(key)
	if keyType == "PRIVATE KEY" {
		if keyDER, err = x509.MarshalPKCS8PrivateKey(key); err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	write(t, dir, rootFile, 0o644, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	write(t, dir, keyFile, 0o644, pem.EncodeToMemory(&pem.Block{Type: keyType, Bytes: keyDER}))
	return dir
}

// TestForeignRoots: the test root of a ztunnel that is migrated from signs here, too, and the log says which one it is.
func TestForeignRoots(t *testing.T) {
	for _, keyType := range []string{"PRIVATE KEY", "RSA PRIVATE KEY"} {
		dir := rsaDir(t, keyType)
		var log bytes.Buffer
		d, err := OpenDir(dir, slog.New(slog.NewTextHandler(&log, nil)))
		if err != nil {
			t.Fatal(err)
		}
		a, err := sign(t, d.now.Load(), id("a"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := a.Leaf.Verify(x509.VerifyOptions{Roots: a.Pool}); err != nil {
			t.Error(err)
		}
		sum := sha256.Sum256(a.Roots[0].Raw)
		for _, want := range []string{"level=WARN", "0644", "O=cluster.local", hex.EncodeToString(sum[:]),
			a.Roots[0].NotAfter.UTC().Format(time.RFC3339)} {
			if !strings.Contains(log.String(), want) {
				t.Errorf("%s: no %q in %s", keyType, want, log.String())
			}
		}
	}
}

// TestReload: a root or a key that is replaced signs without a restart; half a change, or a broken file, changes
// nothing.
func TestReload(t *testing.T) {
	dir, next := initDir(t, "cluster.local"), initDir(t, "cluster.local")
	var log lockedBuffer
	d, err := OpenDir(dir, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	d.wait.settle, d.wait.poll = 10*time.Millisecond, 50*time.Millisecond
	ctx, cancel := context.WithCancel(t.Context())
	changed, done := make(chan struct{}, 100), make(chan error)
	go func() { done <- d.Run(ctx, func() { changed <- struct{}{} }) }()
	wait := func(what string) {
		t.Helper()
		select {
		case <-changed:
		case <-time.After(20 * time.Second):
			t.Fatal(what, log.String())
		}
	}
	signer := func() *x509.Certificate {
		chain, roots, err := signFor(t, d)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range roots {
			if chain[0].CheckSignatureFrom(r) == nil {
				return r
			}
		}
		t.Fatal("signed by none of the roots")
		return nil
	}
	old := signer()
	write(t, dir, rootFile, 0o644, append(read(t, dir, rootFile), read(t, next, rootFile)...))
	wait("a second root")
	if !signer().Equal(old) || len(d.now.Load().Roots()) != 2 {
		t.Error("the second root is not given out, or signs")
	}
	write(t, dir, keyFile, 0o600, read(t, next, keyFile))
	wait("another key")
	if signer().Equal(old) {
		t.Error("the old root still signs")
	}
	write(t, dir, rootFile, 0o644, []byte("half"))
	for end := time.Now().Add(20 * time.Second); !strings.Contains(log.String(),
		"going on with what was read before"); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal(log.String())
		}
	}
	signer()
	write(t, dir, rootFile, 0o644, read(t, next, rootFile))
	wait("mended")
	select {
	case <-changed:
		t.Error("changed once too often")
	case <-time.After(200 * time.Millisecond):
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func signFor(t *testing.T, s Signer) (chain, roots []*x509.Certificate, err error) {
	t.Helper()
	_, csr, err := NewRequest(id("a"))
	if err != nil {
		t.Fatal(err)
	}
	return s.Sign(t.Context(), id("a"), csr, time.Hour)
}
