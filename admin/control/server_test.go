package control

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"ztun/admin/pb/discoverypb"
	"ztun/admin/pb/workloadpb"
)

const policyYAML = "policies:\n- {name: p, namespace: ns, scope: Namespace, action: Allow, dryRun: false, rules: []}\n"

// The whole of a connection: two types, ACK, change, removal, NACK, reconnect.
func TestStream(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": workloadsYAML("x:10.0.0.1:node-a", "y:10.0.0.2:node-b"),
		"sub/p.yaml": policyYAML}, nil)
	c := w.connect("node-a")
	c.begin(typeAddress, nil)
	m := c.recv()
	equal(t, "type", m.TypeUrl, typeAddress)
	equal(t, "names", names(m), "u/x u/y")
	equal(t, "type of the payload", m.Resources[0].Resource.TypeUrl, typeAddress)
	versions := map[string]string{}
	for _, r := range m.Resources {
		versions[r.Name] = r.Version
		a := &workloadpb.Address{}
		check(t, proto.Unmarshal(r.Resource.Value, a))
		equal(t, "payload", "u/"+a.GetWorkload().GetName(), r.Name)
		equal(t, "aliases", fmt.Sprint(r.Aliases), map[string]string{"u/x": "[/10.0.0.1]", "u/y": "[/10.0.0.2]"}[r.Name])
	}
	c.begin(typeAuthorization, nil) // not answered together with the ACK
	p := c.recv()
	equal(t, "policies", names(p), "ns/p")
	c.ack(p)
	c.ack(m)
	c.silent()

	w.write("a.yaml", workloadsYAML("x:10.0.0.1:node-a", "y:10.0.0.3:node-b"))
	m = c.recv()
	equal(t, "only what changed", names(m), "u/y")
	c.nack(m, "u/y: I do not like it")
	c.silent()
	w.write("a.yaml", workloadsYAML("x:10.0.0.1:node-a"))
	m = c.recv()
	equal(t, "removed", fmt.Sprint(m.RemovedResources), "[u/y]")
	equal(t, "resources", len(m.Resources), 0)
	c.send(&discoverypb.DeltaDiscoveryRequest{TypeUrl: typeAddress, ResponseNonce: "stale"})
	c.ack(m)
	eventually(t, "counted", func() bool {
		n := w.srv.Status().Nodes[0]
		if len(n.Types) != 2 {
			return false
		}
		p, a := n.Types[0], n.Types[1] // policies are sent first: workloads refer to them
		return p.Type == "Authorization" && p.ACKs == 1 && p.Lag == 0 && a.Type == "Address" && a.ACKs == 2 && a.NACKs == 1 &&
			a.Stale == 1 && a.LastNACK == "u/y: I do not like it" && a.Lag == 0 && !a.Rejecting && a.AckedVersion == 3
	})
	c.cancel()

	c = w.connect("node-a")
	c.begin(typeAddress, versions)
	m = c.recv()
	equal(t, "after the reconnect", names(m), "")
	equal(t, "removed meanwhile", fmt.Sprint(m.RemovedResources), "[u/y]")
	c.ack(m)
	c.cancel()
	eventually(t, "the streams are gone", func() bool { return !w.srv.Status().Nodes[0].Connected })
}

// A directory that turns bad keeps the last good snapshot, says so, and recovers.
func TestBadDirectory(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": workloadsYAML("x:10.0.0.1:node-a")}, nil)
	c := w.connect("node-a")
	c.begin(typeAddress, nil)
	c.ack(c.recv())
	w.write("b.yaml", "workloads:\n- {uid: 7}\n")
	eventually(t, "errors", func() bool { return w.srv.Status().Snapshot.ErrorCount > 0 })
	st := w.srv.Status().Snapshot
	equal(t, "version", st.Version, 1)
	equal(t, "workloads", st.Workloads, 1)
	equal(t, "the error", st.Errors[0].String(),
		`b.yaml:2: workloads[0].uid: want a string, found the number 7 (put it in quotes)`)
	equal(t, "since", st.FailedSince.IsZero(), false)
	c.silent()
	second := w.connect("node-b") // new nodes get the last good state
	second.begin(typeAddress, nil)
	equal(t, "names", names(second.recv()), "u/x")
	w.write("b.yaml", workloadsYAML("y:10.0.0.2:node-a"))
	equal(t, "repaired", names(c.recv()), "u/y")
	st = w.srv.Status().Snapshot
	equal(t, "errors", st.ErrorCount, 0)
	equal(t, "files", st.Files, 2)
	equal(t, "logged", strings.Contains(w.log.String(), "b.yaml:2: workloads[0].uid"), true)
	// The last file goes: not an empty mesh, but a directory that is not there.
	// In one step, since a directory with fewer files is a good one.
	check(t, os.Rename(filepath.Join(w.dir, meshDir), filepath.Join(w.dir, "gone")))
	eventually(t, "errors", func() bool { return w.srv.Status().Snapshot.ErrorCount > 0 })
	equal(t, "version", w.srv.Status().Snapshot.Version, 2)
	w.write("new/c.yaml", workloadsYAML("x:10.0.0.1:node-a"))
	eventually(t, "loaded", func() bool { return w.srv.Status().Snapshot.Version == 3 })
}

// Without a good snapshot nothing is answered: the node would take an empty answer for an empty mesh.
func TestNothingGoodYet(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": "["}, nil)
	c := w.connect("node-a")
	c.begin(typeAddress, map[string]string{"u/x": "1", "u/gone": "2"})
	c.silent()
	w.write("a.yaml", workloadsYAML("x:10.0.0.1:node-a"))
	m := c.recv()
	equal(t, "names", names(m), "u/x")
	equal(t, "removed", fmt.Sprint(m.RemovedResources), "[u/gone]")
}

func TestOnDemandStream(t *testing.T) {
	w :=
		start(t, map[string]string{"a.yaml": workloadsYAML("x:10.0.0.1:node-a", "y:10.0.0.2:node-b", "z:10.0.0.3:node-b")},
			nil)
	c := w.connect("node-a")
	c.send(&discoverypb.DeltaDiscoveryRequest{Node: c.node, TypeUrl: typeAddress, ResourceNamesSubscribe: []string{"*"},
		ResourceNamesUnsubscribe: []string{"*"}})
	m := c.recv()
	equal(t, "own workloads", names(m), "u/x")
	c.ack(m)
	c.send(&discoverypb.DeltaDiscoveryRequest{TypeUrl: typeAddress, ResourceNamesSubscribe: []string{"/10.0.0.2"}})
	m = c.recv()
	equal(t, "asked for", names(m)+fmt.Sprint(m.Resources[0].Aliases), "u/y[/10.0.0.2]")
	// before the ACK
	c.send(&discoverypb.DeltaDiscoveryRequest{TypeUrl: typeAddress, ResourceNamesSubscribe: []string{"/10.0.0.99"}})
	c.ack(m)
	m = c.recv()
	equal(t, "unknown", fmt.Sprint(m.RemovedResources), "[/10.0.0.99]")
	eventually(t, "shown", func() bool {
		y := w.srv.Status().Nodes[0].Types
		return len(y) == 1 && y[0].OnDemand && y[0].Names == 2
	})
}

func TestAuthentication(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": workloadsYAML("x:10.0.0.1:node-a")}, nil)
	plain := w.dial(w.tls(""))
	ctx := context.Background()
	begin := func(c *client) *client {
		c.begin(typeAddress, nil)
		return c
	}
	begin(w.open(plain, ctx, "node-a")).fails(codes.Unauthenticated,
		"authentication failure: neither a bearer token nor a client certificate")
	begin(w.open(plain, withToken(ctx, "wrong"), "node-a")).fails(codes.Unauthenticated,
		"authentication failure: the token is unknown")
	begin(w.open(plain, withToken(ctx, w.token("node-a")), "node-b")).fails(codes.PermissionDenied,
		`no identities of the caller matched NODE_NAME "node-b"`)
	begin(w.open(plain, withToken(ctx, w.token("node-a")), "")).fails(codes.PermissionDenied, `NODE_NAME ""`)
	c := w.open(plain, withToken(ctx, w.token("node-a")), "node-a")
	c.send(&discoverypb.DeltaDiscoveryRequest{TypeUrl: typeAddress})
	c.fails(codes.InvalidArgument, "missing node information")

	// Mutual TLS.
	withCert := w.dial(w.tls("node-a"))
	equal(t, "by certificate", names(begin(w.open(withCert, ctx, "node-a")).recv()), "u/x")
	begin(w.open(withCert, ctx, "node-b")).fails(codes.PermissionDenied, "node-b")
	begin(w.open(withCert, withToken(ctx, w.token("node-b")), "node-b")).fails(codes.Unauthenticated, "of different nodes")
	equal(t, "by both", names(begin(w.open(withCert, withToken(ctx, w.token("node-a")), "node-a")).recv()), "u/x")
	how := map[string]bool{}
	for _, n := range w.srv.Status().Nodes {
		how[n.Auth] = true
	}
	equal(t, "shown", how["certificate"] && how["token+certificate"], true)

	// A certificate of a workload is from the same CA and no credential.
	chain, key := w.workloadCert("node-a", "spiffe://cluster.local/ns/ns/sa/sa-x")
	workload := w.tls("")
	workload.Certificates = []tls.Certificate{{Certificate: chain, PrivateKey: key}}
	begin(w.open(w.dial(workload), ctx, "node-a")).fails(codes.Unauthenticated, "not one that ztun control join made")
	// One of another CA is none.
	other := filepath.Join(t.TempDir(), "other")
	check(t, Init(other, "cluster.local"))
	_, err := Join(t.Context(), JoinOptions{Dir: other, Node: "node-a", Out: filepath.Join(other, "out")})
	check(t, err)
	pair, err := tls.LoadX509KeyPair(filepath.Join(other, "out", CertFile), filepath.Join(other, "out", KeyFile))
	check(t, err)
	foreign := w.tls("")
	// whatever the server asks for
	foreign.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	fctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	rpc, err := discoverypb.NewAggregatedDiscoveryServiceClient(w.dial(foreign)).DeltaAggregatedResources(fctx)
	if err == nil { // in TLS 1.3 the client is done before the server has looked at its certificate
		_, err = rpc.Recv()
	}
	wantStatus(t, err, codes.Unauthenticated,
		"the client certificate does not count (x509: certificate signed by unknown authority")
	// Nor is a CA's own.
	caPair, err := tls.LoadX509KeyPair(filepath.Join(w.dir, caDir, certFile), filepath.Join(w.dir, caDir, caKeyFile))
	if errors.Is(err, fs.ErrNotExist) { // the root signs
		caPair, err = tls.LoadX509KeyPair(filepath.Join(w.dir, caDir, RootFile), filepath.Join(w.dir, caDir, caKeyFile))
	}
	check(t, err)
	authority := w.tls("")
	authority.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &caPair, nil }
	begin(w.open(w.dial(authority), ctx, "node-a")).fails(codes.Unauthenticated, "it is a CA's")
	// TLS 1.2 is refused.
	old := w.tls("")
	old.MaxVersion = tls.VersionTLS12
	if conn, err := tls.Dial("tcp", w.addr, old); err == nil {
		conn.Close()
		t.Fatal("TLS 1.2 was accepted")
	}
	if n := w.srv.Status().Counters; n["unauthenticated"] != 6 || n["denied"] != 4 {
		t.Fatal(n)
	}
}

// New credentials count at once, replaced and removed ones end streams that are open.
func TestJoinAndLeave(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": workloadsYAML("x:10.0.0.1:node-a")}, nil)
	old := w.token("node-a")
	byToken, byCert := w.connect("node-a"), w.open(w.dial(w.tls("node-a")), context.Background(), "node-a")
	for _, c := range []*client{byToken, byCert} {
		c.begin(typeAddress, nil)
		c.ack(c.recv())
	}
	if _, err := Join(t.Context(), JoinOptions{Dir: w.dir, Node: "node-a", Out: t.TempDir()}); err == nil ||
		!strings.Contains(err.Error(), "--renew") {
		t.Fatal(err)
	}
	w.join("node-a")
	byToken.fails(codes.Unauthenticated, "credentials have been replaced or removed")
	byCert.fails(codes.Unauthenticated, "credentials have been replaced or removed")
	c := w.open(w.dial(w.tls("")), withToken(context.Background(), old), "node-a")
	c.fails(codes.Unauthenticated, "unknown")
	c = w.connect("node-a")
	c.begin(typeAddress, nil)
	c.recv()
	w.join("node-new")
	c2 := w.connect("node-new")
	c2.begin(typeAddress, nil)
	c2.recv()
	check(t, Leave(w.dir, "node-a"))
	c.fails(codes.Unauthenticated, "credentials have been replaced or removed")
	if err := Leave(w.dir, "node-a"); err == nil || !strings.Contains(err.Error(), "has not joined") {
		t.Fatal(err)
	}
	c2.cancel()
	for _, name := range []string{"", ".", "..", "a/b", "-x", "a b", "../../etc/x"} {
		if _, err := Join(t.Context(), JoinOptions{Dir: w.dir, Node: name, Out: t.TempDir()}); err == nil ||
			!strings.Contains(err.Error(), "node name") {
			t.Fatal(name, err)
		}
	}
	for name, mode := range map[string]os.FileMode{TokenFile: 0o600, KeyFile: 0o600, CertFile: 0o644, RootFile: 0o644} {
		info, err := os.Stat(filepath.Join(w.creds("node-new"), name))
		check(t, err)
		equal(t, name, info.Mode().Perm(), mode)
	}
	stored, err := os.ReadFile(filepath.Join(w.dir, nodesDir, "node-new.json"))
	check(t, err)
	equal(t, "the token is stored", strings.Contains(string(stored), w.token("node-new")), false)
}

func TestStreamBounds(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": workloadsYAML("x:10.0.0.1:node-a")}, func(l *limits) {
		l.streamsOfNode, l.streams, l.connections, l.receive = 2, 3, 3, 10_000
	})
	cc := w.dial(w.tls(""))
	opened := func(node string) *client {
		c := w.open(cc, withToken(context.Background(), w.token(node)), node)
		c.begin(typeAddress, nil)
		return c
	}
	a1, a2 := opened("node-a"), opened("node-a")
	a1.recv()
	a2.recv()
	opened("node-a").fails(codes.ResourceExhausted, "node-a has 2 streams already")
	b := opened("node-b")
	m := b.recv()
	opened("node-b").fails(codes.ResourceExhausted, "more than 3 streams")
	b.ack(m)
	// Too many types, too large a request.
	for i := range maxTypes {
		b.begin(fmt.Sprint("type.googleapis.com/type", i), nil)
		if i < maxTypes-1 {
			equal(t, "unknown type", len(b.recv().Resources), 0)
		}
	}
	b.fails(codes.ResourceExhausted, "more than 8 types")
	a2.begin(typeAddress, map[string]string{strings.Repeat("x", 20_000): ""})
	a2.fails(codes.ResourceExhausted, "larger than max")
	a1.silent()
	// Connections: cc and two more.
	for range 2 {
		c := w.connect("node-b")
		c.begin(typeAddress, nil)
		c.recv()
	}
	w.connect("node-b").fails(codes.ResourceExhausted, "all nodes together have 3 connections already")
	equal(t, "refused connections", w.srv.Status().Counters["connectionsRefused"], 1)
	equal(t, "refused streams", w.srv.Status().Counters["streamsRefused"], 2)
}

// A stream on which nothing is asked for ends.
func TestNoRequest(t *testing.T) {
	w := start(t, nil, func(l *limits) { l.firstRequest = 300 * time.Millisecond })
	cc := w.dial(w.tls(""))
	ctx, cancel := context.WithTimeout(withToken(t.Context(), w.token("node-b")), patience)
	defer cancel()
	// A connection that takes as long to make its first call goes as well: then once more.
	eventually(t, "no request within", func() bool {
		rpc, err := discoverypb.NewAggregatedDiscoveryServiceClient(cc).DeltaAggregatedResources(ctx)
		if err == nil {
			_, err = rpc.Recv()
		}
		s := status.Convert(err)
		return s.Code() == codes.DeadlineExceeded && s.Message() == "no request within 300ms"
	})
}

// A node that does not read gets only the newest state later, and costs no memory meanwhile.
func TestSlowReader(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": "{}"}, nil)
	eventually(t, "started", func() bool { return w.srv.feed.get() != nil })
	round := func(n int) *snapshot {
		l := crowd(6_000)
		for _, x := range l.Workloads {
			x.CanonicalRevision = fmt.Sprint("round-", n)
		}
		s := snapshotOf(t, w.srv.feed.get(), fromLocal(t, "crowd", l))
		w.srv.feed.publish(s)
		return s
	}
	round(0)
	unread := w.connect("node-a") // its first message is larger than what the connection holds
	unread.begin(typeAddress, nil)
	silent := w.connect("node-b") // reads and does not reply
	silent.begin(typeAddress, nil)
	first := silent.recv()
	eventually(t, "both are being sent to", func() bool { return w.srv.counters.messages.Load() >= 1 })
	round(1)
	before := heap()
	var last *snapshot
	for n := range 20 {
		last = round(2 + n)
	}
	if grown := int64(heap()) - int64(before); grown > 16<<20 { // one snapshot is some 6 MiB
		t.Fatalf("%d MiB more after 20 snapshots", grown>>20)
	}
	for _, c := range []*client{unread, silent} {
		has, received := map[string]string{}, 0
		next := func(m *discoverypb.DeltaDiscoveryResponse) {
			for _, r := range m.Resources {
				has[r.Name] = r.Version
			}
			received += len(m.Resources)
			c.ack(m)
		}
		if c == silent {
			next(first)
		}
		want := last.addresses.get("Kubernetes//Pod/crowd/pod-5999-7d9f6c5b8-x2k4z")
		for done := false; !done; {
			next(c.recv())
			done = len(has) == last.addresses.count
			for name, version := range has {
				done = done && version == last.addresses.get(name).version
			}
		}
		equal(t, "newest", has[want.name], want.version)
		c.silent()
		if received > 2*last.addresses.count {
			t.Fatalf("%d resources sent for %d", received, last.addresses.count)
		}
	}
}

// 100,000 workloads at first connect: messages of bounded size, one at a time, and little memory besides what is
// served.
func TestCrowd(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": "{}"}, nil)
	eventually(t, "started", func() bool { return w.srv.feed.get() != nil })
	many := fromLocal(t, "crowd", crowd(100_000))
	snap := snapshotOf(t, w.srv.feed.get(), many)
	w.srv.feed.publish(snap)
	before := heap()
	c := w.connect("node-a")
	c.begin(typeAddress, nil)
	versions := make(map[string]string, 110_000)
	messages, largest, most := 0, 0, uint64(0)
	for len(versions) < 110_000 {
		m := c.recv()
		messages++
		largest = max(largest, proto.Size(m))
		for _, r := range m.Resources {
			versions[r.Name] = r.Version
		}
		if messages%3 == 0 {
			most = max(most, heap())
		}
		c.ack(m)
	}
	c.silent()
	if largest > 3<<20 || messages < 5 {
		t.Fatalf("%d messages, the largest of %d bytes", messages, largest)
	}
	// Server and client share this process: the client's names and versions, and one message on its way.
	if grown := int64(most) - int64(before); grown > 64<<20 {
		t.Fatalf("%d MiB more while sending", grown>>20)
	}
	c.cancel()
	// The reconnect costs nothing.
	c = w.connect("node-a")
	c.begin(typeAddress, versions)
	m := c.recv()
	equal(t, "resent", len(m.Resources)+len(m.RemovedResources), 0)
	c.ack(m)
	// One changed file of many sends the difference.
	w.srv.feed.publish(snapshotOf(t, snap, many, fromLocal(t, "x", parse(t, workloadsYAML("x:10.0.0.1:node-a")))))
	equal(t, "the difference", names(c.recv()), "u/x")
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// The server's certificate names what it may be called, and follows the machine.
func TestServerCertificate(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": "{}"}, nil)
	for _, name := range []string{"control.test", "localhost", "127.0.0.1", "::1"} {
		c := w.tls("")
		c.ServerName = name
		conn, err := tls.Dial("tcp", w.addr, c)
		if err != nil {
			t.Fatal(name, err)
		}
		conn.Close()
	}
	c := w.tls("")
	c.ServerName = "other.test"
	if conn, err := tls.Dial("tcp", w.addr, c); err == nil {
		conn.Close()
		t.Fatal("any name is accepted")
	}
	was := w.srv.cert.current.Load()
	check(t, w.srv.cert.renew())
	equal(t, "not due", w.srv.cert.current.Load(), was)
	w.srv.cert.current.Store(&serving{cert: was.cert, names: []string{"10.0.0.1"}}) // the addresses were others
	check(t, w.srv.cert.renew())
	equal(t, "new serial number", w.srv.cert.current.Load().cert.Leaf.SerialNumber.Cmp(was.cert.Leaf.SerialNumber) !=
		0, true)
	half, err := w.srv.authority.issueServer([]string{"localhost"}, time.Second)
	check(t, err)
	w.srv.cert.current.Store(&serving{cert: half, names: w.srv.cert.names()}) // past half of its life: it is backdated
	check(t, w.srv.cert.renew())
	equal(t, "valid", time.Until(w.srv.cert.current.Load().cert.Leaf.NotAfter) > 23*time.Hour, true)
}

func TestStart(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "c")
	if _, err := New(t.Context(), Options{Dir: dir}); err == nil || !strings.Contains(err.Error(), "ztun control init") {
		t.Fatal(err)
	}
	check(t, Init(dir, "cluster.local"))
	if _, err := New(t.Context(), Options{Dir: dir, Listen: []string{"127.0.0.1:0"}, Admin: "0.0.0.0:0"}); err == nil ||
		!strings.Contains(err.Error(), "loopback") {
		t.Fatal(err)
	}
	s, err := New(t.Context(), Options{Dir: dir, Listen: []string{"127.0.0.1:0", "[::1]:0"}})
	check(t, err)
	if _, err := New(t.Context(), Options{Dir: dir, Listen: []string{"127.0.0.1:0"}}); err == nil ||
		!strings.Contains(err.Error(), "another ztun control") {
		t.Fatal(err)
	}
	equal(t, "addresses", len(s.Addrs()), 2)
	s.Close()
	s.Close()
	_, err = os.Stat(filepath.Join(dir, socketName))
	equal(t, "the socket is gone", os.IsNotExist(err), true)
	// The example is good as it is.
	st, err := Check(dir, "")
	check(t, err)
	equal(t, "errors and warnings", st.ErrorCount+st.WarningCount, 0)
	equal(t, "workloads", st.Workloads, 3)
	// Once there are nodes, others are doubtful.
	_, err = Join(t.Context(), JoinOptions{Dir: dir, Node: "node-a", Out: t.TempDir()})
	check(t, err)
	st, err = Check(dir, "")
	check(t, err)
	if len(st.Warnings) != 1 || !strings.Contains(st.Warnings[0].String(), `no node "node-b" has joined`) {
		t.Fatal(st.Warnings)
	}
	check(t, os.WriteFile(filepath.Join(dir, socketName), nil, 0o600))
	if _, err := New(t.Context(), Options{Dir: dir, Listen: []string{"127.0.0.1:0"}}); err == nil ||
		!strings.Contains(err.Error(), "not a socket") {
		t.Fatal(err)
	}
}

// A stopped server lets go of its streams; the node connects to the next one and keeps what it has.
func TestRestart(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": workloadsYAML("x:10.0.0.1:node-a")}, nil)
	cc := w.dial(w.tls(""), grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: time.Second}))
	c := w.open(cc, withToken(context.Background(), w.token("node-a")), "node-a")
	c.begin(typeAddress, nil)
	m := c.recv()
	check(t, w.stop())
	c.fails(codes.Unavailable, "")
	w.serve(defaultLimits(), w.addr)
	t.Cleanup(func() { check(t, w.stop()) })
	cc.ResetConnectBackoff()
	eventually(t, "connected", func() bool { cc.Connect(); return cc.GetState() == connectivity.Ready })
	c = w.open(cc, withToken(context.Background(), w.token("node-a")), "node-a")
	c.begin(typeAddress, map[string]string{"u/x": m.Resources[0].Version})
	equal(t, "resent", names(c.recv()), "")
}
