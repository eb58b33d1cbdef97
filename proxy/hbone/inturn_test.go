package hbone

import (
	"crypto/tls"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// oneTurn is a Turn of one, which counts.
type oneTurn struct {
	mu    sync.Mutex
	taken atomic.Int64
	held  atomic.Bool
}

func (o *oneTurn) Take() { o.mu.Lock(); o.taken.Add(1); o.held.Store(true) }
func (o *oneTurn) Give() { o.held.Store(false); o.mu.Unlock() }

// TestHandshakesInTurn: a handshake whose peer is silent does not keep its turn; the others are done; and each computes
// in its turn only.
func TestHandshakesInTurn(t *testing.T) {
	turn := &oneTurn{}
	ccfg, scfg := testTLS(t)
	scfg = scfg.Clone()
	check := scfg.VerifyConnection
	scfg.VerifyConnection = func(cs tls.ConnectionState) error {
		if !turn.held.Load() {
			t.Error("a certificate was judged out of turn")
		}
		if check != nil {
			return check(cs)
		}
		return nil
	}
	silent, stuck := tcpPair(t)
	failed := make(chan error, 1)
	go func() {
		_, _, err := Server(t.Context(), stuck, scfg, turn)
		failed <- err
	}()
	for end := time.Now().Add(patience); turn.taken.Load() == 0 && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	var wg sync.WaitGroup
	for range 10 {
		a, b := tcpPair(t)
		var client, server net.Conn
		var both sync.WaitGroup
		both.Go(func() {
			var err error
			if client, _, err = Client(t.Context(), a, ccfg, turn); err != nil {
				t.Error(err)
			}
		})
		both.Go(func() {
			var err error
			if server, _, err = Server(t.Context(), b, scfg, turn); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			both.Wait()
			if client == nil || server == nil {
				return
			}
			defer client.Close()
			defer server.Close()
			go client.Write([]byte("x"))
			server.SetReadDeadline(time.Now().Add(patience))
			if n, err := server.Read(make([]byte, 1)); n != 1 {
				t.Error(n, err)
			}
		})
	}
	wg.Wait()
	if n := turn.taken.Load(); n < 40 {
		t.Errorf("%d turns for 20 handshakes that wait for their peers", n)
	}
	silent.Close()
	if err := <-failed; err == nil {
		t.Error("a handshake with nobody succeeded")
	}
	if turn.held.Load() {
		t.Error("a turn was not given back")
	}
}
