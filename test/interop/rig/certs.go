package rig

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"
	"time"

	"ztun/admin/ca"
	"ztun/proxy/identity"
)

// NewCA makes a certificate authority as `ztun ca init` does.
func NewCA(t testing.TB, trustDomain string) *ca.Local {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "ca")
	if err := ca.InitDir(dir, trustDomain); err != nil {
		t.Fatal(err)
	}
	l, err := ca.LoadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// ID is the identity of a service account of namespace default, trust domain cluster.local.
func ID(account string) identity.ID {
	return identity.ID{TrustDomain: "cluster.local", Namespace: "default", ServiceAccount: account}
}

// Issue has a CA sign a certificate for an identity, valid for an hour.
func Issue(t testing.TB, l *ca.Local, id identity.ID) *identity.Certificate {
	t.Helper()
	key, csr, err := ca.NewRequest(id)
	if err != nil {
		t.Fatal(err)
	}
	chain, roots, err := l.Sign(context.Background(), id, csr, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	c, err := identity.New(id, key, chain, roots)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// PEM are the files that foreign programs read a certificate from.
type PEM struct {
	Cert  string `json:"cert"`  // leaf and intermediates
	Key   string `json:"key"`   // PKCS #8
	Roots string `json:"roots"` // whom to trust
}

// WritePEM writes a certificate, its key and its roots. The files end with the test.
func WritePEM(t testing.TB, c *identity.Certificate) PEM {
	t.Helper()
	dir := t.TempDir()
	write := func(name string, typ string, ders ...[]byte) string {
		var out []byte
		for _, der := range ders {
			out = append(out, pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der})...)
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, out, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	key, err := x509.MarshalPKCS8PrivateKey(c.TLS.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	var roots [][]byte
	for _, root := range c.Roots {
		roots = append(roots, root.Raw)
	}
	return PEM{
		Cert:  write("cert.pem", "CERTIFICATE", c.TLS.Certificate...),
		Key:   write("key.pem", "PRIVATE KEY", key),
		Roots: write("roots.pem", "CERTIFICATE", roots...),
	}
}

// ForeignClientTLS is a configuration for an HTTP/2 client written with crypto/tls by others: certificate c, its
// roots trusted, no host name to check as the certificates of a mesh have none.
func ForeignClientTLS(c *identity.Certificate) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, Certificates: []tls.Certificate{c.TLS},
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			_, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: c.Pool,
				KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
			return err
		},
	}
}

// ForeignServerTLS is the like for a server: it asks for a client certificate of the same roots.
func ForeignServerTLS(c *identity.Certificate) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, Certificates: []tls.Certificate{c.TLS},
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: c.Pool,
	}
}
