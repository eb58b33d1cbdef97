package ambient

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	securityv1 "istio.io/client-go/pkg/apis/security/v1"

	"ztun/test/istio/fakeistiod"
	"ztun/test/lab"
)

// TestUnsetPeerAuthentication: with the mesh STRICT, a namespace's PeerAuthentication without a mode and a workload's
// with a PERMISSIVE port, istiod lists a converted policy with the workload that it never sends. The workload serves
// the mesh all the same; what is missing is said in the log, in the metrics and in /config_dump.
func TestUnsetPeerAuthentication(t *testing.T) {
	m := newMesh(t)
	m.Apply(`apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {namespace: istio-system, name: default}
spec: {mtls: {mode: STRICT}}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {namespace: default, name: default}
spec: {}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {namespace: default, name: server}
spec: {selector: {matchLabels: {app: server}}, portLevelMtls: {9001: {mode: PERMISSIVE}}}
---
`)
	const policy = "default/converted_peer_authentication_server"
	eventually(t, noticed, func() error {
		_, body, err := m.N2.Daemon.Get(m.ctx, lab.AdminPort, "/config_dump")
		if err == nil && !strings.Contains(body, `"unknownPolicies"`) {
			err = fmt.Errorf("istiod lists no policy that it does not send, or /config_dump does not say so")
		}
		return err
	})
	// It may take the first connections the time that a policy on its way is waited for, and no longer than that.
	eventually(t, 10*time.Second, func() error { return m.ask(m.client.NS, m.server.V4(), 9000) })
	for range 20 {
		began := time.Now()
		if err := m.ask(m.client.NS, m.server.V4(), 9000); err != nil || time.Since(began) > time.Second {
			t.Fatalf("mutual TLS is refused, or held up, for a policy that never comes: %v after %v", err, time.Since(began))
		}
	}
	_, body, err := m.N2.Daemon.Get(m.ctx, lab.AdminPort, "/config_dump")
	if err != nil || !strings.Contains(body, policy) || !strings.Contains(body, `"skip"`) {
		t.Errorf("/config_dump does not name %s as skipped: %v", policy, err)
	}
	if !strings.Contains(m.N2.Daemon.Log(), "is not loaded") || !strings.Contains(m.N2.Daemon.Log(), policy) {
		t.Error("the log does not say which policy is missing")
	}
	_, body, err = m.N2.Daemon.Get(m.ctx, lab.StatsPort, "/metrics")
	if err != nil || !strings.Contains(body, "ztun_policies_unknown 1") {
		t.Errorf("the metrics do not say that a policy is missing: %v", err)
	}
}

// TestPolicyToggledUnderTraffic: a policy that allows everybody comes and goes while a bystander connects; istiod
// sends the workload that lists it before the policy. None of 10,000 connections is refused.
func TestPolicyToggledUnderTraffic(t *testing.T) {
	m := newMesh(t)
	const connections, bystanders = 10_000, 8
	ctx, cancel := context.WithCancel(m.ctx)
	defer cancel()
	var tries, bad atomic.Int64
	var first atomic.Pointer[error]
	var work sync.WaitGroup
	for range bystanders {
		work.Go(func() {
			for ctx.Err() == nil && tries.Add(1) <= connections {
				if err := m.ask(m.client.NS, m.server.V4(), 9000); err != nil && ctx.Err() == nil {
					bad.Add(1)
					first.CompareAndSwap(nil, &err)
				}
			}
		})
	}
	toggles := 0
	for deadline := time.Now().Add(60 * time.Second); tries.Load() < connections &&
		time.Now().Before(deadline); toggles++ {
		m.Apply(`apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {namespace: default, name: toggled}
spec:
  selector: {matchLabels: {app: server}}
  action: DENY
  rules: [{to: [{operation: {ports: ["9"]}}]}]
---
`)
		time.Sleep(150 * time.Millisecond)
		fakeistiod.Delete(m.Cluster, &securityv1.AuthorizationPolicy{}, "default", "toggled")
		time.Sleep(150 * time.Millisecond)
	}
	work.Wait()
	if e := first.Load(); e != nil {
		t.Errorf("%d of %d connections failed while a policy for port 9 came and went %d times; the first: %v", bad.Load(),
			tries.Load(), toggles, *e)
	}
	if n := min(tries.Load(), connections); n < connections || toggles < 10 {
		t.Errorf("only %d connections beside %d changes: no test of anything", n, toggles)
	}
	t.Logf("%d connections beside %d changes", min(tries.Load(), connections), toggles)
}
