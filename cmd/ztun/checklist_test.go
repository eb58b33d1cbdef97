package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"ztun/admin"
	"ztun/admin/ca"
	"ztun/admin/xds"
	"ztun/proxy"
	"ztun/proxy/identity"
	"ztun/proxy/state"
)

// Assertions of the two checklists (test/checklist) that no other test of this package proves. Numbers are theirs.

// TestUserTimeout: dataplane checklist 7, time + retries x interval.
func TestUserTimeout(t *testing.T) {
	for _, c := range []struct {
		set  []string
		want time.Duration
	}{
		{nil, 0},
		{[]string{"USER_TIMEOUT_ENABLED", "true"}, 1800 * time.Second},
		{[]string{"USER_TIMEOUT_ENABLED", "true", "KEEPALIVE_TIME", "10s", "KEEPALIVE_INTERVAL", "2s", "KEEPALIVE_RETRIES",
			"3"}, 16 * time.Second},
	} {
		if got := load(t, c.set...).meshSocket().UserTimeout; got != c.want {
			t.Errorf("%q: %v, want %v", c.set, got, c.want)
		}
	}
}

// TestGracePeriods: dataplane checklist 152 and controlplane 8, with what TestTerminationDeadline leaves out.
func TestGracePeriods(t *testing.T) {
	for value, want := range map[string]time.Duration{"30": 25 * time.Second, "8": 7 * time.Second, "-": 5 * time.Second} {
		if got := load(t, "TERMINATION_GRACE_PERIOD_SECONDS", value).Process.TerminationDeadline; got != want {
			t.Errorf("%s: %v, want %v", value, got, want)
		}
	}
}

// TestDumpKeys: controlplane checklist 75, the keys of /config_dump are ztunnel's in shared mode.
func TestDumpKeys(t *testing.T) {
	d := &daemon{c: load(t), loop: admin.NewLoop(admin.LoopOptions{}),
		policies: proxy.NewUnknownPolicies(false, slog.New(slog.DiscardHandler))}
	want := []string{"certificates", "config", "policies", "services", "stagedServices", "staticConfig", "version",
		"workloadState", "workloads"}
	if got := slices.Sorted(maps.Keys(d.dump())); !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	// One more where a policy is listed and missing.
	b := state.NewBuilder("")
	b.InsertWorkload(&state.Workload{UID: "u", Name: "a", Namespace: "n", ServiceAccount: "s",
		AuthorizationPolicies: []string{"n/gone"}})
	d.policies.Follow(b.Build(), []state.WorkloadInfo{{Name: "a", Namespace: "n", ServiceAccount: "s"}})
	if got := slices.Sorted(maps.Keys(d.dump())); !slices.Contains(got, "unknownPolicies") {
		t.Errorf("a policy is missing, and the dump does not say so: %q", got)
	}
}

// TestIdentitiesOfTheNode: controlplane checklist 59 and dataplane 135. Certificates are fetched for pods of this
// node alone, live through updates of their workloads, and are dropped with the last pod of their identity.
func TestIdentitiesOfTheNode(t *testing.T) {
	var work sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	defer work.Wait()
	defer cancel()
	d := &daemon{c: load(t), certs: ca.NewManager(ca.ManagerOptions{Signer: ca.NewFake(), TTL: time.Hour}),
		policies: proxy.NewUnknownPolicies(false, slog.New(slog.DiscardHandler)), loop: admin.NewLoop(admin.LoopOptions{})}
	d.pods = newPodManager(d.c, nil, d, nil, slog.New(slog.DiscardHandler))
	work.Go(func() { d.certs.Run(ctx) })
	work.Go(func() { d.loop.Run(ctx) })
	d.know = newKnowledge(d.loop.View)
	attach := func(name string) {
		info := state.WorkloadInfo{Name: name, Namespace: "n", ServiceAccount: "shared"}
		p := &pod{spec: admin.PodSpec{Name: name, Namespace: "n", ServiceAccount: "shared"},
			proxy: proxy.New(proxy.Options{Info: info, Knowledge: d.know, Metrics: proxy.NewMetrics(),
				Log: slog.New(slog.DiscardHandler), Access: slog.New(slog.DiscardHandler)})}
		t.Cleanup(p.proxy.Close)
		d.pods.pods[uidOf(p.spec)] = p
	}
	publish := func(text string) {
		t.Helper()
		l, err := xds.ParseLocal([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if err := d.loop.Do(t.Context(), func() { d.loop.Publish(l.View("")) }); err != nil {
			t.Fatal(err)
		}
		d.newState()
	}
	wanted := func(why, want string) {
		t.Helper()
		var got []string
		for _, c := range d.certs.Dump() {
			got = append(got, c.Identity.ServiceAccount)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s: certificates of %q, want %q", why, got, want)
		}
	}
	const world = `
workloads:
- {uid: one, name: one, namespace: n, serviceAccount: shared, workloadIps: [10.0.0.1], services: {}}
- {uid: two, name: two, namespace: n, serviceAccount: shared, workloadIps: [10.0.0.2], services: {}}
- {uid: far, name: far, namespace: n, serviceAccount: far, workloadIps: [10.0.0.3], node: elsewhere, services: {}}
`
	attach("one")
	attach("two")
	publish(world)
	wanted("one of them is elsewhere", "shared")
	first, err := d.certs.Certificate(t.Context(), d.loop.View().WorkloadByUID("one").Identity())
	if err != nil {
		t.Fatal(err)
	}
	publish(strings.ReplaceAll(world, "10.0.0.1", "10.0.0.9"))
	if again, err := d.certs.Certificate(t.Context(), d.loop.View().WorkloadByUID("one").Identity()); err != nil ||
		again != first {
		t.Errorf("an update of the workload: another certificate, %v", err)
	}
	delete(d.pods.pods, "n/one")
	d.newState()
	wanted("one of two is gone", "shared")
	delete(d.pods.pods, "n/two")
	d.newState()
	wanted("both are gone", "")
}

// TestRevocationCounter: dataplane checklist 136, a server that is on the list is one more rejection of reporter
// source.
func TestRevocationCounter(t *testing.T) {
	id := identity.ID{TrustDomain: "td", Namespace: "n", ServiceAccount: "s"}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	root := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"},
		NotAfter: time.Now().Add(time.Hour), IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, SubjectKeyId: []byte("root")}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), NotAfter: time.Now().Add(time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs:        []*url.URL{{Scheme: "spiffe", Host: "td", Path: "/ns/n/sa/s"}}}
	sign := func(c *x509.Certificate) *x509.Certificate {
		der, err := x509.CreateCertificate(rand.Reader, c, root, &key.PublicKey, key)
		if err != nil {
			t.Fatal(err)
		}
		parsed, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return parsed
	}
	root = sign(root)
	leaf = sign(leaf)
	cert, err := identity.New(id, key, []*x509.Certificate{leaf}, []*x509.Certificate{root})
	if err != nil {
		t.Fatal(err)
	}
	list, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now(),
		NextUpdate:                time.Now().Add(time.Hour),
		RevokedCertificateEntries: []x509.RevocationListEntry{{SerialNumber: leaf.SerialNumber, RevocationTime: time.Now()}}},
		root, key)
	if err != nil {
		t.Fatal(err)
	}
	crl, err := identity.ParseCRL(pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: list}))
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{c: load(t), certs: ca.NewManager(ca.ManagerOptions{Signer: ca.NewFake()})}
	d.crl = ca.NewCRLFile("crl.pem", &d.revoked, slog.New(slog.DiscardHandler))
	d.revoked.Replace(crl)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	work.Go(func() {
		if c, err := ln.Accept(); err == nil {
			tls.Server(c, identity.ServerTLS(cert, identity.Params{})).Handshake() // fails: the client hangs up
			c.Close()
		}
	})
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if err := tls.Client(c, identity.ClientTLS(cert, []identity.ID{id}, d.tls())).Handshake(); err == nil ||
		!strings.Contains(err.Error(), "revoked by CRL") {
		t.Errorf("handshake: %v", err)
	}
	c.Close()
	ln.Close()
	work.Wait()

	ch := make(chan prometheus.Metric, 100)
	(&controlCollector{d: d, tables: newMetricTables()}).Collect(ch)
	close(ch)
	var got []string
	for m := range ch {
		var v dto.Metric
		if err := m.Write(&v); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(m.Desc().String(), `"istio_crl_policy_rejections_total"`) {
			got = append(got, v.String())
		}
	}
	if len(got) != 1 || !strings.Contains(got[0], `name:"reporter"`) || !strings.Contains(got[0], `value:"source"`) ||
		!strings.Contains(strings.ReplaceAll(got[0], " ", ""), "counter:{value:1}") {
		t.Errorf("%q", got)
	}
}
