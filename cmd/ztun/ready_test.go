package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"ztun/admin"
	"ztun/admin/ca"
	"ztun/admin/xds"
	"ztun/proxy/identity"
)

// TestReadyIsSaidOnce: the log says ready when 15021 does, and not before; not ready when it does not any more; and
// now and then why.
func TestReadyIsSaidOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ready := admin.NewReady(time.Now)
		one, two := ready.Register("one"), ready.Register("two")
		var b logged
		ctx, cancel := context.WithCancel(t.Context())
		var work sync.WaitGroup
		work.Go(func() { sayReady(ctx, ready, slog.New(slog.NewTextHandler(&b, nil))) })
		said := func(want string) {
			t.Helper()
			synctest.Wait()
			var got []string
			for _, l := range b.take() {
				if _, m, ok := strings.Cut(l, "level="); ok {
					got = append(got, m)
				}
			}
			if strings.Join(got, "\n") != want {
				t.Errorf("%q, want %q", got, want)
			}
		}
		one.Done()
		two.Fail(errors.New("cannot reach it"))
		said("")
		time.Sleep(firstExcuse)
		said(`WARN msg="not ready" pending="two (cannot reach it)"`)
		two.Done()
		said(`INFO msg=ready`)
		time.Sleep(time.Hour)
		said("")
		one.Again()
		said(`WARN msg="not ready any more" pending=one`)
		time.Sleep(nextExcuse)
		said(`WARN msg="not ready" pending=one`)
		one.Done()
		said(`INFO msg=ready`)
		cancel()
		work.Wait()
	})
}

// logged is what was logged since it was last taken, line by line.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) take() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.b.Reset()
	return strings.Split(strings.TrimSpace(l.b.String()), "\n")
}

// failing is a CA that refuses until it is told not to.
type failing struct {
	ca.Signer
	mu  sync.Mutex
	err error
}

func (f *failing) Sign(ctx context.Context, id identity.ID, csr []byte, ttl time.Duration) (chain,
	roots []*x509.Certificate, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return nil, nil, f.err
	}
	return f.Signer.Sign(ctx, id, csr, ttl)
}

// TestCertificatesAreReady: a CA that cannot be reached, or that refuses what the node's pods want, keeps the node
// unready with the reason; later it does not make it so again.
func TestCertificatesAreReady(t *testing.T) {
	signer := &failing{Signer: ca.NewFake(), err: errors.New("token refused")}
	var mu sync.Mutex
	reach := errors.New("connection refused")
	d := &daemon{c: load(t), certs: ca.NewManager(ca.ManagerOptions{Signer: signer}),
		loop: admin.NewLoop(admin.LoopOptions{}), ready: admin.NewReady(time.Now)}
	d.probeCA = func(context.Context) error {
		mu.Lock()
		defer mu.Unlock()
		return reach
	}
	d.pods = newPodManager(d.c, nil, d, nil, slog.New(slog.DiscardHandler))
	state, certs := d.ready.Register("state manager"), d.ready.Register("certificates")
	ctx, cancel := context.WithCancel(t.Context())
	var work sync.WaitGroup
	defer work.Wait()
	defer cancel()
	work.Go(func() { d.certs.Run(ctx) })
	work.Go(func() { d.loop.Run(ctx) })
	check := func(f func()) {
		t.Helper()
		certs.Again()
		done := make(chan struct{})
		work.Go(func() { d.checkCertificates(ctx, certs); close(done) })
		pending := func() (why string) {
			for _, p := range d.ready.Pending() {
				if p.Name == "certificates" && p.LastError != nil {
					return p.LastError.Error()
				}
			}
			return ""
		}
		until := func(what string) {
			t.Helper()
			for end := time.Now().Add(20 * time.Second); !strings.Contains(pending(), what); time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatalf("%q, want %q", pending(), what)
				}
			}
		}
		if len(d.pods.all()) == 0 {
			until("first state")
			state.Done()
			until("connection refused")
		} else {
			until("/ns/n/sa/s: token refused")
		}
		f()
		select {
		case <-done:
		case <-time.After(20 * time.Second):
			t.Fatal("not ready:", pending())
		}
		if why := d.ready.Pending(); len(why) != 0 {
			t.Error(why)
		}
	}
	check(func() { mu.Lock(); reach = nil; mu.Unlock() })

	spec := admin.PodSpec{Name: "one", Namespace: "n", ServiceAccount: "s"}
	d.pods.pods[uidOf(spec)] = &pod{spec: spec}
	l, err :=
		xds.ParseLocal(
			[]byte(`workloads: [{uid: one, name: one, namespace: n, serviceAccount: s, workloadIps: [10.0.0.1], services: {}}]`))
	if err != nil {
		t.Fatal(err)
	}
	if err := d.loop.Do(t.Context(), func() { d.loop.Publish(l.View("")) }); err != nil {
		t.Fatal(err)
	}
	id := d.loop.View().WorkloadByUID("one").Identity()
	d.certs.Prefetch(id)
	check(func() { // it can be reached, which is not enough
		signer.mu.Lock()
		signer.err = nil
		signer.mu.Unlock()
	})
	// Signed here: nothing to wait for.
	d.probeCA = nil
	if err := d.certificates(nil); err != nil {
		t.Error(err)
	}
}
