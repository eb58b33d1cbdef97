package hbone

import (
	"context"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
)

// TestBaggageWithoutLocality: dataplane checklist 52, what a pod does not have is left out, and the order stays.
func TestBaggageWithoutLocality(t *testing.T) {
	b := Baggage{Cluster: "Kubernetes", Namespace: "default", WorkloadType: "deployment", Workload: "b-deploy",
		Canonical: "b", Revision: "v2"}
	if got := b.Format(); got !=
		"k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.deployment.name=b-deploy,service.name=b,service.version=v2" {
		t.Error(got)
	}
	if got := (Baggage{Namespace: "default", Zone: "z1"}).Format(); got !=
		"k8s.namespace.name=default,cloud.availability_zone=z1" {
		t.Error(got)
	}
}

// TestIdleTunnelSaysGoAway: dataplane checklist 64, a tunnel that nobody has used for 300 s is closed with GOAWAY.
func TestIdleTunnelSaysGoAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var goaways []http2.ErrCode
		var at time.Time
		var work sync.WaitGroup
		pool := NewPool(PoolOptions{Dial: func(context.Context, Key) (Dialled, error) {
			near, far := net.Pipe()
			work.Go(func() {
				defer far.Close()
				p := newRawPeer(t, far)
				far.SetDeadline(time.Time{})
				io.ReadFull(far, make([]byte, len(http2.ClientPreface)))
				p.fr.WriteSettings()
				for {
					f, err := p.fr.ReadFrame()
					if err != nil {
						return
					}
					switch f := f.(type) {
					case *http2.MetaHeadersFrame:
						p.headers(f.StreamID, true, ":status", "200")
					case *http2.PingFrame:
						if !f.IsAck() {
							p.fr.WritePing(true, f.Data)
						}
					case *http2.GoAwayFrame:
						mu.Lock()
						goaways, at = append(goaways, f.ErrCode), time.Now()
						mu.Unlock()
					}
				}
			})
			return Dialled{Conn: near}, nil
		}})
		s, _, err := pool.Open(t.Context(), testKey(1), &Request{Authority: "h:1"})
		if err != nil {
			t.Fatal(err)
		}
		finish(s)
		last := time.Now()
		time.Sleep(299 * time.Second)
		synctest.Wait()
		mu.Lock()
		if len(goaways) != 0 {
			t.Errorf("after 299 s: %v", goaways)
		}
		mu.Unlock()
		time.Sleep(2 * time.Second)
		synctest.Wait()
		mu.Lock()
		if !slices.Equal(goaways, []http2.ErrCode{http2.ErrCodeNo}) || at.Sub(last) != 300*time.Second {
			t.Errorf("%v after %v", goaways, at.Sub(last))
		}
		mu.Unlock()
		pool.Close()
		work.Wait()
	})
}
