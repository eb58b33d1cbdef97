package control

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"ztun/admin/ca"
	"ztun/admin/pb/citadelpb"
	"ztun/admin/pb/discoverypb"
	"ztun/proxy/identity"
)

// joinWorkload makes the bundle of a workload, where creds(member) finds it.
func (w *world) joinWorkload(name, member string) *Bundle {
	w.t.Helper()
	out := w.creds(member)
	got, err := Join(w.t.Context(), JoinOptions{
		Dir: w.dir, Workload: name, Out: out, Renew: true, Address: "https://" + w.addr,
	})
	check(w.t, err)
	equal(w.t, "member", got, member)
	b, err := ReadBundle(out)
	check(w.t, err)
	return b
}

// ids are the identities of the leaf of an answer.
func ids(t *testing.T, out *citadelpb.IstioCertificateResponse) (*x509.Certificate, string) {
	t.Helper()
	block, _ := pem.Decode([]byte(out.CertChain[0]))
	cert, err := x509.ParseCertificate(block.Bytes)
	check(t, err)
	return cert, strings.Join(identity.URIs(cert.Extensions), " ")
}

const workloadsOfTwo = `
- {uid: "u/lap", name: lap, namespace: ns, serviceAccount: sa-lap, workloadIps: [10.9.0.1, "fd00::1"],
   protocol: HBONE, services: {}}
- {uid: "u/lap2", name: lap, namespace: other, serviceAccount: sa-lap2, workloadIps: [10.9.0.2],
   protocol: HBONE, node: nowhere, services: {}}
`

// TestWorkloadJoins: a workload that has joined by itself learns all of the mesh, whatever node it says to be on, and
// gets certificates for its own identity: no other's, whether it names that in the request's metadata, in the request
// itself or in both, and whichever of its credentials it shows.
func TestWorkloadJoins(t *testing.T) {
	const td = "spiffe://cluster.local/"
	mesh := workloadsYAML("x:10.0.0.1:node-a", "y:10.0.0.2:node-b") + workloadsOfTwo
	w := start(t, map[string]string{"a.yaml": mesh}, nil)
	b := w.joinWorkload("ns/lap", "ns/lap")
	equal(t, "identity", b.Namespace+" "+b.Name+" "+b.ServiceAccount+" "+b.UID, "ns lap sa-lap u/lap")
	equal(t, "address", b.Address, "https://"+w.addr)
	ips := []netip.Addr{netip.MustParseAddr("10.9.0.1"), netip.MustParseAddr("fd00::1")}
	equal(t, "addresses", slices.Equal(b.IPs, ips), true)
	w.joinWorkload("u/lap2", "other/lap")

	for _, node := range []string{"", "node-a", "ns/lap"} {
		c := w.connect("ns/lap")
		c.node = nodeOf(node)
		c.begin(typeAddress, nil)
		equal(t, "addresses for node "+node, names(c.recv()), "u/lap u/lap2 u/x u/y")
		c.cancel()
	}
	onDemand := w.open(w.dial(w.tls("ns/lap")), context.Background(), "")
	onDemand.send(&discoverypb.DeltaDiscoveryRequest{Node: onDemand.node, TypeUrl: typeAddress,
		ResourceNamesSubscribe: []string{"*"}, ResourceNamesUnsubscribe: []string{"*"}})
	equal(t, "on demand", names(onDemand.recv()), "u/lap")

	const own = td + "ns/ns/sa/sa-lap"
	plain, mutual := w.dial(w.tls("")), w.dial(w.tls("ns/lap"))
	for _, test := range []struct {
		name, id, csr string
		code          codes.Code
		text          string
	}{
		{name: "by name", id: own, csr: own},
		{name: "as dedicated proxies ask", csr: own},
		{name: "another's", id: td + "ns/ns/sa/sa-x", csr: td + "ns/ns/sa/sa-x", code: codes.Unauthenticated,
			text: "workload ns/lap is " + own + ", not " + td + "ns/ns/sa/sa-x"},
		{name: "another that joined", id: td + "ns/other/sa/sa-lap2", csr: td + "ns/other/sa/sa-lap2",
			code: codes.Unauthenticated, text: "not "},
		{name: "another's in the request alone", csr: td + "ns/ns/sa/sa-x", code: codes.InvalidArgument,
			text: "CSR signing error"},
		{name: "another's under its own name", id: own, csr: td + "ns/ns/sa/sa-x", code: codes.InvalidArgument,
			text: "CSR signing error"},
		{name: "its own under another's name", id: td + "ns/ns/sa/sa-x", csr: own, code: codes.Unauthenticated, text: "not "},
		{name: "a node's proxy", id: td + "ns/istio-system/sa/ztunnel", csr: td + "ns/istio-system/sa/ztunnel",
			code: codes.Unauthenticated, text: "not "},
		{name: "a node's proxy in the request alone", csr: td + "ns/istio-system/sa/ztunnel", code: codes.InvalidArgument,
			text: "CSR signing error"},
	} {
		_, text := csr(t, test.csr)
		for _, how := range []string{"token", "certificate"} {
			conn, who := plain, "ns/lap"
			if how == "certificate" {
				conn, who = mutual, ""
			}
			out, err := w.sign(conn, who, signRequest(text, test.id, 3600))
			if test.code != codes.OK {
				wantStatus(t, err, test.code, test.text)
				continue
			}
			if err != nil {
				t.Fatalf("%s, by %s: %v", test.name, how, err)
			}
			_, got := ids(t, out)
			equal(t, test.name, got, own)
		}
	}
	// A node gets none for a workload that is not its own.
	_, text := csr(t, own)
	_, err := w.sign(plain, "node-a", signRequest(text, own, 0))
	wantStatus(t, err, codes.Unauthenticated, "no workload of "+own)

	st := w.srv.Status()
	equal(t, "nobody is missing", len(st.NotJoined), 0)
	found := false
	for _, n := range st.Nodes {
		if n.Node == "ns/lap" && n.Connected {
			found = true
			equal(t, "shown identity", n.Identity, own)
			equal(t, "shown workloads", strings.Join(n.PodNames, " "), "ns/lap")
		}
	}
	equal(t, "shown", found, true)

	// Without its record it is nobody.
	w.write("a.yaml", workloadsYAML("x:10.0.0.1:node-a"))
	eventually(t, "its record is gone", func() bool {
		_, err := w.sign(plain, "ns/lap", signRequest(text, "", 0))
		return err != nil && strings.Contains(err.Error(), "no record of workload ns/lap")
	})
}

// TestWorkloadLeaves: all that a workload had is revoked, and its streams end; nodes and other workloads go on.
func TestWorkloadLeaves(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": workloadsYAML("x:10.0.0.1:node-a") + workloadsOfTwo}, nil)
	w.joinWorkload("ns/lap", "ns/lap")
	w.joinWorkload("other/lap", "other/lap")
	const own, others = "spiffe://cluster.local/ns/ns/sa/sa-lap", "spiffe://cluster.local/ns/other/sa/sa-lap2"
	want := sorted(w.joinSerial("ns/lap"), w.workload("ns/lap", own))
	w.workload("other/lap", others)
	c, other := w.connect("ns/lap"), w.connect("other/lap")
	for _, c := range []*client{c, other} {
		c.begin(typeAddress, nil)
		c.ack(c.recv())
	}
	node := w.revocations("node-a")
	if _, err := LeaveWorkload(w.dir, "lap"); err == nil || !strings.Contains(err.Error(), "ns/lap, other/lap") {
		t.Fatal(err)
	}
	who, err := LeaveWorkload(w.dir, "u/lap")
	check(t, err)
	equal(t, "who", who, "ns/lap")
	c.fails(codes.Unauthenticated, "credentials have been replaced or removed")
	eventually(t, "the list", func() bool {
		return node.rev.CRL() != nil && strings.Join(w.serials(node.path), " ") == want
	})
	other.silent()
	_, text := csr(t, own)
	_, err = w.sign(w.dial(w.tls("")), "ns/lap", signRequest(text, own, 0))
	wantStatus(t, err, codes.Unauthenticated, "the token is unknown")
	if _, err := LeaveWorkload(w.dir, "ns/lap"); err == nil || !strings.Contains(err.Error(), "has not joined") {
		t.Fatal(err)
	}
	// What it had stays revoked over a start, and what is another's stays good.
	check(t, w.stop())
	w.serve(defaultLimits(), w.addr)
	equal(t, "revoked after a start", w.srv.Status().Revoked.Certificates, 2)
	w.workload("other/lap", others)
}

// TestWorkloadRenews: the short-lived certificate of a bundle is renewed in place, for the workload's own identity and
// never for longer than certificates of the mesh live.
func TestWorkloadRenews(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": "workloads:\n" + workloadsOfTwo}, nil)
	out := w.creds("ns/lap")
	_, err := Join(t.Context(), JoinOptions{Dir: w.dir, Workload: "u/lap", Out: out, Life: 3 * time.Second})
	check(t, err)
	first := w.tls("ns/lap").Certificates[0].Leaf
	own := ca.NewOwn(ca.OwnOptions{Connector: w.nodeConnector("ns/lap"),
		CertFile: filepath.Join(out, CertFile), KeyFile: filepath.Join(out, KeyFile)})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); own.Run(ctx) }()
	defer func() { cancel(); <-done }()
	var next *x509.Certificate
	eventually(t, "renewed", func() bool { next = w.tls("ns/lap").Certificates[0].Leaf; return !next.Equal(first) })
	equal(t, "identity", strings.Join(identity.URIs(next.Extensions), " "), "spiffe://cluster.local/ns/ns/sa/sa-lap")
	request := w.ownCSROf("ns/lap", identity.URIs(next.Extensions)[0])
	long, err := w.sign(w.dial(w.tls("")), "ns/lap", signRequest(request, "", int64(DefaultLife/time.Second)))
	if err == nil {
		cert, _ := ids(t, long)
		t.Fatal("valid until", cert.NotAfter)
	}
	wantStatus(t, err, codes.InvalidArgument, "greater than the max allowed TTL")
}

// TestWorkloadNames: what Join takes for a workload, and what it says of the rest.
func TestWorkloadNames(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "c")
	check(t, Init(dir, "cluster.local"))
	mesh := filepath.Join(dir, meshDir)
	check(t, os.Remove(filepath.Join(mesh, "example.yaml")))
	check(t, os.WriteFile(filepath.Join(mesh, "a.yaml"), []byte("workloads:\n"+workloadsOfTwo+
		"- {uid: only, name: only, namespace: ns, serviceAccount: s, workloadIps: [10.9.0.3], services: {}}\n"+
		"- {uid: odd, name: '../x', namespace: ns, serviceAccount: s, workloadIps: [10.9.0.4], services: {}}\n"), 0o600))
	for name, want := range map[string]string{
		"lap": "any of ns/lap (uid u/lap), other/lap (uid u/lap2)", "nobody": "no workload",
		"../x": "want its record's namespace", "odd": "want its record's namespace",
	} {
		_, err := Join(t.Context(), JoinOptions{Dir: dir, Workload: name, Out: t.TempDir()})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Join(t.Context(), JoinOptions{Dir: dir, Workload: "only", Node: "n", Out: t.TempDir()}); err == nil {
		t.Error("a node and a workload")
	}
	// One file has it all, for its owner alone, and makes the same directory.
	one := filepath.Join(t.TempDir(), "only.json")
	who, err := Join(t.Context(), JoinOptions{Dir: dir, Workload: "only", Out: one, Address: "https://c:15012"})
	check(t, err)
	equal(t, "who", who, "ns/only")
	info, err := os.Stat(one)
	check(t, err)
	equal(t, "mode", info.Mode().Perm(), 0o600)
	b, err := ReadBundle(one)
	check(t, err)
	out := filepath.Join(t.TempDir(), "unpacked")
	check(t, b.Unpack(out))
	for name, mode := range map[string]os.FileMode{TokenFile: 0o600, KeyFile: 0o600, CertFile: 0o644, RootFile: 0o644} {
		info, err := os.Stat(filepath.Join(out, name))
		check(t, err)
		equal(t, name, info.Mode().Perm(), mode)
	}
	if _, err = Join(t.Context(), JoinOptions{Dir: dir, Workload: "ns/only", Out: one}); err == nil ||
		!strings.Contains(err.Error(), "--renew") {
		t.Error(err)
	}
	for text, want := range map[string]string{
		`{}`: "names no workload", `x`: "invalid character",
		`{"namespace":"a","name":"b","serviceAccount":"c"}`: "no credentials",
	} {
		check(t, os.WriteFile(one, []byte(text), 0o600))
		if _, err := ReadBundle(one); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
	if _, err := ReadBundle(t.TempDir()); err == nil || !strings.Contains(err.Error(), "has no workload.json") {
		t.Error(err)
	}
}
