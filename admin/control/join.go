package control

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	_ "embed"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"time"

	"ztun/admin/ca"
	"ztun/proxy/identity"
)

// What is where in the directory.
const (
	caDir      = "ca"
	meshDir    = "mesh"
	nodesDir   = "nodes"
	socketName = "control.sock"
	lockName   = "control.lock"
)

// What Join writes.
const (
	RootFile  = "root-cert.pem"
	TokenFile = "token"
	CertFile  = "cert-chain.pem"
	KeyFile   = "key.pem"
)

// DefaultLife is how long a node's client certificate is valid unless JoinOptions say otherwise. Its token does not
// expire.
const DefaultLife = 365 * 24 * time.Hour

// nodeIdentity is the SPIFFE id of every node's proxy, that of ztunnel in an Istio mesh.
func nodeIdentity(trustDomain string) identity.ID {
	return identity.ID{TrustDomain: or(trustDomain, defaultTrustDomain), Namespace: "istio-system",
		ServiceAccount: "ztunnel"}
}

// example is the file that Init writes, but for the trust domain.
//
//go:embed example.yaml
var example string

// Init makes the directory of a control plane: a new CA for the trust domain, an example of the mesh, and room for
// nodes. If there is a CA already nothing is changed and the error wraps fs.ErrExist.
func Init(dir, trustDomain string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := ca.InitDir(filepath.Join(dir, caDir), trustDomain); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(dir, nodesDir), 0o700); err != nil {
		return err
	}
	mesh := filepath.Join(dir, meshDir)
	if err := os.MkdirAll(mesh, 0o755); err != nil {
		return err
	}
	if l, err := os.ReadDir(mesh); err != nil || len(l) > 0 {
		return err // a mesh that is there already
	}
	return ca.WriteFile(filepath.Join(mesh, "example.yaml"), 0o644,
		[]byte(strings.ReplaceAll(example, "@TRUST_DOMAIN@", trustDomain)))
}

// JoinOptions say who joins.
type JoinOptions struct {
	Dir   string        // of the control plane
	Node  string        // its NODE_NAME, to which the credentials are bound
	Out   string        // where the credentials go; made if need be (0700)
	Life  time.Duration // of the client certificate; 0: DefaultLife
	Renew bool          // replace the credentials of a node that has joined: the old ones end
}

// Join makes credentials for a node, either of which suffices: a token, and a client certificate with its key; and the
// roots to trust. A running control plane knows them at once.
func Join(ctx context.Context, o JoinOptions) error {
	if err := checkNodeName(o.Node); err != nil {
		return err
	}
	path := filepath.Join(o.Dir, nodesDir, o.Node+".json")
	if _, err := os.Stat(path); err == nil && !o.Renew {
		return fmt.Errorf("node %s has joined (%s): %w; --renew makes new credentials and ends the old ones", o.Node, path,
			fs.ErrExist)
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	authority, err := ca.LoadDir(filepath.Join(o.Dir, caDir))
	if err != nil {
		return err
	}
	if o.Life == 0 {
		o.Life = DefaultLife
	}
	id := nodeIdentity(authority.TrustDomain())
	key, csr, err := ca.NewRequest(id)
	if err != nil {
		return err
	}
	chain, roots, err := authority.Sign(ctx, id, csr, o.Life)
	if err != nil {
		return err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	secret := make([]byte, 32)
	if _, err := rand.Read(secret); err != nil {
		return err
	}
	token := base64.RawURLEncoding.EncodeToString(secret)
	tokenHash, keyHash := sha256.Sum256([]byte(token)), sha256.Sum256(chain[0].RawSubjectPublicKeyInfo)
	now := time.Now()
	record := nodeFile{
		Node: o.Node, Created: now.UTC().Truncate(time.Second), Expires: chain[0].NotAfter,
		Token: hex.EncodeToString(tokenHash[:]), Key: hex.EncodeToString(keyHash[:]), Serial: chain[0].SerialNumber.Text(16),
	}
	if err := os.MkdirAll(o.Out, 0o700); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(o.Dir, nodesDir), 0o700); err != nil {
		return err
	}
	// The node's copy first: what the control plane accepts must be somewhere.
	for _, f := range []struct {
		path string
		mode fs.FileMode
		data []byte
	}{
		{filepath.Join(o.Out, RootFile), 0o644, encodeCerts(roots)},
		{filepath.Join(o.Out, CertFile), 0o644, encodeCerts(chain)},
		{filepath.Join(o.Out, KeyFile), 0o600, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})},
		{filepath.Join(o.Out, TokenFile), 0o600, []byte(token)},
	} {
		if err := ca.WriteFile(f.path, f.mode, f.data); err != nil {
			return err
		}
	}
	if err := replaced(o.Dir, o.Node, now); err != nil {
		return err
	}
	if err := writeNode(filepath.Join(o.Dir, nodesDir), record); err != nil {
		return err
	}
	return appendSigned(filepath.Join(o.Dir, issuedDir), o.Node, signed{string(chain[0].SerialNumber.Bytes()),
		chain[0].NotAfter.Unix()})
}

// replaced revokes the client certificate of a node that joins anew. Its workloads' certificates stay: they are renewed
// with the new credentials.
func replaced(dir, node string, now time.Time) error {
	data, err := os.ReadFile(filepath.Join(dir, nodesDir, node+".json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var old nodeFile
	serial := new(big.Int)
	if json.Unmarshal(data, &old) != nil {
		return nil // what cannot be read has been reported, and is what --renew is for
	}
	if _, ok := serial.SetString(old.Serial, 16); !ok || old.Expires.Before(now) {
		return nil
	}
	if err := os.MkdirAll(filepath.Join(dir, issuedDir), 0o700); err != nil {
		return err
	}
	return writeSigned(leftPath(filepath.Join(dir, issuedDir), node, now),
		[]signed{{string(serial.Bytes()), old.Expires.Unix()}})
}

// Leave ends the credentials of a node. A running control plane ends the node's streams within seconds, and revokes
// what certificates the node has: the other nodes learn of it by the revocation list that they follow.
func Leave(dir, node string) error {
	if err := checkNodeName(node); err != nil {
		return err
	}
	err := os.Remove(filepath.Join(dir, nodesDir, node+".json"))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("node %s has not joined: %w", node, err)
	}
	if err != nil {
		return err
	}
	return revokeIssued(dir, node, time.Now())
}

// checkNodeName takes what can be both a Kubernetes node and a file.
func checkNodeName(name string) error {
	ok := len(name) > 0 && len(name) <= 200 && name[0] != '.' && name[0] != '-'
	for _, c := range []byte(name) {
		ok = ok && (c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '-' || c == '_')
	}
	if !ok {
		return fmt.Errorf("node name %q: want up to 200 letters, digits, dots, dashes and underscores", name)
	}
	return nil
}

func encodeCerts(certs []*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}
