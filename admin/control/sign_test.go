package control

import (
	"cmp"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/structpb"

	"ztun/admin/ca"
	"ztun/admin/pb/citadelpb"
	"ztun/proxy/identity"
)

// csr makes a request of ztunnel's shape.
func csr(t *testing.T, id string) (crypto.Signer, string) {
	t.Helper()
	parsed, err := identity.Parse(id)
	check(t, err)
	key, der, err := ca.NewRequest(parsed)
	check(t, err)
	return key, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

func signRequest(csr, impersonated string, seconds int64) *citadelpb.IstioCertificateRequest {
	r := &citadelpb.IstioCertificateRequest{Csr: csr, ValidityDuration: seconds}
	if impersonated != "" {
		r.Metadata =
			&structpb.Struct{Fields: map[string]*structpb.Value{"ImpersonatedIdentity": structpb.NewStringValue(impersonated)}}
	}
	return r
}

// sign calls CreateCertificate with a node's token ("": without).
func (w *world) sign(cc *grpc.ClientConn, node string, r *citadelpb.IstioCertificateRequest) (
	*citadelpb.IstioCertificateResponse, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if node != "" {
		ctx = withToken(ctx, w.token(node))
	}
	return citadelpb.NewIstioCertificateServiceClient(cc).CreateCertificate(ctx, r)
}

func (w *world) workloadCert(node, id string) (chain [][]byte, key crypto.Signer) {
	w.t.Helper()
	key, text := csr(w.t, id)
	out, err := w.sign(w.dial(w.tls("")), node, signRequest(text, id, 0))
	check(w.t, err)
	block, _ := pem.Decode([]byte(out.CertChain[0]))
	return [][]byte{block.Bytes}, key
}

// Who gets a certificate for what: the table of istio-peers.md, on our node authorizer.
func TestImpersonation(t *testing.T) {
	const td = "spiffe://cluster.local/"
	w := start(t, map[string]string{"a.yaml": workloadsYAML("x:10.0.0.1:node-a", "y:10.0.0.2:node-b") +
		"- {uid: o, namespace: ns, serviceAccount: other, trustDomain: other.td, workloadIps: [], node: node-a, services: " +
		"{}}\n" +
		"- {uid: free, namespace: ns, serviceAccount: free, workloadIps: [], services: {}}\n"}, nil)
	plain := w.dial(w.tls(""))
	const denied = "request impersonation authentication failure"
	for _, test := range []struct {
		name, node, id, csr string
		seconds             int64
		code                codes.Code
		text                string
		life                time.Duration
	}{
		{name: "own workload", node: "node-a", id: td + "ns/ns/sa/sa-x", seconds: 3600, life: time.Hour},
		{name: "default life", node: "node-a", id: td + "ns/ns/sa/sa-x", life: 24 * time.Hour},
		{name: "negative life", node: "node-a", id: td + "ns/ns/sa/sa-x", seconds: -5, life: 24 * time.Hour},
		{name: "longest life", node: "node-a", id: td + "ns/ns/sa/sa-x", seconds: 24 * 3600, life: 24 * time.Hour},
		{name: "longer than a node may have it", node: "node-a", id: td + "ns/ns/sa/sa-x", seconds: 2160 * 3600,
			life: 24 * time.Hour},
		{name: "too long", node: "node-a", id: td + "ns/ns/sa/sa-x", seconds: 100 * 24 * 3600, code: codes.InvalidArgument,
			text: "greater than the max allowed TTL 2160h0m0s"},
		{name: "absurdly long", node: "node-a", id: td + "ns/ns/sa/sa-x", seconds: 1<<63 - 1, code: codes.InvalidArgument,
			text: "greater than the max allowed TTL"},
		{name: "nobody impersonated: the node's proxy", node: "node-a", csr: td + "ns/istio-system/sa/ztunnel",
			life: 24 * time.Hour},
		{name: "another node's workload", node: "node-a", id: td + "ns/ns/sa/sa-y", code: codes.Unauthenticated,
			text: denied + ": no workload of spiffe://cluster.local/ns/ns/sa/sa-y has node \"node-a\""},
		{name: "its own node's", node: "node-b", id: td + "ns/ns/sa/sa-y", life: 24 * time.Hour},
		{name: "a workload of no node", node: "node-a", id: td + "ns/ns/sa/free", code: codes.Unauthenticated, text: denied},
		{name: "nobody", node: "node-a", id: td + "ns/ns/sa/nobody", code: codes.Unauthenticated, text: denied},
		{name: "the proxy's identity is no workload's", node: "node-a", id: td + "ns/istio-system/sa/ztunnel",
			code: codes.Unauthenticated, text: denied},
		{name: "another trust domain", node: "node-a", id: "spiffe://x.td/ns/ns/sa/sa-x", code: codes.Unauthenticated,
			text: denied},
		{name: "a workload of another trust domain than the CA's", node: "node-a", id: "spiffe://other.td/ns/ns/sa/other",
			code: codes.InvalidArgument, text: "signs for trust domain cluster.local only"},
		{name: "no SPIFFE id", node: "node-a", id: "sa-x", csr: td + "ns/ns/sa/sa-x", code: codes.Unauthenticated,
			text: denied},
		{name: "a CSR for somebody else", node: "node-a", id: td + "ns/ns/sa/sa-x", csr: td + "ns/ns/sa/sa-y",
			code: codes.InvalidArgument, text: "CSR signing error"},
		{name: "no token", id: td + "ns/ns/sa/sa-x", code: codes.Unauthenticated, text: "request authenticate failure"},
	} {
		t.Run(test.name, func(t *testing.T) {
			key, text := csr(t, cmp.Or(test.csr, test.id))
			out, err := w.sign(plain, test.node, signRequest(text, test.id, test.seconds))
			if test.code != codes.OK {
				wantStatus(t, err, test.code, test.text)
				return
			}
			check(t, err)
			id, err := identity.Parse(cmp.Or(test.id, test.csr))
			check(t, err)
			chain, roots, _, err := ca.ParseChain(id, out.CertChain)
			check(t, err)
			cert, err := identity.New(id, key, chain, roots)
			check(t, err)
			equal(t, "life", time.Until(cert.Leaf.NotAfter).Round(time.Minute), test.life)
			_, err =
				cert.Leaf.Verify(x509.VerifyOptions{Roots: cert.Pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth,
					x509.ExtKeyUsageClientAuth}})
			check(t, err)
		})
	}
	_, err := w.sign(plain, "node-a", signRequest("garbage", td+"ns/ns/sa/sa-x", 0))
	wantStatus(t, err, codes.InvalidArgument, "the CSR is not PEM")
	_, err = w.sign(plain, "node-a",
		signRequest("-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", td+"ns/ns/sa/sa-x", 0))
	wantStatus(t, err, codes.InvalidArgument, "CSR signing error")
	// By client certificate.
	_, text := csr(t, td+"ns/ns/sa/sa-x")
	_, err = w.sign(w.dial(w.tls("node-a")), "", signRequest(text, td+"ns/ns/sa/sa-x", 0))
	check(t, err)
	_, err = w.sign(w.dial(w.tls("node-b")), "", signRequest(text, td+"ns/ns/sa/sa-x", 0))
	wantStatus(t, err, codes.Unauthenticated, denied)
	// A workload that moves takes the right with it.
	w.write("a.yaml", workloadsYAML("x:10.0.0.1:node-b"))
	eventually(t, "moved", func() bool { return w.srv.feed.get().version == 2 })
	_, err = w.sign(plain, "node-a", signRequest(text, td+"ns/ns/sa/sa-x", 0))
	wantStatus(t, err, codes.Unauthenticated, denied)
	n := w.srv.Status().Counters
	if n["signed"] != 8 || n["signRefused"] < 10 || n["unauthenticated"] != 1 {
		t.Fatal(n)
	}
}

func TestSignBounds(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": "["}, func(l *limits) { l.signBurst, l.signRate = 2, 0 })
	cc := w.dial(w.tls(""))
	_, text := csr(t, "spiffe://cluster.local/ns/ns/sa/x")
	_, err := w.sign(cc, "node-a", signRequest(text, "spiffe://cluster.local/ns/ns/sa/x", 0))
	wantStatus(t, err, codes.Unavailable, "has not loaded its directory yet")
	_, own := csr(t, "spiffe://cluster.local/ns/istio-system/sa/ztunnel")
	_, err = w.sign(cc, "node-a", signRequest(own, "", 0))
	check(t, err)
	_, err = w.sign(cc, "node-a", signRequest(own, "", 0))
	wantStatus(t, err, codes.ResourceExhausted, "too fast")
	_, err = w.sign(cc, "node-b", signRequest(own, "", 0)) // another node has its own
	check(t, err)
	equal(t, "limited", w.srv.Status().Counters["signLimited"], 1)
	// More than a request may have is refused before it is taken for one.
	_, err = w.sign(cc, "node-b", signRequest(strings.Repeat("x", 40<<20), "", 0))
	wantStatus(t, err, codes.ResourceExhausted, "larger than max")
}

func TestRates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRates(3, 2, 2)
		count := func() (n int) {
			for r.begin("a", time.Now()) == nil {
				r.end("a")
				n++
			}
			return n
		}
		equal(t, "burst", count(), 3)
		time.Sleep(400 * time.Millisecond)
		equal(t, "too early", count(), 0)
		time.Sleep(100 * time.Millisecond)
		equal(t, "after half a second", count(), 1)
		time.Sleep(time.Hour)
		equal(t, "no more than the burst", count(), 3)
		time.Sleep(time.Hour)
		check(t, r.begin("a", time.Now()))
		check(t, r.begin("a", time.Now()))
		if err := r.begin("a", time.Now()); err == nil ||
			err.Error() != "node a has 2 certificate requests under way already" {
			t.Fatal(err)
		}
		check(t, r.begin("b", time.Now()))
		r.end("a")
		check(t, r.begin("a", time.Now()))
	})
}

// A request is counted before it is read: a node that sends its requests by halves takes its own places alone.
func TestHalfRequests(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": workloadsYAML("x:10.0.0.1:node-a")}, func(l *limits) { l.signOfNode = 2 })
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	cc := w.dial(w.tls(""))
	method := citadelpb.IstioCertificateService_CreateCertificate_FullMethodName
	for range 2 {
		// and no message
		_, err := cc.NewStream(withToken(ctx, w.token("node-a")), &grpc.StreamDesc{ClientStreams: true}, method)
		check(t, err)
	}
	busy := func() (n int) {
		w.srv.rates.mu.Lock()
		defer w.srv.rates.mu.Unlock()
		if b := w.srv.rates.buckets["node-a"]; b != nil {
			n = b.busy
		}
		return n
	}
	eventually(t, "both are there", func() bool { return busy() == 2 })
	_, own := csr(t, "spiffe://cluster.local/ns/istio-system/sa/ztunnel")
	_, err := w.sign(cc, "node-a", signRequest(own, "", 0))
	wantStatus(t, err, codes.ResourceExhausted, "node node-a has 2 certificate requests under way already")
	_, err = w.sign(cc, "node-b", signRequest(own, "", 0))
	check(t, err)
	cancel()
	eventually(t, "they are gone", func() bool { return busy() == 0 })
	_, err = w.sign(cc, "node-a", signRequest(own, "", 0))
	check(t, err)
}
