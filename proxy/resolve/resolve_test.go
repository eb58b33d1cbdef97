package resolve

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	v4 = netip.MustParseAddr("192.0.2.1")
	v6 = netip.MustParseAddr("2001:db8::1")
)

func TestTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked []string
		c := New(Options{Lookup: func(_ context.Context, network, host string) ([]netip.Addr, error) {
			asked = append(asked, network+" "+host)
			switch host {
			case "gone":
				return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
			case "sick":
				return nil, &net.DNSError{Err: "server misbehaving", Name: host, IsTemporary: true}
			case "empty":
				return nil, nil
			}
			return []netip.Addr{v6, netip.AddrFrom16(v4.As16())}, nil
		}})
		look := func(host string, wantErr bool, want ...netip.Addr) {
			t.Helper()
			got, err := c.LookupNetIP(t.Context(), "ip", host)
			if (err != nil) != wantErr || fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("%s: %v, %v", host, got, err)
			}
		}
		steps := func(want int) {
			t.Helper()
			if len(asked) != want {
				t.Errorf("asked %d times, want %d: %v", len(asked), want, asked)
			}
		}
		look("db.example.com", false, v6, v4)
		look("DB.example.com", false, v6, v4)
		steps(1)
		if got, _ := c.LookupNetIP(t.Context(), "ip4", "db.example.com"); len(got) != 1 || got[0] != v4 {
			t.Error(got)
		}
		time.Sleep(29 * time.Second)
		look("db.example.com", false, v6, v4)
		steps(1)
		time.Sleep(2 * time.Second)
		look("db.example.com", false, v6, v4)
		steps(2)

		look("gone", true)
		look("gone", true)
		look("empty", false)
		look("empty", false)
		steps(4)
		time.Sleep(6 * time.Second)
		look("gone", true)
		steps(5)
		look("sick", true)
		look("sick", true)
		steps(7)
		if s := c.Stats(); s.Lookups != 7 || s.Hits != 5 || s.Names != 3 {
			t.Errorf("%+v", s)
		}
	})
}

func TestIPv4Only(t *testing.T) {
	c := New(Options{IPv4Only: true, Lookup: func(_ context.Context, network, _ string) ([]netip.Addr, error) {
		if network != "ip4" {
			t.Error(network)
		}
		return []netip.Addr{v4}, nil
	}})
	if got, err := c.LookupNetIP(t.Context(), "ip", "x"); err != nil || len(got) != 1 {
		t.Error(got, err)
	}
}

// Callers share one look-up, its failure too; one that gives up hands over.
func TestShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var calls atomic.Int32
		sick := errors.New("sick")
		c := New(Options{Lookup: func(ctx context.Context, _, host string) ([]netip.Addr, error) {
			calls.Add(1)
			select {
			case <-time.After(time.Second):
			case <-ctx.Done():
				return nil, ctx.Err()
			}
			if host == "sick" {
				return nil, sick
			}
			return []netip.Addr{v4}, nil
		}})
		for _, host := range []string{"well", "sick"} {
			calls.Store(0)
			var wg sync.WaitGroup
			for range 100 {
				wg.Go(func() {
					if _, err := c.LookupNetIP(t.Context(), "ip", host); (err == nil) != (host == "well") {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			if n := calls.Load(); n != 1 {
				t.Errorf("%s: %d look-ups", host, n)
			}
		}

		calls.Store(0)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := c.LookupNetIP(ctx, "ip", "handed.over"); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		})
		synctest.Wait()
		wg.Go(func() {
			if got, err := c.LookupNetIP(t.Context(), "ip", "handed.over"); err != nil || len(got) != 1 {
				t.Error(got, err)
			}
		})
		synctest.Wait()
		late, stop := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer stop()
		if _, err := c.LookupNetIP(late, "ip", "handed.over"); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		cancel()
		wg.Wait()
		if n := calls.Load(); n != 2 {
			t.Errorf("%d look-ups", n)
		}
	})
}

func TestBound(t *testing.T) {
	c := New(Options{Max: 10, Lookup: func(context.Context, string, string) ([]netip.Addr, error) {
		return []netip.Addr{v4}, nil
	}})
	for i := range 1000 {
		c.LookupNetIP(t.Context(), "ip", fmt.Sprint("host", i))
	}
	if s := c.Stats(); s.Names != 10 || s.Evicted != 990 {
		t.Errorf("%+v", s)
	}
}
