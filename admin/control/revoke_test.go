package control

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"ztun/admin/ca"
	"ztun/admin/istiod"
	"ztun/proxy/identity"
	"ztun/tun/replace"
)

// follower is a node's side of the revocation list.
type follower struct {
	path string
	rev  *identity.Revocation
}

// nodeConnector is connector with both credentials.
func (w *world) nodeConnector(node string) *istiod.Connector {
	w.t.Helper()
	dir := w.creds(node)
	c, err := istiod.New(istiod.Options{
		Address: "https://" + w.addr, Roots: istiod.Roots{File: filepath.Join(dir, RootFile)},
		Token:      istiod.Token{File: filepath.Join(dir, TokenFile)},
		ClientCert: filepath.Join(dir, CertFile), ClientKey: filepath.Join(dir, KeyFile),
		Logger: slog.New(slog.DiscardHandler),
	})
	check(w.t, err)
	return c
}

// revocations follows the list as a daemon does, until the test ends.
func (w *world) revocations(node string) *follower {
	w.t.Helper()
	f := &follower{path: filepath.Join(w.t.TempDir(), "crl.pem"), rev: &identity.Revocation{}}
	file := ca.NewCRLFile("", f.rev, nil, f.path)
	r := ca.NewRevocations(ca.RevocationsOptions{Connector: w.nodeConnector(node), Path: f.path, Put: func() {
		file.Load()
	}})
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	work.Go(func() { r.Run(ctx) })
	w.t.Cleanup(func() { cancel(); work.Wait() })
	return f
}

// serials are the serial numbers that a list in PEM has, which must be of this CA.
func (w *world) serials(path string) []string {
	w.t.Helper()
	text, err := os.ReadFile(path)
	check(w.t, err)
	block, _ := pem.Decode(text)
	if block == nil {
		w.t.Fatalf("%s is not PEM", path)
	}
	list, err := x509.ParseRevocationList(block.Bytes)
	check(w.t, err)
	check(w.t, list.CheckSignatureFrom(w.srv.authority.signer))
	var out []string
	for _, e := range list.RevokedCertificateEntries {
		out = append(out, e.SerialNumber.Text(16))
	}
	slices.Sort(out)
	return out
}

func (w *world) joinSerial(node string) string {
	w.t.Helper()
	text, err := os.ReadFile(filepath.Join(w.creds(node), CertFile))
	check(w.t, err)
	block, _ := pem.Decode(text)
	cert, err := x509.ParseCertificate(block.Bytes)
	check(w.t, err)
	return cert.SerialNumber.Text(16)
}

// workload is the serial number of a certificate that the node gets for a workload.
func (w *world) workload(node, id string) string {
	w.t.Helper()
	chain, _ := w.workloadCert(node, id)
	cert, err := x509.ParseCertificate(chain[0])
	check(w.t, err)
	return cert.SerialNumber.Text(16)
}

func sorted(l ...string) string { slices.Sort(l); return strings.Join(l, " ") }

// TestLeaveRevokes: what a node that leaves has is on the list, which the others get without asking again; it stays
// there when the control plane starts anew and when the node joins again; and nobody else's is.
func TestLeaveRevokes(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": workloadsYAML("x:10.0.0.1:node-a", "y:10.0.0.2:node-b")}, nil)
	const x, y = "spiffe://cluster.local/ns/ns/sa/sa-x", "spiffe://cluster.local/ns/ns/sa/sa-y"
	first := w.joinSerial("node-a")
	a1, a2, b1 := w.workload("node-a", x), w.workload("node-a", x), w.workload("node-b", y)
	node := w.revocations("node-b")
	eventually(t, "the first list", func() bool { return node.rev.CRL() != nil })
	equal(t, "revoked at first", len(w.serials(node.path)), 0)
	check(t, Leave(w.dir, "node-a"))
	want := sorted(first, a1, a2)
	eventually(t, "the list", func() bool {
		return strings.Join(w.serials(node.path), " ") == want && node.rev.CRL().Entries() == 3
	})
	equal(t, "for others", strings.Join(w.serials(filepath.Join(w.dir, crlFile)), " "), want)
	equal(t, "status", w.srv.Status().Revoked.Certificates, 3)
	if strings.Contains(want, b1) {
		t.Fatal("the bystander's certificate is revoked")
	}

	// The node comes back with other credentials: what it had stays revoked, what it gets is good.
	w.join("node-a")
	a3 := w.workload("node-a", x)
	second := w.joinSerial("node-a")
	time.Sleep(quiet)
	equal(t, "joined again", strings.Join(w.serials(node.path), " "), want)

	check(t, w.stop())
	l := defaultLimits()
	l.rescan = 50 * time.Millisecond
	w.serve(l, w.addr)
	again := w.revocations("node-b")
	eventually(t, "the list after a restart", func() bool { return again.rev.CRL() != nil })
	equal(t, "after a restart", strings.Join(w.serials(again.path), " "), want)

	// Joining anew ends the client certificate, not the workloads'.
	w.join("node-a")
	want = sorted(first, a1, a2, second)
	for _, f := range []*follower{node, again} {
		eventually(t, "renewed", func() bool { return strings.Join(w.serials(f.path), " ") == want })
	}
	// Removed by hand.
	third := w.joinSerial("node-a")
	check(t, os.Remove(filepath.Join(w.dir, nodesDir, "node-a.json")))
	want = sorted(first, a1, a2, second, a3, third)
	eventually(t, "removed by hand", func() bool { return strings.Join(w.serials(again.path), " ") == want })
	// Left and joined again before anybody has looked.
	check(t, Leave(w.dir, "node-b"))
	w.join("node-b")
	eventually(t, "left for a moment", func() bool {
		return slices.Contains(w.serials(filepath.Join(w.dir, crlFile)), b1)
	})
}

// A directory of nodes that cannot be read is no reason to revoke what they have; a file that cannot, neither.
func TestUnreadableNodesKeepTheirs(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": workloadsYAML("x:10.0.0.1:node-a")}, nil)
	w.workload("node-a", "spiffe://cluster.local/ns/ns/sa/sa-x")
	check(t, replace.File(filepath.Join(w.dir, nodesDir, "node-a.json"), 0o600, []byte("{")))
	eventually(t, "noticed", func() bool { return len(w.srv.Status().Problems) == 1 })
	dir := filepath.Join(w.dir, nodesDir)
	check(t, os.Rename(dir, dir+".away"))
	eventually(t, "noticed", func() bool { p := w.srv.Status().Problems; return len(p) == 1 && p[0].File == "nodes" })
	time.Sleep(quiet)
	equal(t, "revoked", w.srv.Status().Revoked.Certificates, 0)
	check(t, w.stop())
	l := defaultLimits()
	l.rescan = 10 * time.Millisecond
	w.serve(l, w.addr)
	time.Sleep(quiet)
	equal(t, "revoked after a start", w.srv.Status().Revoked.Certificates, 0)
	check(t, os.Rename(dir+".away", dir))
	check(t, Leave(w.dir, "node-a"))
	eventually(t, "revoked", func() bool { return w.srv.Status().Revoked.Certificates == 2 })
}

// TestJoinsWhileLookedAt: a node that joins again just after the control plane has read who is joined keeps what it
// got: nobody joins or leaves while it is looked what to revoke.
func TestJoinsWhileLookedAt(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": workloadsYAML("x:10.0.0.1:node-a")}, nil)
	w.join("node-b")
	check(t, Leave(w.dir, "node-b"))
	w.srv.revoke()
	done := make(chan struct{})
	check(t, w.srv.issued.refresh(func() (map[string]bool, bool) {
		w.srv.nodes.rescan()
		members, ok := w.srv.nodes.members()
		go func() {
			defer close(done)
			w.join("node-b")
		}()
		select {
		case <-done:
			t.Error("a node joined while it was looked what to revoke")
		case <-time.After(quiet):
		}
		return members, ok
	}, time.Now()))
	<-done
	w.srv.revoke()
	if got := w.serials(filepath.Join(w.dir, crlFile)); slices.Contains(got, w.joinSerial("node-b")) {
		t.Error("what node-b got when it joined again is revoked")
	}
}

// TestLeavesWhileRenewed: a node that leaves, or joins again, just before the end of its new certificate is noted
// does not come back with its old credentials.
func TestLeavesWhileRenewed(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": workloadsYAML("x:10.0.0.1:node-a")}, nil)
	s := newNodeStore(filepath.Join(w.dir, nodesDir))
	s.rescan()
	c := &caller{node: "node-a", token: sha256.Sum256([]byte(w.token("node-a"))), hasToken: true}
	if !s.valid(c) {
		t.Fatal("the token does not count")
	}
	renewed := func(when string) {
		t.Helper()
		if err := s.renewed(c, time.Now()); err == nil || !strings.Contains(err.Error(), "has left, or joined again") {
			t.Fatal(when, err)
		}
	}
	w.join("node-a")
	path := filepath.Join(w.dir, nodesDir, "node-a.json")
	before, err := os.ReadFile(path)
	check(t, err)
	renewed("joined again")
	after, err := os.ReadFile(path)
	check(t, err)
	equal(t, "the record", string(after), string(before))
	check(t, Leave(w.dir, "node-a"))
	renewed("left")
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Error("the node is back:", err)
	}
}

// TestMembersAreHeld: who keeps the members for ever is named, and neither stops the control plane nor hides who has
// left.
func TestMembersAreHeld(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": workloadsYAML("x:10.0.0.1:node-a")}, nil)
	release, err := holdMembers(w.dir, time.Second)
	check(t, err)
	if _, err := holdMembers(w.dir, time.Millisecond); err == nil ||
		!strings.Contains(err.Error(), "is held by another `ztun control`") {
		t.Fatal(err)
	}
	check(t, os.Remove(filepath.Join(w.dir, nodesDir, "node-a.json")))
	w.srv.revoke()
	if members, ok := w.srv.nodes.members(); !ok || members["node-a"] {
		t.Error("node-a counts as joined", members, ok)
	}
	if problem := w.srv.Status().Revoked.Problem; !strings.Contains(problem, "is held by") {
		t.Error(problem)
	}
	release()
	eventually(t, "revoked", func() bool {
		w.srv.revoke()
		st := w.srv.Status().Revoked
		return st.Problem == "" && st.Certificates == 1
	})
}

func TestIssuedStore(t *testing.T) {
	dir := t.TempDir()
	check(t, Init(filepath.Join(dir, "c"), "cluster.local"))
	dir = filepath.Join(dir, "c")
	a, err := loadAuthority(t.Context(), filepath.Join(dir, caDir))
	check(t, err)
	now := time.Now()
	s := newIssuedStore(dir, 3, a)
	everybody := func() (map[string]bool, bool) { return map[string]bool{"n": true, "other": true}, true }
	withoutN := func() (map[string]bool, bool) { return map[string]bool{"other": true}, true }
	check(t, s.refresh(everybody, now))
	cert := func(n int, life time.Duration) *x509.Certificate {
		c, err := a.issueServer([]string{fmt.Sprint(n)}, life)
		check(t, err)
		return c.Leaf
	}
	check(t, s.add("n", cert(1, time.Minute), now))
	check(t, s.add("n", cert(2, time.Hour), now))
	check(t, s.add("n", cert(3, time.Hour), now))
	if err := s.add("n", cert(4, time.Hour), now); err == nil ||
		!strings.Contains(err.Error(), "node n has 3 certificates") {
		t.Fatal(err)
	}
	check(t, s.add("other", cert(4, time.Hour), now))
	later := now.Add(2 * time.Minute) // one has expired and makes room
	check(t, s.add("n", cert(4, 2*time.Hour), later))
	// A line that a crash has cut, and nonsense, are skipped.
	path := filepath.Join(dir, issuedDir, "n.log")
	text, err := os.ReadFile(path)
	check(t, err)
	check(t, os.WriteFile(path, append(text, "zz 1\n\nabc\n12"...), 0o600))
	s = newIssuedStore(dir, 3, a)
	check(t, s.refresh(everybody, later))
	equal(t, "read anew", len(s.live["n"]), 3)
	text, err = os.ReadFile(path)
	check(t, err)
	equal(t, "expired lines are gone", strings.Count(string(text), "\n"), 3)
	// It leaves; what has expired since goes from the list, and the file with the last of it.
	check(t, s.refresh(withoutN, later))
	equal(t, "revoked", s.status().Certificates, 3)
	check(t, s.refresh(withoutN, now.Add(90*time.Minute)))
	equal(t, "revoked", s.status().Certificates, 1)
	check(t, s.refresh(everybody, now.Add(3*time.Hour)))
	equal(t, "revoked", s.status().Certificates, 0)
	left, err := filepath.Glob(filepath.Join(dir, issuedDir, "*"+revokedExt))
	check(t, err)
	equal(t, "files left", len(left), 0)
	// A list is signed anew before it is old.
	list, changed := s.current()
	check(t, s.refresh(everybody, now.Add(3*time.Hour+crlRenew)))
	<-changed
	if next, _ := s.current(); string(next) == string(list) {
		t.Fatal("the same list")
	}
}

// TestExpiredClientCertificate: a node whose client certificate has expired goes on by its token; the log and the
// status say so. Without a token it is told why.
func TestExpiredClientCertificate(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": workloadsYAML("x:10.0.0.1:node-a")}, nil)
	w.expire("node-a")
	cc := w.dial(w.tls("node-a"))
	c := w.open(cc, withToken(context.Background(), w.token("node-a")), "node-a")
	c.begin(typeAddress, nil)
	equal(t, "by token", names(c.recv()), "u/x")
	n := w.srv.Status().Nodes[0]
	if n.Auth != "token" || !strings.Contains(n.CertificateProblem, "expired at") ||
		n.CertificateNotAfter.After(time.Now()) {
		t.Fatalf("%+v", n)
	}
	var table strings.Builder
	st := w.srv.Status()
	check(t, st.WriteTable(&table))
	if !strings.Contains(table.String(), "node-a: its client certificate expired at") {
		t.Error(table.String())
	}
	if !strings.Contains(w.log.String(), "client certificate does not count, its token does") {
		t.Error(w.log.String())
	}
	c = w.open(cc, context.Background(), "node-a")
	c.begin(typeAddress, nil)
	c.fails(codes.Unauthenticated, "the client certificate does not count (it expired at")

	// It renews the certificate by its token, and shows the new one from then on.
	own := ca.NewOwn(ca.OwnOptions{Connector: w.nodeConnector("node-a"),
		CertFile: filepath.Join(w.creds("node-a"), CertFile), KeyFile: filepath.Join(w.creds("node-a"), KeyFile)})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); own.Run(ctx) }()
	defer func() { cancel(); <-done }()
	eventually(t, "renewed", func() bool { return w.srv.Status().Nodes[0].CertificateNotAfter.After(time.Now()) })
	var byCert *client
	eventually(t, "written", func() bool { return w.tls("node-a").Certificates[0].Leaf.NotAfter.After(time.Now()) })
	byCert = w.open(w.dial(w.tls("node-a")), context.Background(), "node-a")
	byCert.begin(typeAddress, nil)
	equal(t, "by certificate", names(byCert.recv()), "u/x")
	// A join certificate is renewed for the node's own key alone, and for a year at most.
	out, err := w.sign(cc, "node-a", signRequest(w.ownCSR("node-a"), "", int64(10*DefaultLife/time.Second)))
	check(t, err)
	block, _ := pem.Decode([]byte(out.CertChain[0]))
	cert, err := x509.ParseCertificate(block.Bytes)
	check(t, err)
	equal(t, "life", time.Until(cert.NotAfter).Round(time.Hour), DefaultLife)
	_, text := csr(t, "spiffe://cluster.local/ns/istio-system/sa/ztunnel")
	_, err = w.sign(cc, "node-a", signRequest(text, "", int64(DefaultLife/time.Second)))
	wantStatus(t, err, codes.InvalidArgument, "greater than the max allowed TTL 2160h0m0s")
}

// A certificate whose life has just begun is left alone.
func TestOwnCertificateNotDue(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": workloadsYAML("x:10.0.0.1:node-a")}, nil)
	dir := w.creds("node-a")
	before, err := os.ReadFile(filepath.Join(dir, CertFile))
	check(t, err)
	own := ca.NewOwn(ca.OwnOptions{Connector: w.nodeConnector("node-a"), CertFile: filepath.Join(dir, CertFile),
		KeyFile: filepath.Join(dir, KeyFile)})
	ctx, cancel := context.WithTimeout(t.Context(), quiet)
	defer cancel()
	check(t, own.Run(ctx))
	after, err := os.ReadFile(filepath.Join(dir, CertFile))
	check(t, err)
	if string(before) != string(after) || w.srv.Status().Counters["signed"] != 0 {
		t.Fatal("it was renewed")
	}
}

// expire replaces a node's client certificate by one for the same key that has expired.
func (w *world) expire(node string) {
	w.t.Helper()
	a, err := loadAuthority(w.t.Context(), filepath.Join(w.dir, caDir))
	check(w.t, err)
	path := filepath.Join(w.creds(node), CertFile)
	old := w.tls(node).Certificates[0].Leaf
	t := *old
	t.SerialNumber, t.NotBefore, t.NotAfter = nil, time.Now().Add(-2*time.Hour), time.Now().Add(-time.Minute)
	der, err := x509.CreateCertificate(rand.Reader, &t, a.signer, old.PublicKey, a.key)
	check(w.t, err)
	check(w.t, replace.File(path, 0o644, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	s := newNodeStore(filepath.Join(w.dir, nodesDir))
	s.rescan()
	check(w.t, s.renewed(&caller{node: node}, t.NotAfter))
	w.srv.nodes.rescan()
}

// ownCSR is a request for the key of a node's client certificate.
func (w *world) ownCSR(node string) string {
	w.t.Helper()
	return w.ownCSROf(node, nodeIdentity("cluster.local").String())
}

func (w *world) ownCSROf(member, name string) string {
	w.t.Helper()
	pair := w.tls(member).Certificates[0]
	id, err := identity.Parse(name)
	check(w.t, err)
	san, err := identity.SANExtension(id)
	check(w.t, err)
	der, err := x509.CreateCertificateRequest(rand.Reader,
		&x509.CertificateRequest{ExtraExtensions: []pkix.Extension{san}}, pair.PrivateKey)
	check(w.t, err)
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}
