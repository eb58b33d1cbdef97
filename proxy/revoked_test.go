package proxy

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"ztun/admin/ca"
	"ztun/proxy/identity"
)

// crlCA is a CA directory whose key the test may sign lists with.
func crlCA(t *testing.T) (*ca.Manager, func(serial *big.Int) *identity.CRL) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "ca")
	if err := ca.InitDir(dir, "cluster.local"); err != nil {
		t.Fatal(err)
	}
	signer, err := ca.LoadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	m := ca.NewManager(ca.ManagerOptions{Signer: signer, TTL: time.Hour})
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	work.Go(func() { m.Run(ctx) })
	t.Cleanup(func() { cancel(); work.Wait() })
	return m, func(serial *big.Int) *identity.CRL {
		t.Helper()
		data, err := os.ReadFile(filepath.Join(dir, "ca-key.pem"))
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode(data)
		key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		issuer := *signer.Roots()[0]
		issuer.KeyUsage |= x509.KeyUsageCRLSign
		der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
			Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Minute), NextUpdate: time.Now().Add(time.Hour),
			RevokedCertificateEntries: []x509.RevocationListEntry{
				{SerialNumber: serial, RevocationTime: time.Now().Add(-time.Minute)}},
		}, &issuer, key.(crypto.Signer))
		if err != nil {
			t.Fatal(err)
		}
		crl, err := identity.ParseCRL(der)
		if err != nil {
			t.Fatal(err)
		}
		return crl
	}
}

// TestRevoked: a list that names a peer cuts the tunnels that are open to it, on whichever side has the list, and
// lets no new one through (spec dataplane 8.6, checklist 136 and 137).
func TestRevoked(t *testing.T) {
	for i, side := range []string{"client", "server"} {
		t.Run(side, func(t *testing.T) {
			certs, sign := crlCA(t)
			var lists [2]identity.Revocation
			w := newWorldWith(t, func(_ *world, j int, o *Options) {
				o.Certs = certs
				o.Config.TLS.Revocation = &lists[j]
			})
			w.listen(appB, func(c net.Conn) { io.Copy(c, c) })
			app, _, done, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.91.2.2:9000")
			if err != nil {
				t.Fatal(err)
			}
			defer app.Close()
			app.Write([]byte("x"))
			if _, err := io.ReadFull(app, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			if n := lists[i].Stats().Tracked; n != 1 {
				t.Errorf("%d tunnels are tracked", n)
			}
			peer := []string{"b", "a"}[i]
			var serial *big.Int
			for _, c := range certs.Dump() {
				if c.Identity.ServiceAccount == peer {
					serial = c.Chain[0].SerialNumber
				}
			}
			if cut := lists[i].Replace(sign(serial)); cut != 1 {
				t.Errorf("%d tunnels were cut", cut)
			}
			if _, err := io.ReadAll(app); err == nil {
				t.Error("a cut connection ended in good order")
			}
			<-done
			w.settle()
			if _, _, _, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.91.2.2:9000"); err == nil {
				t.Error("a new connection to, or from, a revoked peer stands")
			}
			if n := lists[i].Stats().Rejected[i]; n < 2 {
				t.Errorf("%d rejections are counted", n)
			}
			w.stop()
			found := false
			for _, l := range w.lines(i) {
				found = found || strings.Contains(l, `error="connection closed: peer certificate revoked by CRL"`)
			}
			if !found {
				t.Errorf("no access line tells of the revocation:\n%s", strings.Join(w.lines(i), "\n"))
			}
			if n := lists[i].Stats().Tracked; n != 0 {
				t.Errorf("%d tunnels are still tracked", n)
			}
			counted := false
			for series := range gather(t, w.metrics[i]) {
				counted = counted || strings.Contains(series, `response_flags="CERT_REVOKED"`)
			}
			if !counted {
				t.Error("no connection is counted as CERT_REVOKED")
			}
		})
	}
}
