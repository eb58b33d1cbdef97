package netns_test

import (
	"context"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"ztun/tun/netns"
	"ztun/tun/tuntest/nslab"
)

// TestWatchAddrs: addresses of both families that come and go are told of, and the watch ends with its context.
func TestWatchAddrs(t *testing.T) {
	lab := nslab.New(t)
	ctx, stop := context.WithCancel(t.Context())
	seen, done := make(chan string, 100), make(chan error, 1)
	go func() {
		done <- lab.Do(func() error {
			return netns.WatchAddrs(ctx, func() {
				all, err := net.InterfaceAddrs()
				seen <- fmt.Sprint(all, err)
			})
		})
	}()
	until := func(what string, there bool) {
		t.Helper()
		for patience := time.After(60 * time.Second); ; {
			select {
			case s := <-seen:
				if strings.Contains(s, what) == there {
					return
				}
			case err := <-done:
				t.Fatal("the watch has ended: ", err)
			case <-patience:
				t.Fatalf("%s: nobody has been told (want there: %v)", what, there)
			}
		}
	}
	until("127.0.0.1/8", true) // at once, and without any change
	for _, a := range []string{"192.0.2.7/32", "2001:db8::7/128"} {
		lab.IP(t, "address", "add", a, "dev", "lo")
		until(a, true)
		lab.IP(t, "address", "del", a, "dev", "lo")
		until(a, false)
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
