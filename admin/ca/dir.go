package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// The files of a CA directory. The last two are optional and of Istio's plug-in layout.
const (
	rootFile  = "root-cert.pem"  // one or more roots, readable by all
	keyFile   = "ca-key.pem"     // the signing key, which should be 0600
	certFile  = "ca-cert.pem"    // the signing certificate, if it is not among the roots
	chainFile = "cert-chain.pem" // what leads from it to a root
)

// rootLife is how long a CA made by InitDir lasts.
const rootLife = 10 * 365 * 24 * time.Hour

// InitDir makes a new CA for one trust domain in dir, which is created if need be (0755): root-cert.pem (0644) and
// ca-key.pem (0600, PKCS#8). Files appear whole or not at all. It never overwrites: if either exists, it changes
// nothing and the error wraps fs.ErrExist.
func InitDir(dir, trustDomain string) error {
	if trustDomain == "" || strings.ContainsAny(trustDomain, "/:@?#% \t\r\n") {
		return fmt.Errorf("trust domain %q: must be a name such as cluster.local", trustDomain)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, name := range []string{keyFile, rootFile, certFile} {
		if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			return existsError(filepath.Join(dir, name))
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("new CA key: %w", err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("new CA key: %w", err)
	}
	now := time.Now()
	root := &x509.Certificate{
		// Another CA made in the same way must not look like the same issuer to a verifier: the time tells them apart.
		Subject: pkix.Name{Organization: []string{trustDomain}, CommonName: "ztun local CA " +
			now.UTC().Format(time.RFC3339)},
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: trustDomain}},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(rootLife),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	der, err := x509.CreateCertificate(rand.Reader, root, root, key.Public(), key)
	if err != nil {
		return fmt.Errorf("new CA certificate: %w", err)
	}
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
	rootPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if err := writeNew(dir, keyFile, 0o600, keyPEM); err != nil {
		return err
	}
	if err := writeNew(dir, rootFile, 0o644, rootPEM); err != nil {
		return errors.Join(err, os.Remove(filepath.Join(dir, keyFile))) // ours: writeNew did not find one
	}
	return nil
}

func existsError(path string) error {
	return fmt.Errorf("%s: %w: refusing to overwrite a CA (remove it first to make a new one)", path, fs.ErrExist)
}

// writeNew makes dir/name with exactly that content and mode: written beside, then linked, so that a reader never sees
// half a file and of two writers one gets an error.
func writeNew(dir, name string, mode fs.FileMode, content []byte) (err error) {
	f, err := os.CreateTemp(dir, "."+name+"-*") // 0600
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(f.Name())) }()
	_, werr := f.Write(content)
	if err := errors.Join(werr, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	path := filepath.Join(dir, name)
	if err := os.Link(f.Name(), path); errors.Is(err, fs.ErrExist) {
		return existsError(path)
	} else if err != nil {
		return err
	}
	return nil
}

// LoadDir reads a CA directory made by InitDir, one of Istio's plug-in layout, or any other with a root-cert.pem and
// a ca-key.pem, such as the test root of ztunnel's sources. The key may be EC or RSA, as PKCS#8, SEC 1 or PKCS#1. A
// key that others than owner and group may read, or the group may write, is taken with a warning (Local.Warnings):
// such directories come out of version control and images. Errors name the file, what is wrong and what to do; that
// of a missing file wraps fs.ErrNotExist.
func LoadDir(dir string) (*Local, error) {
	roots, err := readCerts(dir, rootFile)
	if err != nil {
		return nil, err
	}
	key, open, err := readKey(dir)
	if err != nil {
		return nil, err
	}
	l := &Local{key: key, roots: roots}
	if open != "" {
		l.warnings = append(l.warnings, open)
	}
	own, err := readCerts(dir, certFile)
	switch {
	case err == nil:
		l.cert = own[0]
		if !samePublicKey(l.cert, key) {
			return nil, dirError(dir, keyFile, errors.New("is not the key of "+certFile))
		}
		l.chain = own
		more, err := readCerts(dir, chainFile)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		for _, cert := range more {
			if !bytes.Equal(cert.RawSubject, cert.RawIssuer) && !contains(l.chain, cert) {
				l.chain = append(l.chain, cert)
			}
		}
		if contains(roots, l.cert) {
			l.chain = nil
		}
	case errors.Is(err, fs.ErrNotExist):
		for _, root := range roots {
			if samePublicKey(root, key) {
				l.cert = root
				break
			}
		}
		if l.cert == nil {
			return nil, dirError(dir, keyFile, errors.New("is not the key of any certificate in "+rootFile))
		}
	default:
		return nil, err
	}
	if !l.cert.IsCA || l.cert.KeyUsage != 0 && l.cert.KeyUsage&x509.KeyUsageCertSign == 0 {
		return nil, dirError(dir, rootFile, errors.New("the signing certificate is not allowed to sign (not a CA)"))
	}
	if now := time.Now(); now.After(l.cert.NotAfter) {
		return nil,
			dirError(dir, rootFile, fmt.Errorf("the signing certificate expired at %s",
				l.cert.NotAfter.UTC().Format(time.RFC3339)))
	} else if now.Before(l.cert.NotBefore) {
		return nil, dirError(dir, rootFile, fmt.Errorf("the signing certificate is not valid before %s: is the clock right?",
			l.cert.NotBefore.UTC().Format(time.RFC3339)))
	}
	// A root made by InitDir names its trust domain as SPIFFE wants it (X.509-SVID, section 4.1).
	if uris := l.cert.URIs; len(uris) == 1 && uris[0].Scheme == "spiffe" && uris[0].Path == "" {
		l.trustDomain = uris[0].Host
	}
	return l, nil
}

// dirError says which file of the directory is wrong, why, and how to get a right one.
func dirError(dir, name string, err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		err = pe.Err // the path is said already
	}
	return fmt.Errorf("%s: %w (make a CA with `ztun ca init DIR` in an empty directory)", filepath.Join(dir, name), err)
}

// maxFile bounds what is read: bundles of thousands of roots are smaller.
const maxFile = 4 << 20

func readFile(dir, name string) ([]byte, fs.FileInfo, error) {
	path := filepath.Join(dir, name)
	info, err := os.Stat(path)
	if err != nil {
		return nil, nil, dirError(dir, name, err)
	}
	if !info.Mode().IsRegular() || info.Size() > maxFile {
		return nil, nil, dirError(dir, name, fmt.Errorf("not a regular file of at most %d bytes", maxFile))
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, dirError(dir, name, err)
	}
	return b, info, nil
}

// readCerts reads all certificates of a PEM file: at least one, every one sound.
func readCerts(dir, name string) ([]*x509.Certificate, error) {
	b, _, err := readFile(dir, name)
	if err != nil {
		return nil, err
	}
	certs, err := parseCerts(b)
	if err != nil {
		return nil, dirError(dir, name, err)
	}
	return certs, nil
}

func parseCerts(b []byte) (certs []*x509.Certificate, err error) {
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(certs)+1, err)
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, errNoCert
	}
	return certs, nil
}

var errNoCert = errors.New("no PEM certificate in it")

// readKey reads the signing key; open says who else may read or write it that should not.
func readKey(dir string) (key crypto.Signer, open string, err error) {
	b, info, err := readFile(dir, keyFile)
	if err != nil {
		return nil, "", err
	}
	// Others should not read it, the group not write it: a group that shares the key (Kubernetes' fsGroup) may read.
	if mode := info.Mode().Perm(); mode&0o027 != 0 {
		open = fmt.Sprintf("%s: permissions %04o are too open for a CA key, unless everybody knows it: run chmod 600",
			filepath.Join(dir, keyFile), mode)
	}
	if key, err = parseKey(b); err != nil {
		return nil, "", dirError(dir, keyFile, err)
	}
	return key, open, nil
}

// parseKey takes the first private key of a PEM text: PKCS#8, or what openssl writes by default.
func parseKey(b []byte) (crypto.Signer, error) {
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			return nil, errors.New("no PEM private key in it")
		}
		var key any
		var err error
		switch block.Type {
		case "PRIVATE KEY":
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case "EC PRIVATE KEY":
			key, err = x509.ParseECPrivateKey(block.Bytes)
		case "RSA PRIVATE KEY":
			key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
		case "ENCRYPTED PRIVATE KEY":
			return nil, errors.New("the key is encrypted, which is not supported")
		default:
			continue // EC PARAMETERS and the like
		}
		if err != nil {
			return nil, fmt.Errorf("private key: %w", err)
		}
		signer, ok := key.(crypto.Signer)
		if !ok {
			return nil, fmt.Errorf("a %T cannot sign", key)
		}
		return signer, nil
	}
}

func samePublicKey(cert *x509.Certificate, key crypto.Signer) bool {
	public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	return ok && public.Equal(cert.PublicKey)
}

func contains(certs []*x509.Certificate, cert *x509.Certificate) bool {
	for _, c := range certs {
		if c.Equal(cert) {
			return true
		}
	}
	return false
}
