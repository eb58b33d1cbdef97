package ambient

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	citadel "istio.io/api/security/v1alpha1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	corev1 "k8s.io/api/core/v1"

	"istio.io/istio/pkg/workloadapi"
	"istio.io/istio/pkg/workloadapi/security"

	"ztun/test/istio/fakeistiod"
)

const (
	addressType = "type.googleapis.com/istio.workload.Address"
	policyType  = "type.googleapis.com/istio.security.Authorization"
)

// hand is a client of istiod that is written out by hand with Istio's own types: what the rig is worth without ztun.
type hand struct {
	t    *testing.T
	conn *grpc.ClientConn
	md   []string
}

func newHand(t *testing.T, c *fakeistiod.Cluster, addr net.Addr, token string) *hand {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(c.Root())
	conn, err := grpc.NewClient("passthrough:///"+addr.String(),
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: roots, ServerName: "istiod.istio-system.svc"})))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	h := &hand{t: t, conn: conn, md: []string{"clusterid", fakeistiod.ClusterID}}
	if token != "" {
		h.md = append(h.md, "authorization", "Bearer "+token)
	}
	return h
}

// stream opens delta xDS for one type as the ztunnel of a node; have are names that it knows from an earlier stream.
func (h *hand) stream(node, typeURL string,
	have ...string) discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(h.t.Context(), h.md...), 20*time.Second)
	h.t.Cleanup(cancel)
	s, err := discovery.NewAggregatedDiscoveryServiceClient(h.conn).DeltaAggregatedResources(ctx)
	must(h.t, err)
	meta, err := structpb.NewStruct(map[string]any{"NAME": "ztunnel-" + node, "NAMESPACE": "istio-system",
		"NODE_NAME": node, "INSTANCE_IPS": "10.0.0.2"})
	must(h.t, err)
	versions := map[string]string{}
	for _, name := range have {
		versions[name] = "old"
	}
	must(h.t, s.Send(&discovery.DeltaDiscoveryRequest{
		TypeUrl: typeURL, InitialResourceVersions: versions,
		Node: &core.Node{Id: fmt.Sprintf("ztunnel~10.0.0.2~ztunnel-%s.istio-system~istio-system.svc.cluster.local", node),
			Metadata: meta},
	}))
	return s
}

// collect reads responses, with an ACK for each, until every name of want has come ("-name": as removed). It fails on
// the stream's error.
func collect(t *testing.T, s discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient,
	want ...string) map[string]*discovery.Resource {
	t.Helper()
	got := map[string]*discovery.Resource{}
	for {
		missing := slices.DeleteFunc(slices.Clone(want), func(w string) bool { _, ok := got[w]; return ok })
		if len(missing) == 0 {
			return got
		}
		r, err := s.Recv()
		if err != nil {
			t.Fatalf("%v while waiting for %q; had %q", err, missing, keys(got))
		}
		for _, res := range r.Resources {
			got[res.Name] = res
		}
		for _, name := range r.RemovedResources {
			got["-"+name] = nil
		}
		must(t, s.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce}))
	}
}

func keys[V any](m map[string]V) []string {
	var s []string
	for k := range m {
		s = append(s, k)
	}
	slices.Sort(s)
	return s
}

// sign asks for the certificate of an identity ("": the caller's own) and returns the chain.
func (h *hand) sign(identity string) ([]string, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(h.t, err)
	csr, err := x509.CreateCertificateRequest(rand.Reader,
		&x509.CertificateRequest{URIs: []*url.URL{{Scheme: "spiffe", Host: "ignored"}}}, key)
	must(h.t, err)
	req := &citadel.IstioCertificateRequest{
		Csr: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr})), ValidityDuration: 3600}
	if identity != "" {
		req.Metadata, err = structpb.NewStruct(map[string]any{"ImpersonatedIdentity": identity})
		must(h.t, err)
	}
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(h.t.Context(), h.md...), 20*time.Second)
	defer cancel()
	resp, err := citadel.NewIstioCertificateServiceClient(h.conn).CreateCertificate(ctx, req)
	return resp.GetCertChain(), err
}

func localListener(t *testing.T) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	must(t, err)
	return ln
}

// TestRig: the control plane of these tests is what it claims to be. Every row was seen on a real istiod
// (docs/istio-peers.md).
func TestRig(t *testing.T) {
	c := fakeistiod.New(t)
	c.Apply(namespaces + ztunnelPod("n1", "10.91.0.1") + ztunnelPod("n2", "10.91.0.2") + podYAML("default", "a", "a", "n1",
		"10.91.1.2") + podYAML("default", "b", "b", "n2", "10.91.2.2") + serviceYAML("default", "b", "10.92.0.1"))
	ln := localListener(t)
	began := time.Now()
	istiod := c.Start(ln, "istiod.istio-system.svc")
	t.Logf("up after %v", time.Since(began).Round(time.Millisecond))
	good := newHand(t, c, ln.Addr(), c.Token("istio-system", "ztunnel", "ztunnel-n1"))

	t.Run("workloads and services", func(t *testing.T) {
		s := good.stream("n1", addressType)
		got := collect(t, s, "Kubernetes//Pod/default/a", "Kubernetes//Pod/default/b", "default/b.default.svc.cluster.local")
		var a workloadapi.Address
		must(t, got["Kubernetes//Pod/default/b"].Resource.UnmarshalTo(&a))
		w := a.GetWorkload()
		if w.TunnelProtocol != workloadapi.TunnelProtocol_HBONE || w.Node != "n2" || w.ServiceAccount != "b" ||
			w.Services["default/b.default.svc.cluster.local"] == nil {
			t.Errorf("pod b is %v", w)
		}
		c.Apply(podYAML("default", "late", "late", "n1", "10.91.1.9"))
		collect(t, s, "Kubernetes//Pod/default/late")
		fakeistiod.Delete(c, &corev1.Pod{}, "default", "late")
		collect(t, s, "-Kubernetes//Pod/default/late")
	})
	t.Run("policies", func(t *testing.T) {
		s := good.stream("n1", policyType)
		c.Apply(allowYAML("default", "only-a", "b", "cluster.local/ns/default/sa/a"))
		var p security.Authorization
		must(t, collect(t, s, "default/only-a")["default/only-a"].Resource.UnmarshalTo(&p))
		if p.Action != security.Action_ALLOW || p.Scope != security.Scope_WORKLOAD_SELECTOR || len(p.Groups) != 1 {
			t.Errorf("policy %v", &p)
		}
		c.Apply(strictYAML("istio-system", ""))
		collect(t, s, "istio-system/istio_converted_static_strict")
		fakeistiod.Delete(c, &securityv1.AuthorizationPolicy{}, "default", "only-a")
		collect(t, s, "-default/only-a")
		fakeistiod.Delete(c, &securityv1.PeerAuthentication{}, "istio-system", "default")
	})
	t.Run("who may ask", func(t *testing.T) {
		for name, row := range map[string]struct {
			token string
			code  codes.Code
		}{
			"no token":              {"", codes.Unauthenticated},
			"unknown token":         {"nonsense", codes.Unauthenticated},
			"another audience":      {c.TokenFor("somebody", "istio-system", "ztunnel", "ztunnel-n1"), codes.Unauthenticated},
			"another pod's account": {c.Token("default", "a", "a"), codes.PermissionDenied},
		} {
			t.Run(name, func(t *testing.T) {
				h := newHand(t, c, ln.Addr(), row.token)
				h.t = t
				_, err := h.stream("n1", addressType).Recv()
				if status.Code(err) != row.code {
					t.Errorf("got %v, want %v", err, row.code)
				}
			})
		}
	})
	t.Run("certificates", func(t *testing.T) {
		chain, err := good.sign("spiffe://cluster.local/ns/default/sa/a")
		must(t, err)
		if len(chain) != 2 || strings.TrimSpace(chain[1]) != strings.TrimSpace(string(c.Root())) {
			t.Fatalf("a chain of %d, the last %s", len(chain), chain[len(chain)-1])
		}
		block, _ := pem.Decode([]byte(chain[0]))
		leaf, err := x509.ParseCertificate(block.Bytes)
		must(t, err)
		if len(leaf.URIs) != 1 || leaf.URIs[0].String() != "spiffe://cluster.local/ns/default/sa/a" ||
			leaf.NotAfter.Sub(time.Now()) > time.Hour {
			t.Errorf("leaf for %v until %v", leaf.URIs, leaf.NotAfter)
		}
		unbound := newHand(t, c, ln.Addr(), c.TokenFor("istio-ca", "istio-system", "ztunnel", ""))
		stranger := newHand(t, c, ln.Addr(), c.Token("default", "a", "a"))
		for name, row := range map[string]struct {
			h        *hand
			identity string
			want     string
		}{
			"account of another node": {good, "spiffe://cluster.local/ns/default/sa/b",
				"request impersonation authentication failure"},
			"token without a pod": {unbound, "spiffe://cluster.local/ns/default/sa/a",
				"request impersonation authentication failure"},
			"not a node proxy": {stranger, "spiffe://cluster.local/ns/default/sa/a",
				"request impersonation authentication failure"},
			"no token": {newHand(t, c, ln.Addr(), ""), "", "request authenticate failure"},
		} {
			t.Run(name, func(t *testing.T) {
				_, err := row.h.sign(row.identity)
				if status.Code(err) != codes.Unauthenticated || !strings.Contains(status.Convert(err).Message(), row.want) {
					t.Errorf("got %v, want %s", err, row.want)
				}
			})
		}
	})
	t.Run("restart", func(t *testing.T) {
		s := good.stream("n1", addressType)
		collect(t, s, "Kubernetes//Pod/default/a")
		istiod.Kill()
		if _, err := s.Recv(); err == nil {
			t.Error("the stream outlives istiod")
		}
		fakeistiod.Delete(c, &corev1.Pod{}, "default", "b")
		c.Apply(podYAML("default", "new", "new", "n2", "10.91.2.7"))
		ln, err := net.Listen("tcp4", ln.Addr().String())
		must(t, err)
		c.Start(ln, "istiod.istio-system.svc")
		h := newHand(t, c, ln.Addr(), c.Token("istio-system", "ztunnel", "ztunnel-n1"))
		collect(t, h.stream("n1", addressType, "Kubernetes//Pod/default/b"), "Kubernetes//Pod/default/new",
			"-Kubernetes//Pod/default/b")
	})
}
