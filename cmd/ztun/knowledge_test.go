package main

import (
	"context"
	"log/slog"
	"sync"
	"testing"
	"time"

	"ztun/admin"
	"ztun/admin/ca"
	"ztun/admin/xds"
	"ztun/proxy"
	"ztun/proxy/state"
)

// TestWantedMeanwhile: a pod whose record arrives, and who is connected to, while the consequences of the View of
// before are drawn, keeps its certificate: a connection that waits for it must not hear that nobody needs it.
func TestWantedMeanwhile(t *testing.T) {
	var work sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	defer work.Wait()
	defer cancel()
	d := &daemon{c: load(t), certs: ca.NewManager(ca.ManagerOptions{Signer: ca.NewFake(), TTL: time.Hour}),
		policies: proxy.NewUnknownPolicies(false, slog.New(slog.DiscardHandler)), loop: admin.NewLoop(admin.LoopOptions{})}
	d.pods = newPodManager(d.c, nil, d, nil, slog.New(slog.DiscardHandler))
	work.Go(func() { d.certs.Run(ctx) })
	work.Go(func() { d.loop.Run(ctx) })
	meanwhile := func() {}
	// the proxy's look, within newState
	d.know = newKnowledge(func() *state.View { meanwhile(); return d.loop.View() })
	p := &pod{spec: admin.PodSpec{Name: "one", Namespace: "n", ServiceAccount: "s"},
		proxy: proxy.New(proxy.Options{Knowledge: d.know, Metrics: proxy.NewMetrics(), Log: slog.New(slog.DiscardHandler),
			Access: slog.New(slog.DiscardHandler)})}
	t.Cleanup(p.proxy.Close)
	d.pods.pods[uidOf(p.spec)] = p
	l, err :=
		xds.ParseLocal(
			[]byte(`workloads: [{uid: one, name: one, namespace: n, serviceAccount: s, workloadIps: [10.0.0.1], services: {}}]`))
	if err != nil {
		t.Fatal(err)
	}
	meanwhile = func() {
		meanwhile = func() {}
		if err := d.loop.Do(t.Context(), func() { d.loop.Publish(l.View("")) }); err != nil {
			t.Error(err)
		}
		if _, err := d.certs.Certificate(t.Context(), d.loop.View().WorkloadByUID("one").Identity()); err != nil {
			t.Error(err)
		}
	}
	d.newState()
	if got := d.certs.Dump(); len(got) != 1 {
		t.Errorf("%d certificates, want that of the new pod", len(got))
	}
}
