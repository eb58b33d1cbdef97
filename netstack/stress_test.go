package netstack

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"ztun/proxy/refusal"
)

// Many connections at once, each with a payload of its own both ways, over a
// link that loses packets: what arrives is what was sent, and all ends are clean.
func TestStress(t *testing.T) {
	for _, tc := range []struct {
		name    string
		offload bool
		loss    uint64 // one in so many; 0 none
	}{{"offload", true, 0}, {"plain", false, 0}, {"lossy", true, 200}} {
		t.Run(tc.name, func(t *testing.T) {
			conns, size := 48, 400<<10
			if testing.Short() {
				conns, size = 16, 100<<10
			}
			a, b := memPair(1500, tc.offload)
			if tc.loss > 0 {
				var n atomic.Uint64
				drop := func([]byte) bool { return n.Add(1)%tc.loss != 0 }
				a.filter, b.filter = drop, drop
			}
			client := startStack(t, Config{Addrs: []netip.Addr{families[0].client.Addr(), families[1].client.Addr()}, App: a})
			server := startStack(t, Config{
				Addrs: []netip.Addr{families[0].client.Addr(), families[1].client.Addr()}, App: b,
				OnFlow: func(f *Flow) {
					c, err := f.Accept()
					if err != nil {
						t.Errorf("accept: %v", err)
						return
					}
					defer c.Close()
					// Echo, by the two ways to read in turn.
					if f.Src().Port()%2 == 0 {
						_, err = c.WriteTo(c)
					} else {
						_, err = io.CopyBuffer(onlyWriter{c}, struct{ io.Reader }{c}, make([]byte, 1+rand.IntN(100000)))
					}
					if err != nil {
						t.Errorf("echo: %v", err)
					}
					c.CloseWrite()
				}})
			server.handshakePatience = time.Minute // a machine that is not this test's own may lose seconds between two packets
			var wg sync.WaitGroup
			for i := range conns {
				wg.Go(func() {
					if err := echoOnce(client, families[i%2], uint64(i), size); err != nil {
						t.Errorf("connection %d: %v", i, err)
					}
				})
			}
			wg.Wait()
			// Whatever was opened has gone again, if with a FIN that got lost several times.
			for end := time.Now().Add(2 * time.Minute); ; time.Sleep(5 * time.Millisecond) {
				st := server.Stats()
				if st.Conns == 0 && st.InFlight == 0 && server.app.gs.Stats().TCP.CurrentConnected.Value() == 0 {
					break
				}
				if time.Now().After(end) {
					t.Fatalf("left over: %+v, connected %d", st, server.app.gs.Stats().TCP.CurrentConnected.Value())
				}
			}
		})
	}
}

func echoOnce(s *Stack, f family, seed uint64, size int) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	c, err := s.DialApp(ctx, f.client, f.server)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(2 * time.Minute))
	sent := make(chan [32]byte, 1)
	errs := make(chan error, 1)
	go func() {
		r := rand.New(rand.NewPCG(seed, 1))
		h := sha256.New()
		for left := size; left > 0; {
			b := make([]byte, min(left, 1+r.IntN(90000)))
			for i := range b {
				b[i] = byte(r.Uint32())
			}
			h.Write(b)
			if _, err := c.Write(b); err != nil {
				errs <- err
				return
			}
			left -= len(b)
		}
		sent <- sum(h)
		errs <- c.CloseWrite()
	}()
	h := sha256.New()
	n, err := io.Copy(h, c)
	if err != nil {
		return fmt.Errorf("after %d bytes: %w", n, err)
	}
	if err := <-errs; err != nil {
		return err
	}
	if got, want := sum(h), <-sent; got != want {
		return fmt.Errorf("%d bytes, sums differ", n)
	}
	return nil
}

func sum(h hash.Hash) (s [32]byte) {
	h.Sum(s[:0])
	return s
}

// Connections opened and ended in all manners at once, while both stacks close.
func TestStressClose(t *testing.T) {
	for round := range 4 {
		a, b := memPair(1500, true)
		var wg sync.WaitGroup
		mk := func(cfg Config) *Stack {
			s, err := New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			wg.Go(func() {
				if err := s.Run(context.Background()); err != nil {
					t.Errorf("Run: %v", err)
				}
			})
			return s
		}
		client := mk(Config{Addrs: []netip.Addr{families[0].client.Addr()}, App: a, OnFlow: func(*Flow) {}})
		server := mk(Config{Addrs: []netip.Addr{families[0].client.Addr()}, App: b, OnFlow: func(f *Flow) {
			switch rand.IntN(5) {
			case 0:
				f.Refuse(refusal.Way(rand.IntN(5)))
				return
			case 1:
				return
			}
			if c, err := f.Accept(); err == nil {
				end(c)
			}
		}})
		stop := make(chan struct{})
		for range 24 {
			wg.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					ctx, cancel := context.WithTimeout(context.Background(), time.Duration(rand.IntN(40))*time.Millisecond)
					c, err := client.DialApp(ctx, families[0].client, families[0].server)
					cancel()
					if err == nil {
						end(c)
					}
				}
			})
		}
		time.Sleep(time.Duration(50+50*round) * time.Millisecond)
		first, second := server, client
		if round%2 == 1 {
			first, second = second, first
		}
		wg.Go(func() { first.Close() })
		if round < 2 {
			time.Sleep(5 * time.Millisecond)
		}
		second.Close()
		close(stop)
		wg.Wait()
	}
}

// end uses a connection a little and ends it somehow.
func end(c *Conn) {
	c.SetDeadline(time.Now().Add(time.Duration(rand.IntN(20)) * time.Millisecond))
	var wg sync.WaitGroup
	wg.Go(func() { c.Write(make([]byte, rand.IntN(200000))) })
	wg.Go(func() {
		switch rand.IntN(3) {
		case 0:
			c.WriteTo(io.Discard)
		case 1:
			io.Copy(io.Discard, struct{ io.Reader }{c})
		}
	})
	if rand.IntN(2) == 0 {
		wg.Wait()
	}
	switch rand.IntN(3) {
	case 0:
		c.Reset()
	case 1:
		c.CloseWrite()
		fallthrough
	default:
		if err := c.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			panic(err)
		}
	}
	wg.Wait()
}
