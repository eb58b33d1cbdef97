package control

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"ztun/tun/replace"
)

// Names in the directory of what was signed.
const (
	issuedDir  = "issued"
	issuedExt  = ".log"  // NODE.log: what a joined node has; of a workload NAMESPACE~NAME.log
	revokedExt = ".left" // NODE.TIME.left: what a node had when it left
	crlFile    = "crl.pem"
)

// Of the revocation list.
const (
	crlLife      = 7 * 24 * time.Hour // until it says that there should be a newer one; nodes obey it all the same
	crlRenew     = 24 * time.Hour
	maxRevoked   = 200_000 // entries, which fit into what nodes read
	compactEvery = time.Hour
)

// signed is a certificate that was signed. A line of the files is its serial number in hex and its end, Unix seconds.
type signed struct {
	serial   string // bytes, big-endian
	notAfter int64
}

// issuedStore remembers which certificates each node has, in files that outlive the process, so that those of a node
// that leaves can be revoked; and it keeps the list of the revoked. Safe for concurrent use.
type issuedStore struct {
	root         string // the control plane's directory
	dir, crlPath string
	limit        int // certificates of one node that have not expired
	sign         func(template *x509.RevocationList) ([]byte, error)

	mu        sync.Mutex
	live      map[string][]signed // by node
	revoked   map[string]signed   // by serial
	listed    time.Time           // when the list was signed
	list      []byte              // DER; nil before the first
	changed   chan struct{}       // closed when there is a new list
	compacted time.Time
	problem   string
}

func newIssuedStore(dir string, limit int, a *authority) *issuedStore {
	return &issuedStore{
		root: dir, dir: filepath.Join(dir, issuedDir), crlPath: filepath.Join(dir, crlFile), limit: limit,
		sign: func(t *x509.RevocationList) ([]byte, error) {
			return x509.CreateRevocationList(rand.Reader, t, a.signer, a.key)
		},
		live: map[string][]signed{}, revoked: map[string]signed{}, changed: make(chan struct{}),
	}
}

// add notes a certificate before its node gets it.
func (s *issuedStore) add(node string, cert *x509.Certificate, now time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.live[node]) >= s.limit {
		s.live[node] = unexpired(s.live[node], now)
	}
	if n := len(s.live[node]); n >= s.limit {
		return fmt.Errorf("node %s has %d certificates that have not expired", node, n)
	}
	c := signed{string(cert.SerialNumber.Bytes()), cert.NotAfter.Unix()}
	if err := appendSigned(s.dir, node, c); err != nil {
		return err
	}
	s.live[node] = append(s.live[node], c)
	return nil
}

// refresh reads what has changed in the files, revokes what nodes have that are not joined, and signs a new list if
// need be. members tells which nodes are joined, and whether that could be read: nobody has left otherwise. It is asked
// while nobody can join or leave.
func (s *issuedStore) refresh(members func() (map[string]bool, bool), now time.Time) error {
	release, err := holdMembers(s.root, serverPatience)
	if err == nil {
		defer release()
		joined, ok := members()
		if !ok {
			return nil
		}
		s.mu.Lock()
		err = s.refreshLocked(joined, now)
		s.mu.Unlock()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.problem = ""
	if err != nil {
		s.problem = err.Error()
	}
	return err
}

func (s *issuedStore) refreshLocked(joined map[string]bool, now time.Time) error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	compact := now.Sub(s.compacted) >= compactEvery
	live, revoked := make(map[string][]signed, len(s.live)), map[string]signed{}
	var problems []error
	for _, e := range entries {
		path := filepath.Join(s.dir, e.Name())
		name, isLog := strings.CutSuffix(e.Name(), issuedExt)
		node := memberOf(name)
		if isLog && joined[node] {
			if had, ok := s.live[node]; ok && !compact {
				live[node] = had
				continue
			}
			list, err := readSigned(path)
			problems = append(problems, err)
			if kept := unexpired(list, now); len(kept) < len(list) && err == nil {
				list, err = kept, writeSigned(path, kept)
				problems = append(problems, err)
			}
			live[node] = list
			continue
		}
		if isLog { // removed without `leave`, or signed for while it left
			left := leftPath(s.dir, node, now)
			if err := os.Rename(path, left); err != nil {
				problems = append(problems, err)
			}
			path = left
		}
		if filepath.Ext(path) != revokedExt {
			continue
		}
		list, err := readSigned(path)
		problems = append(problems, err)
		kept := unexpired(list, now)
		if len(kept) == 0 && err == nil {
			problems = append(problems, os.Remove(path))
		}
		for _, c := range kept {
			revoked[c.serial] = c
		}
	}
	if compact {
		s.compacted = now
	}
	same := len(revoked) == len(s.revoked)
	for serial := range revoked {
		_, had := s.revoked[serial]
		same = same && had
	}
	s.live, s.revoked = live, revoked
	if !same || s.list == nil || now.Sub(s.listed) >= crlRenew {
		problems = append(problems, s.makeList(now))
	}
	return errors.Join(problems...)
}

// makeList signs a list of what is revoked.
func (s *issuedStore) makeList(now time.Time) error {
	all := make([]signed, 0, len(s.revoked))
	for _, c := range s.revoked {
		all = append(all, c)
	}
	slices.SortFunc(all, func(a, b signed) int {
		return cmp.Or(cmp.Compare(b.notAfter, a.notAfter), cmp.Compare(a.serial, b.serial))
	})
	var err error
	if len(all) > maxRevoked { // the longest lived are worth most
		err = fmt.Errorf("%d revoked certificates, of which the list has the %d that live longest", len(all), maxRevoked)
		all = all[:maxRevoked]
	}
	t := &x509.RevocationList{Number: big.NewInt(now.UnixNano()), ThisUpdate: now.Add(-backdate),
		NextUpdate: now.Add(crlLife)}
	for _, c := range all {
		t.RevokedCertificateEntries = append(t.RevokedCertificateEntries, x509.RevocationListEntry{
			SerialNumber: new(big.Int).SetBytes([]byte(c.serial)), RevocationTime: now.Add(-backdate),
		})
	}
	der, signErr := s.sign(t)
	if signErr != nil {
		return errors.Join(err, fmt.Errorf("the revocation list: %w", signErr))
	}
	s.list, s.listed = der, now
	close(s.changed)
	s.changed = make(chan struct{})
	text := pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})
	return errors.Join(err, replace.File(s.crlPath, 0o644, text))
}

// current is the list in DER, nil before there is one, and a channel that is closed when there is a newer one.
func (s *issuedStore) current() ([]byte, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.list, s.changed
}

// RevocationStatus is what `ztun control` has revoked.
type RevocationStatus struct {
	Certificates int       `json:"certificates"` // of nodes that have left, not expired yet
	ListedAt     time.Time `json:"listedAt,omitzero"`
	Problem      string    `json:"problem,omitempty"`
}

func (s *issuedStore) status() RevocationStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	return RevocationStatus{len(s.revoked), s.listed.UTC(), s.problem}
}

func unexpired(list []signed, now time.Time) []signed {
	return slices.DeleteFunc(slices.Clone(list), func(c signed) bool { return c.notAfter < now.Unix() })
}

func leftPath(dir, node string, now time.Time) string {
	return filepath.Join(dir, fmt.Sprintf("%s.%d%s", memberBase(node), now.UnixNano(), revokedExt))
}

// revokeIssued makes what a node has the revoked of a node that has left. A control plane that runs notices it.
func revokeIssued(dir, node string, now time.Time) error {
	dir = filepath.Join(dir, issuedDir)
	err := os.Rename(filepath.Join(dir, memberBase(node)+issuedExt), leftPath(dir, node, now))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func (c signed) line() string { return fmt.Sprintf("%x %d\n", c.serial, c.notAfter) }

// appendSigned adds a line to what a node has. Lines are written whole: a reader skips one that a crash has cut.
func appendSigned(dir, node string, c signed) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(dir, memberBase(node)+issuedExt), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(c.line())
	return errors.Join(err, f.Close())
}

func writeSigned(path string, list []signed) error {
	var b bytes.Buffer
	for _, c := range list {
		b.WriteString(c.line())
	}
	return replace.File(path, 0o600, b.Bytes())
}

// readSigned reads a file of lines and skips what is none.
func readSigned(path string) ([]signed, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var list []signed
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		serial, end, _ := strings.Cut(lines.Text(), " ")
		raw, err := hex.DecodeString(serial)
		notAfter, err2 := strconv.ParseInt(end, 10, 64)
		if err == nil && err2 == nil && len(raw) > 0 && len(raw) <= 20 {
			list = append(list, signed{string(raw), notAfter})
		}
	}
	return list, lines.Err()
}
