package e2e

import (
	"context"
	"crypto/tls"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ztun/test/lab"
)

// TestAttackCrypto: a stranger does whole TLS handshakes with a pod, one after the other on eight connections at
// once, and never shows a certificate.
func TestAttackCrypto(t *testing.T) {
	m := newMesh(t, meshOptions{})
	d := m.another(m.N2, "d")
	// The attacker computes as much as the daemon does, on the bystander's two processors. That makes p50 three times
	// calm; handshakes that compute whenever they like, ten times (41 ms).
	m.attack(attackOptions{Name: "handshakes", Ratio: 6, Median: 6, Attack: func(ctx context.Context) {
		var n atomic.Int64
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for ctx.Err() == nil {
					c, err := m.h1.NS.Dial(ctx, "tcp", lab.HostPort(d.V4(), lab.HBONEPort))
					if err != nil {
						continue
					}
					c.SetDeadline(time.Now().Add(5 * time.Second))
					c.(*net.TCPConn).SetLinger(0)
					if tls.Client(c, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}).Handshake() == nil {
						n.Add(1)
					}
					c.Close()
				}
			})
		}
		wg.Wait()
		t.Logf("%d handshakes", n.Load())
		if n.Load() < 500 {
			t.Errorf("%d handshakes are no attack", n.Load())
		}
	}})
}
