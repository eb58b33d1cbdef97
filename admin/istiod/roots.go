package istiod

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// maxRoots bounds a root file, in bytes.
const maxRoots = 4 << 20

// Roots are the certificates that a server's chain must end in. At most one is set; none is no trust in anybody.
type Roots struct {
	File   string // PEM, re-read at each Dial
	PEM    []byte
	System bool // the operating system's
}

func (r Roots) check() error {
	n := 0
	for _, set := range []bool{r.File != "", r.PEM != nil, r.System} {
		if set {
			n++
		}
	}
	if n > 1 {
		return errors.New("root certificates: more than one of file, text and system are given")
	}
	return nil
}

// What nothing is trusted by.
const (
	noRoots   = "any root certificate, for none is configured"
	emptyText = "the text given for root certificates, for there is none in it: is it meant to be the path of a file " +
		"that exists?"
)

// load reads the roots and says where they come from, for errors. A text without a certificate is no error, like no
// roots at all: nothing will be trusted, and the error of the connection says so.
func (r Roots) load() (pool *x509.CertPool, from string, err error) {
	switch {
	case r.File != "":
		pool, err = loadFile(r.File)
		return pool, r.File, err
	case r.System:
		if pool, err = x509.SystemCertPool(); err != nil {
			return nil, "", fmt.Errorf("system root certificates: %w", err)
		}
		return pool, "the system's root certificates", nil
	case r.PEM == nil:
		return x509.NewCertPool(), noRoots, nil
	}
	pool, n, _ := parseRoots(r.PEM)
	if n == 0 {
		return pool, emptyText, nil
	}
	return pool, "the text given for root certificates", nil
}

func loadFile(path string) (*x509.CertPool, error) {
	text, err := readFile("root certificates", path, maxRoots+1)
	if err != nil {
		return nil, err
	}
	if len(text) > maxRoots {
		return nil, fmt.Errorf("root certificates %s: larger than %d bytes: is this the right file?", path, maxRoots)
	}
	pool, n, bad := parseRoots(text)
	switch {
	case n > 0: // one that does not parse (an unusual key) is not the others' fault
		return pool, nil
	case bad != nil:
		return nil, fmt.Errorf("root certificates %s: %w", path, bad)
	case len(bytes.TrimSpace(text)) == 0:
		return nil, fmt.Errorf("root certificates %s: the file is empty", path)
	}
	return nil, fmt.Errorf("root certificates %s: there is no certificate in PEM form in it", path)
}

// readFile reads at most limit bytes of a regular file; errors begin with what. Anything else is not even opened: a
// pipe would wait for its other end, for ever and past the end of the process's patience.
func readFile(what, path string, limit int64) ([]byte, error) {
	if s, err := os.Stat(path); err == nil && !s.Mode().IsRegular() {
		return nil, fmt.Errorf("%s %s: not a regular file", what, path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, limit))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return text, nil
}

// parseRoots makes a pool of the certificates in a text; bad is what is wrong with the first one that does not parse.
func parseRoots(text []byte) (pool *x509.CertPool, n int, bad error) {
	pool = x509.NewCertPool()
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			return pool, n, bad
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			if bad == nil {
				bad = err
			}
			continue
		}
		pool.AddCert(cert)
		n++
	}
}

// verifier judges one control plane's certificate.
type verifier struct {
	roots     *x509.CertPool
	from      string // where the roots come from
	host, alt string
}

// verify checks the chain, then the names (spec/controlplane.md 2.1). It errs on the side of words: what it returns is
// all that an operator sees of a wrong root file or hostname.
func (v *verifier) verify(cs tls.ConnectionState) error {
	if len(cs.PeerCertificates) == 0 { // unreachable: crypto/tls has refused; never trust by accident
		return errors.New("the control plane presented no certificate")
	}
	leaf := cs.PeerCertificates[0]
	opts := x509.VerifyOptions{Roots: v.roots, Intermediates: x509.NewCertPool(), CurrentTime: time.Now()}
	for _, cert := range cs.PeerCertificates[1:] {
		opts.Intermediates.AddCert(cert)
	}
	if _, err := leaf.Verify(opts); err != nil {
		err = fmt.Errorf("%w (not trusted by %s)", err, v.from)
		return &tls.CertificateVerificationError{UnverifiedCertificates: cs.PeerCertificates, Err: err}
	}
	err := leaf.VerifyHostname(v.host)
	if err == nil {
		return nil
	}
	if v.alt != "" {
		if leaf.VerifyHostname(v.alt) == nil {
			return nil
		}
		err = fmt.Errorf("%w (nor is it for the alternate hostname %s)", err, v.alt)
	}
	return &tls.CertificateVerificationError{UnverifiedCertificates: cs.PeerCertificates, Err: err}
}
