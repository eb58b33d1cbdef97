package control

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/metadata"

	"ztun/tun/replace"
)

// Bounds of the credentials.
const (
	maxNodes       = 10_000
	maxToken       = 4096 // bytes of an authorization header
	rescanInterval = 250 * time.Millisecond
	maxNodeFile    = 64 << 10 // bytes
)

// nodeFile is nodes/NAME.json: what is kept of the credentials of a node, or of a workload that has joined by itself
// (NAMESPACE~NAME.json). Hashes alone: who reads it cannot use it.
type nodeFile struct {
	Node     string    `json:"node"`               // a workload's is NAMESPACE/NAME, which no node can be called
	Workload string    `json:"workload,omitempty"` // uid of the one record that the credentials are for; "": a node's
	Created  time.Time `json:"created"`
	Token    string    `json:"tokenSHA256"`         // hex, of the token's text
	Key      string    `json:"publicKeySHA256"`     // hex, of the client certificate's SubjectPublicKeyInfo
	Expires  time.Time `json:"certificateNotAfter"` // for people, and how long a renewed one lives
	Serial   string    `json:"certificateSerial"`   // hex, of the client certificate that Join made
}

type hash [sha256.Size]byte

// nodeStore is the nodes/ directory in memory. Safe for concurrent use.
type nodeStore struct {
	dir string

	mu       sync.Mutex
	scanned  time.Time
	dirTime  time.Time            // the directory's when it was read; zero if it may have changed since unseen
	files    map[string]nodeEntry // by file name
	byToken  map[hash]string      // -> node
	byKey    map[hash]string
	problems []Problem
	unread   bool          // the last scan could not read the directory
	changed  chan struct{} // closed when a credential has gone
}

type nodeEntry struct {
	stamp stamp
	node  nodeFile
	ok    bool
}

func newNodeStore(dir string) *nodeStore {
	return &nodeStore{dir: dir, changed: make(chan struct{})}
}

// rescan reads what has changed in the directory.
func (s *nodeStore) rescan() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rescanLocked(time.Now())
}

// rescanChanged is rescan, if files have come or gone.
func (s *nodeStore) rescanChanged() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.modified().Equal(s.dirTime) {
		s.rescanLocked(time.Now())
	}
}

// renewed notes the end of the new client certificate of c's node, whose key is the old one's. It reads anew who c is:
// what was known would bring back a node that has left meanwhile, or undo that it has joined again.
func (s *nodeStore) renewed(c *caller, notAfter time.Time) error {
	release, err := holdMembers(filepath.Dir(s.dir), serverPatience)
	if err != nil {
		return err
	}
	defer release()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rescanLocked(time.Now())
	f, ok := s.files[memberFile(c.node)]
	if !ok || !f.ok || !s.validLocked(c) {
		return fmt.Errorf("node %s has left, or joined again", c.node)
	}
	f.node.Expires = notAfter
	if err := writeNode(s.dir, f.node); err != nil {
		return err
	}
	s.rescanLocked(time.Now())
	return nil
}

func writeNode(dir string, f nodeFile) error {
	return replace.JSON(filepath.Join(dir, memberFile(f.Node)), f)
}

func (s *nodeStore) rescanLocked(now time.Time) {
	s.scanned, s.dirTime = now, s.modified()
	if now.Sub(s.dirTime) < 100*time.Millisecond { // more than what its clock tells apart
		s.dirTime = time.Time{}
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		// Not a reason to turn every node away: keep what is known.
		s.problems, s.unread = []Problem{{File: "nodes", Text: plain(err).Error()}}, true
		return
	}
	files := make(map[string]nodeEntry, len(entries))
	s.problems, s.unread = nil, false
	for _, e := range entries {
		if filepath.Ext(e.Name()) != ".json" || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		if len(files) == maxNodes {
			s.problems = append(s.problems,
				Problem{File: "nodes", Text: fmt.Sprintf("more than %d files: the rest is ignored", maxNodes)})
			break
		}
		files[e.Name()] = s.load(e)
	}
	byToken, byKey := make(map[hash]string, len(files)), make(map[hash]string, len(files))
	for _, name := range slices.Sorted(maps.Keys(files)) {
		f := files[name]
		if !f.ok {
			s.problems = append(s.problems,
				Problem{File: "nodes/" + name, Text: "cannot be used: run ztun control join --renew for it"})
			continue
		}
		token, key := enter(byToken, f.node.Token, f.node.Node), enter(byKey, f.node.Key, f.node.Node)
		if !token || !key {
			s.problems = append(s.problems,
				Problem{File: "nodes/" + name,
					Text: "has a credential of another node, for which it counts: run ztun control join --renew for it"})
		}
	}
	lost := lacks(byToken, s.byToken) || lacks(byKey, s.byKey)
	s.files, s.byToken, s.byKey = files, byToken, byKey
	if lost {
		close(s.changed)
		s.changed = make(chan struct{})
	}
}

// modified is when a file of the directory was last made or removed.
func (s *nodeStore) modified() time.Time {
	info, err := os.Stat(s.dir)
	if err != nil {
		return time.Time{}
	}
	return info.ModTime()
}

// load reads one file, or takes it over from the last scan. Join replaces files as a whole, so a stamp tells.
func (s *nodeStore) load(e fs.DirEntry) nodeEntry {
	info, err := e.Info()
	if err != nil {
		return nodeEntry{}
	}
	now := stamp{info.Size(), info.ModTime()}
	if old, ok := s.files[e.Name()]; ok && old.stamp == now && time.Since(now.mtime) > 2*time.Second {
		return old
	}
	f := nodeEntry{stamp: now}
	if now.size > maxNodeFile {
		return f
	}
	data, err := os.ReadFile(filepath.Join(s.dir, e.Name()))
	if err == nil {
		f.node, f.ok = parseNode(e.Name(), data)
	}
	return f
}

// parseNode reads the file of a node, whose name must be that of the node; one without a credential is none.
func parseNode(name string, data []byte) (nodeFile, bool) {
	var f nodeFile
	if json.Unmarshal(data, &f) != nil || memberFile(f.Node) != name || checkMember(f.Node, f.Workload != "") != nil {
		return nodeFile{}, false
	}
	for _, text := range []string{f.Token, f.Key} {
		if _, ok := parseHash(text); !ok && text != "" {
			return nodeFile{}, false
		}
	}
	return f, f.Token != "" || f.Key != ""
}

func parseHash(text string) (h hash, ok bool) {
	if len(text) != 2*len(h) {
		return h, false
	}
	_, err := hex.Decode(h[:], []byte(text))
	return h, err == nil
}

// enter notes whose a credential is; false: another node has it.
func enter(m map[hash]string, text, node string) bool {
	h, ok := parseHash(text)
	if !ok {
		return true // there is none
	}
	if _, taken := m[h]; taken {
		return false
	}
	m[h] = node
	return true
}

// lacks reports whether something of old is not in m.
func lacks(m, old map[hash]string) bool {
	for h, node := range old {
		if m[h] != node {
			return true
		}
	}
	return false
}

// find looks a hash up; one that is unknown may belong to a node that has just joined.
func (s *nodeStore) find(h hash, byKey bool) (string, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	look := func() (string, bool) {
		m := s.byToken
		if byKey {
			m = s.byKey
		}
		node, ok := m[h]
		return node, ok
	}
	node, ok := look()
	if ok {
		return node, ok
	}
	if now := time.Now(); now.Sub(s.scanned) >= rescanInterval || !s.modified().Equal(s.dirTime) {
		s.rescanLocked(now)
		node, ok = look()
	}
	return node, ok
}

// watch returns a channel that is closed when credentials have gone.
func (s *nodeStore) watch() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// members are the nodes that have a file, be it a good one; false if that cannot be told.
func (s *nodeStore) members() (map[string]bool, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.unread || len(s.files) >= maxNodes {
		return nil, false
	}
	m := make(map[string]bool, len(s.files))
	for name := range s.files {
		m[memberOf(name)] = true
	}
	return m, true
}

// joined lists the nodes that have credentials, by name.
func (s *nodeStore) joined() (nodes []nodeFile, problems []Problem) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.files {
		if f.ok {
			nodes = append(nodes, f.node)
		}
	}
	slices.SortFunc(nodes, func(a, b nodeFile) int { return strings.Compare(a.Node, b.Node) })
	return nodes, slices.Clone(s.problems)
}

// file is what is kept of a node.
func (s *nodeStore) file(node string) (nodeFile, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.files[memberFile(node)]
	return f.node, f.ok
}

// caller is who makes a call.
type caller struct {
	node     string
	workload string // uid of the one record that it may be; "": it is a node
	how      string // "token" or "certificate", or both
	token    hash
	key      hash
	hasToken bool
	hasKey   bool
	certErr  error // why the client certificate that it showed does not count; its token does
}

// valid reports whether the credentials that the caller showed are still those of its node.
func (s *nodeStore) valid(c *caller) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.validLocked(c)
}

func (s *nodeStore) validLocked(c *caller) bool {
	return (!c.hasToken || s.byToken[c.token] == c.node) && (!c.hasKey || s.byKey[c.key] == c.node)
}

// authenticate finds out who is calling, from the headers and the connection of a call.
func (s *nodeStore) authenticate(ctx context.Context, md metadata.MD) (*caller, error) {
	c := &caller{}
	if token, ok := bearer(md); ok {
		c.token, c.hasToken, c.how = sha256.Sum256([]byte(token)), true, "token"
		if c.node, ok = s.find(c.token, false); !ok {
			return nil, errors.New("the token is unknown (was the node removed, or joined anew?)")
		}
	}
	cert, err := clientCert(ctx, time.Now())
	switch {
	case err != nil && !c.hasToken:
		return nil,
			fmt.Errorf("the client certificate does not count (%w) and there is no token: run ztun control join --renew for "+
				"this node", err)
	case err != nil:
		c.certErr = err
	case cert != nil:
		c.key = sha256.Sum256(cert.RawSubjectPublicKeyInfo)
		node, ok := s.find(c.key, true)
		switch {
		case ok && c.hasToken && node != c.node:
			return nil, errors.New("the token and the client certificate are of different nodes")
		case ok:
			c.node, c.hasKey = node, true
			c.how = strings.TrimPrefix(c.how+"+certificate", "+")
		case !c.hasToken:
			return nil,
				errors.New(
					"the client certificate is not one that ztun control join made (or the node was removed, or joined anew)")
		}
	}
	if !c.hasToken && !c.hasKey {
		return nil, errors.New("neither a bearer token nor a client certificate")
	}
	f, ok := s.file(c.node)
	if !ok {
		return nil, errors.New("the credentials have just been removed")
	}
	c.workload = f.Workload
	return c, nil
}

func bearer(md metadata.MD) (string, bool) {
	for _, v := range md.Get("authorization") {
		if len(v) > len("Bearer ") && len(v) <= maxToken && strings.EqualFold(v[:len("Bearer ")], "Bearer ") {
			return v[len("Bearer "):], true
		}
	}
	return "", false
}

// clientCert returns the connection's client certificate, nil if it has none, or why it does not count. TLS has seen
// that the client has its key; whose it is and until when is looked at here, so that a token can stand in.
func clientCert(ctx context.Context, now time.Time) (*x509.Certificate, error) {
	i := infoOf(ctx)
	switch {
	case len(i.State.PeerCertificates) == 0:
		return nil, nil
	case now.After(i.State.PeerCertificates[0].NotAfter):
		return nil, fmt.Errorf("it expired at %s", stampText(i.State.PeerCertificates[0].NotAfter))
	case i.certErr != nil:
		return nil, i.certErr
	}
	return i.State.PeerCertificates[0], nil
}
