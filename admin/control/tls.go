package control

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"ztun/admin/ca"
)

// The server's own certificate.
const (
	serverLife  = 24 * time.Hour
	backdate    = 2 * time.Minute // for nodes whose clocks are behind
	certChecked = time.Minute     // how often it is looked at
	certFile    = "ca-cert.pem"
	caKeyFile   = "ca-key.pem"
)

// authority is the CA directory: admin/ca for the certificates of workloads, and its key once more for ours, which is
// for host names and not for a SPIFFE id.
type authority struct {
	*ca.Local
	signer *x509.Certificate
	key    crypto.Signer
	chain  []*x509.Certificate // what goes with a leaf
}

func loadAuthority(ctx context.Context, dir string) (*authority, error) {
	local, err := ca.LoadDir(dir)
	if err != nil {
		return nil, err
	}
	// admin/ca keeps its certificates to itself; a certificate from it shows what belongs to the leaf.
	id := nodeIdentity(local.TrustDomain())
	_, csr, err := ca.NewRequest(id)
	if err != nil {
		return nil, err
	}
	chain, roots, err := local.Sign(ctx, id, csr, time.Minute)
	if err != nil {
		return nil, err
	}
	a := &authority{Local: local, chain: chain[1:]}
	keyPEM, err := os.ReadFile(filepath.Join(dir, caKeyFile))
	if err != nil {
		return nil, err
	}
	for _, cert := range append(slices.Clone(chain[1:]), roots...) {
		// It fails for every certificate but the key's.
		pair, err := tls.X509KeyPair(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), keyPEM)
		if err != nil {
			continue
		}
		if key, ok := pair.PrivateKey.(crypto.Signer); ok {
			a.signer, a.key = cert, key
			return a, nil
		}
	}
	return nil, fmt.Errorf("%s is not the key of a certificate in %s", caKeyFile, dir)
}

func (a *authority) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	for _, root := range a.Roots() {
		pool.AddCert(root)
	}
	return pool
}

// issueServer makes a certificate for names and addresses, valid from now on.
func (a *authority) issueServer(names []string, life time.Duration) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	t := &x509.Certificate{
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(life),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}
	if t.NotAfter.After(a.signer.NotAfter) {
		t.NotAfter = a.signer.NotAfter
	}
	if !now.Before(t.NotAfter) {
		return nil, fmt.Errorf("the CA expired at %s", a.signer.NotAfter.UTC().Format(time.RFC3339))
	}
	for _, name := range names {
		if ip, err := netip.ParseAddr(name); err == nil {
			t.IPAddresses = append(t.IPAddresses, net.IP(ip.Unmap().AsSlice()))
		} else {
			t.DNSNames = append(t.DNSNames, name)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, t, a.signer, key.Public(), a.key)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	out := &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
	for _, c := range a.chain {
		out.Certificate = append(out.Certificate, c.Raw)
	}
	return out, nil
}

// serverCert is the certificate that the server presents, renewed by itself.
type serverCert struct {
	authority *authority
	hosts     []string
	listen    []net.Addr
	logger    *slog.Logger

	current atomic.Pointer[serving]
}

type serving struct {
	cert  *tls.Certificate
	names []string
	err   error // of the last attempt to renew
}

// renew makes a new certificate if half of the old one's life is over or the machine has other addresses.
func (s *serverCert) renew() error {
	names, old := s.names(), s.current.Load()
	if old != nil {
		half := old.cert.Leaf.NotBefore.Add(old.cert.Leaf.NotAfter.Sub(old.cert.Leaf.NotBefore) / 2)
		if slices.Equal(names, old.names) && time.Now().Before(half) {
			return nil
		}
	}
	cert, err := s.authority.issueServer(names, serverLife)
	if err != nil {
		if old != nil {
			s.current.Store(&serving{old.cert, old.names, err})
		}
		return err
	}
	s.current.Store(&serving{cert: cert, names: names})
	return nil
}

// names are what the server may be called: the given hosts, this machine, and the addresses it listens on.
func (s *serverCert) names() []string {
	names := append(slices.Clone(s.hosts), "localhost", "127.0.0.1", "::1")
	for _, l := range s.listen {
		addr, err := netip.ParseAddrPort(l.String())
		if err != nil {
			continue
		}
		if !addr.Addr().IsUnspecified() {
			names = append(names, addr.Addr().Unmap().WithZone("").String())
			continue
		}
		all, err := net.InterfaceAddrs()
		if err != nil {
			continue
		}
		for _, a := range all {
			if p, err := netip.ParsePrefix(a.String()); err == nil {
				names = append(names, p.Addr().WithZone("").String())
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

func (s *serverCert) run(ctx context.Context) {
	tick := time.NewTicker(certChecked)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			before := s.current.Load()
			if err := s.renew(); err != nil {
				s.logger.Error("cannot renew the server's certificate", "error", err.Error())
			} else if now := s.current.Load(); now != before {
				s.logger.Info("renewed the server's certificate", "valid until", now.cert.Leaf.NotAfter.UTC().Format(time.RFC3339))
			}
		}
	}
}

// config is the server's side of TLS: 1.3 alone, a client certificate if the client has one. What it is worth is judged
// with each call (clientCert): one that has expired must not end a handshake whose client has a good token, too.
func (s *serverCert) config() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2"},
		ClientAuth: tls.RequestClientCert,
		ClientCAs:  s.authority.pool(),
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return s.current.Load().cert, nil
		},
		// Every connection shows its certificate anew: a resumed one would keep what has expired.
		SessionTicketsDisabled: true,
	}
}

// rootsPEM is the trust bundle as the CA service sends it.
func (a *authority) rootsPEM() string { return string(bytes.TrimSpace(encodeCerts(a.Roots()))) + "\n" }
