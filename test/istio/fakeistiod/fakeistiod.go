package fakeistiod

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"

	"istio.io/istio/pilot/pkg/features"
	istiogrpc "istio.io/istio/pilot/pkg/grpc"
	xdstest "istio.io/istio/pilot/test/xds"
	"istio.io/istio/pkg/config/mesh"
	"istio.io/istio/pkg/config/mesh/meshwatcher"
	"istio.io/istio/pkg/keepalive"
	"istio.io/istio/pkg/kube/multicluster"
	"istio.io/istio/pkg/security"
	"istio.io/istio/security/pkg/pki/ca"
	"istio.io/istio/security/pkg/pki/util"
	caserver "istio.io/istio/security/pkg/server/ca"
	"istio.io/istio/security/pkg/server/ca/authenticate/kubeauth"
)

// ClusterID is the cluster that istiod believes to serve.
const ClusterID = "Kubernetes"

// environment is what istiod has in a cluster with ambient mode.
var environment = []string{"PILOT_ENABLE_AMBIENT=true", "CA_TRUSTED_NODE_ACCOUNTS=istio-system/ztunnel"}

// Exec starts this program again, in place, with istiod's environment, unless it has that already.
func Exec() error {
	env, missing := os.Environ(), false
	for _, e := range environment {
		name, value, _ := strings.Cut(e, "=")
		if os.Getenv(name) != value {
			env, missing = append(env, e), true
		}
	}
	if !missing {
		return nil
	}
	return syscall.Exec("/proc/self/exe", os.Args, env)
}

// Cluster is an API server's content, a CA's key and the tokens that were given out.
type Cluster struct {
	CA *ca.IstioCA

	tb testing.TB

	change  sync.Mutex // one change at a time, and none while an istiod starts; running is its
	running *Istiod

	mu      sync.Mutex // never held while the API server is called, whose reactors take it
	objects map[string]runtime.Object
	order   []string
	tokens  map[string]bound
	uids    int
}

// New makes an empty cluster; every istiod that is started over it ends with the test at the latest.
func New(tb testing.TB) *Cluster {
	tb.Helper()
	if !features.EnableAmbient || len(features.CATrustedNodeAccounts) != 1 {
		tb.Fatal("fakeistiod: istiod's switches were read without its environment; TestMain has to begin with " +
			"fakeistiod.Exec")
	}
	c := &Cluster{tb: tb, objects: map[string]runtime.Object{}, tokens: map[string]bound{}}
	options, err := ca.NewSelfSignedDebugIstioCAOptions("", 24*time.Hour, 24*time.Hour, 90*24*time.Hour,
		"cluster.local", 2048)
	if err == nil {
		c.CA, err = ca.NewIstioCA(options)
	}
	if err != nil {
		tb.Fatal(err)
	}
	return c
}

// Root is the CA's certificate, PEM: what istiod puts into istio-ca-root-cert.
func (c *Cluster) Root() []byte { return c.CA.GetCAKeyCertBundle().GetRootCertPem() }

// Istiod is a running control plane.
type Istiod struct {
	Server *xdstest.FakeDiscoveryServer

	c    *Cluster
	grpc *grpc.Server
	ln   *listener
	sc   *scope
	end  sync.Once
}

// Start runs an istiod over the cluster's objects on a listener, which it owns. hosts are the names and addresses of
// its serving certificate.
func (c *Cluster) Start(ln net.Listener, hosts ...string) *Istiod {
	c.tb.Helper()
	c.change.Lock()
	defer c.change.Unlock()
	if c.running != nil {
		c.tb.Fatal("fakeistiod: one istiod runs already")
	}
	i := &Istiod{c: c, sc: &scope{TB: c.tb}, ln: &listener{Listener: ln, open: map[net.Conn]struct{}{}}}
	c.tb.Cleanup(i.Kill)
	i.Server = xdstest.NewFakeDiscoveryServer(i.sc, xdstest.FakeOptions{KubernetesObjects: c.all()})
	client := i.Server.KubeClient()
	clientset := client.Kube().(*fake.Clientset)
	clientset.PrependReactor("create", "tokenreviews", c.review)

	auth := []security.Authenticator{kubeauth.NewKubeJWTAuthenticator(meshwatcher.NewTestWatcher(mesh.DefaultMeshConfig()),
		clientset, ClusterID, nil, nil)}
	i.Server.Discovery.Authenticators = auth
	clusters := multicluster.NewFakeController()
	authority, err := caserver.New(c.CA, time.Hour, auth, clusters)
	c.must(err)
	stop := make(chan struct{})
	i.sc.Cleanup(func() { close(stop) })
	clusters.Add(ClusterID, client, stop) // after caserver.New, which waits to be told of clusters
	client.RunAndWait(stop)

	serving, err := c.serving(hosts)
	c.must(err)
	options := istiogrpc.ServerOptions(keepalive.DefaultOption(), func(int64) {})
	i.grpc =
		grpc.NewServer(
			append(options, grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{serving}})))...)
	i.Server.Discovery.Register(i.grpc)
	authority.Register(i.grpc)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = i.grpc.Serve(i.ln) // ends with Stop
	}()
	i.sc.Cleanup(func() { i.grpc.Stop(); <-done })
	c.running = i
	return i
}

// serving is istiod's own certificate, signed by its own CA.
func (c *Cluster) serving(hosts []string) (tls.Certificate, error) {
	signer, key, _, _ := c.CA.GetCAKeyCertBundle().GetAll()
	cert, priv, err := util.GenCertKeyFromOptions(util.CertOptions{
		Host: strings.Join(hosts, ","), NotBefore: time.Now().Add(-time.Minute), TTL: 12 * time.Hour,
		SignerCert: signer, SignerPriv: *key, IsServer: true, RSAKeySize: 2048,
	})
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.X509KeyPair(cert, priv)
}

// Kill ends istiod as SIGKILL does: sockets are reset, nothing is said.
func (i *Istiod) Kill() {
	i.end.Do(func() {
		i.c.change.Lock()
		if i.c.running == i {
			i.c.running = nil
		}
		i.c.change.Unlock()
		i.ln.kill()
		i.sc.close()
	})
}

// Drop resets every connection of clients; istiod goes on.
func (i *Istiod) Drop() { i.ln.drop() }

// Connections is how many clients are connected now.
func (i *Istiod) Connections() int {
	i.ln.mu.Lock()
	defer i.ln.mu.Unlock()
	return len(i.ln.open)
}

func (c *Cluster) must(err error) {
	c.tb.Helper()
	if err != nil {
		c.tb.Fatal(err)
	}
}

// scope is the test whose end is the end of one istiod.
type scope struct {
	testing.TB
	mu    sync.Mutex
	funcs []func()
}

func (s *scope) Cleanup(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.funcs = append(s.funcs, f)
}

func (s *scope) close() {
	for {
		s.mu.Lock()
		n := len(s.funcs)
		if n == 0 {
			s.mu.Unlock()
			return
		}
		f := s.funcs[n-1]
		s.funcs = s.funcs[:n-1]
		s.mu.Unlock()
		f()
	}
}

// listener knows its connections, so that they can be reset.
type listener struct {
	net.Listener
	mu   sync.Mutex
	open map[net.Conn]struct{}
	dead bool
}

func (l *listener) Accept() (net.Conn, error) {
	raw, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &conn{Conn: raw, l: l}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dead {
		reset(raw)
		return nil, errors.New("fakeistiod: killed")
	}
	l.open[c] = struct{}{}
	return c, nil
}

func (l *listener) kill() {
	l.mu.Lock()
	l.dead = true
	l.mu.Unlock()
	l.Close()
	l.drop()
}

func (l *listener) drop() {
	l.mu.Lock()
	open := make([]net.Conn, 0, len(l.open))
	for c := range l.open {
		open = append(open, c.(*conn).Conn)
	}
	l.mu.Unlock()
	for _, c := range open {
		reset(c)
	}
}

func reset(c net.Conn) {
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetLinger(0)
	}
	c.Close()
}

type conn struct {
	net.Conn
	l *listener
}

func (c *conn) Close() error {
	c.l.mu.Lock()
	delete(c.l.open, c)
	c.l.mu.Unlock()
	return c.Conn.Close()
}

// String names the istiod in a test's log.
func (i *Istiod) String() string { return fmt.Sprintf("istiod at %s", i.ln.Addr()) }
