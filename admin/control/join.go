package control

import (
	"cmp"
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
	"ztun/tun/replace"
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
	RootFile   = "root-cert.pem"
	TokenFile  = "token"
	CertFile   = "cert-chain.pem"
	KeyFile    = "key.pem"
	BundleFile = "workload.json" // of a workload: which it is, and where the control plane is
)

// DefaultLife is how long a node's client certificate is valid unless JoinOptions say otherwise. Its token does not
// expire.
const DefaultLife = 365 * 24 * time.Hour

// nodeIdentity is the SPIFFE id of every node's proxy, that of ztunnel in an Istio mesh.
func nodeIdentity(trustDomain string) identity.ID {
	return identity.ID{TrustDomain: cmp.Or(trustDomain, defaultTrustDomain), Namespace: "istio-system",
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
	return replace.File(filepath.Join(mesh, "example.yaml"), 0o644,
		[]byte(strings.ReplaceAll(example, "@TRUST_DOMAIN@", trustDomain)))
}

// JoinOptions say who joins: a node, or one workload.
type JoinOptions struct {
	Dir  string // of the control plane
	Node string // its NODE_NAME, to which the credentials are bound
	// Workload is a record of the mesh in place of a node: its uid, NAMESPACE/NAME, or a name that is the only one. The
	// credentials are bound to that record, by its uid.
	Workload string
	Mesh     string        // where the records are; "": mesh in Dir
	Address  string        // the control plane's, for the workload's bundle: https://host:port
	Out      string        // where the credentials go; made if need be (0700). A workload's may be one file: *.json
	Life     time.Duration // of the client certificate; 0: DefaultLife, and for a workload DefaultMaxLife
	Renew    bool          // replace the credentials of who has joined: the old ones end
}

// Join makes credentials for a node or a workload, either of which suffices: a token, and a client certificate with its
// key; and the roots to trust. A running control plane knows them at once. It returns who has joined, by the name that
// the status has for it.
func Join(ctx context.Context, o JoinOptions) (member string, err error) {
	authority, err := ca.LoadDir(filepath.Join(o.Dir, caDir))
	if err != nil {
		return "", err
	}
	member, id, life := o.Node, nodeIdentity(authority.TrustDomain()), DefaultLife
	var bundle *Bundle
	if o.Workload != "" {
		if o.Node != "" {
			return "", errors.New("a node or a workload joins, not both")
		}
		w, err := findRecord(o.Dir, o.Mesh, authority.TrustDomain(), o.Workload)
		if err != nil {
			return "", err
		}
		member, id, life = workloadMember(w), w.Identity(), DefaultMaxLife
		bundle = &Bundle{
			Address: o.Address, UID: w.UID, Namespace: w.Namespace, Name: w.Name, ServiceAccount: w.ServiceAccount,
			TrustDomain: w.TrustDomain, Network: w.Network, IPs: w.Addresses,
		}
	}
	if err := checkMember(member, o.Workload != ""); err != nil {
		return "", err
	}
	release, err := holdMembers(o.Dir, membersPatience)
	if err != nil {
		return "", err
	}
	defer release()
	path := filepath.Join(o.Dir, nodesDir, memberFile(member))
	if _, err := os.Stat(path); err == nil && !o.Renew {
		return "", fmt.Errorf("%s has joined (%s): %w; --renew makes new credentials and ends the old ones",
			memberTitle(member), path, fs.ErrExist)
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	if o.Life != 0 {
		life = o.Life
	}
	c, err := newCredentialSet(ctx, authority, id, life)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(filepath.Join(o.Dir, nodesDir), 0o700); err != nil {
		return "", err
	}
	// The member's copy first: what the control plane accepts must be somewhere.
	if err := c.write(o.Out, bundle); err != nil {
		return "", err
	}
	now := time.Now()
	if err := replaced(o.Dir, member, now); err != nil {
		return "", err
	}
	tokenHash, keyHash := sha256.Sum256([]byte(c.token)), sha256.Sum256(c.chain[0].RawSubjectPublicKeyInfo)
	record := nodeFile{
		Node: member, Created: now.UTC().Truncate(time.Second), Expires: c.chain[0].NotAfter,
		Token: hex.EncodeToString(tokenHash[:]), Key: hex.EncodeToString(keyHash[:]),
		Serial: c.chain[0].SerialNumber.Text(16),
	}
	if bundle != nil {
		record.Workload = bundle.UID
	}
	if err := writeNode(filepath.Join(o.Dir, nodesDir), record); err != nil {
		return "", err
	}
	return member, appendSigned(filepath.Join(o.Dir, issuedDir), member,
		signed{string(c.chain[0].SerialNumber.Bytes()), c.chain[0].NotAfter.Unix()})
}

// credentialSet is what a member gets.
type credentialSet struct {
	chain, roots []*x509.Certificate
	key          []byte // PEM
	token        string
}

func newCredentialSet(ctx context.Context, authority *ca.Local, id identity.ID, life time.Duration) (
	*credentialSet, error) {
	key, csr, err := ca.NewRequest(id)
	if err != nil {
		return nil, err
	}
	c := &credentialSet{}
	if c.chain, c.roots, err = authority.Sign(ctx, id, csr, life); err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	c.key = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	secret := make([]byte, 32)
	if _, err := rand.Read(secret); err != nil {
		return nil, err
	}
	c.token = base64.RawURLEncoding.EncodeToString(secret)
	return c, nil
}

// write puts the credentials where they are to go; bundle is nil for a node.
func (c *credentialSet) write(out string, bundle *Bundle) error {
	files := Files{Root: encodeCerts(c.roots), Cert: encodeCerts(c.chain), Key: c.key, Token: []byte(c.token)}
	if bundle == nil {
		return files.write(out, replace.File)
	}
	bundle.Files = files
	return bundle.Write(out)
}

// replaced revokes the client certificate of a member that joins anew. A node's workloads' certificates stay: they are
// renewed with the new credentials. The members are held.
func replaced(dir, member string, now time.Time) error {
	data, err := os.ReadFile(filepath.Join(dir, nodesDir, memberFile(member)))
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
	return writeSigned(leftPath(filepath.Join(dir, issuedDir), member, now),
		[]signed{{string(serial.Bytes()), old.Expires.Unix()}})
}

// Leave ends the credentials of a node. A running control plane ends the node's streams within seconds, and revokes
// what certificates the node has: the other nodes learn of it by the revocation list that they follow.
func Leave(dir, node string) error {
	if err := checkMember(node, false); err != nil {
		return err
	}
	return leave(dir, node)
}

// LeaveWorkload is Leave for a workload, by any of the names that Join takes; its record may be gone from the mesh. It
// returns who has left.
func LeaveWorkload(dir, name string) (member string, err error) {
	nodes := newNodeStore(filepath.Join(dir, nodesDir))
	nodes.rescan()
	joined, _ := nodes.joined()
	var found []string
	for _, f := range joined {
		ns, short, ok := strings.Cut(f.Node, "/")
		if ok && (name == f.Workload || name == f.Node || name == short && ns != "") {
			found = append(found, f.Node)
		}
	}
	switch len(found) {
	case 0:
		return "", fmt.Errorf("workload %s has not joined: %w", name, fs.ErrNotExist)
	case 1:
		return found[0], leave(dir, found[0])
	}
	return "", fmt.Errorf("%q may be any of %s: say NAMESPACE/NAME", name, strings.Join(found, ", "))
}

func leave(dir, member string) error {
	release, err := holdMembers(dir, membersPatience)
	if err != nil {
		return err
	}
	defer release()
	err = os.Remove(filepath.Join(dir, nodesDir, memberFile(member)))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s has not joined: %w", memberTitle(member), err)
	}
	if err != nil {
		return err
	}
	return revokeIssued(dir, member, time.Now())
}

func encodeCerts(certs []*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}
