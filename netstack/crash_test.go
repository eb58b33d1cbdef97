package netstack

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"ztun/proxy/refusal"
	"ztun/proxy/rescue"
	"ztun/tun"
)

// TestPanicEndsOneStack: a panic while a packet of one pod is delivered, by the reader that all pods share, ends that
// pod's stack, whose Run tells why. The other pods' packets go on, and what the panic has locked keeps nobody
// waiting.
func TestPanicEndsOneStack(t *testing.T) {
	panics := rescue.New(slog.New(slog.DiscardHandler))
	nodeA, nodeB := memPair(1500, true)
	uplink := NewUplink(nodeA, panics, nil)
	var work sync.WaitGroup
	work.Go(func() { uplink.Run(context.Background()) })
	work.Go(func() { // the node sends every packet back down, as a router between the pods
		buf := make([]byte, 1<<16)
		var h tun.VNetHdr
		for {
			n, err := nodeB.ReadPacket(&h, [][]byte{buf})
			if err != nil {
				return
			}
			nodeB.WritePacket(&h, [][]byte{slices.Clone(buf[:n])})
		}
	})
	mk := func(addr string) (*Stack, *memDevice, chan error) {
		dev, app := memPair(1500, true)
		s, err := New(Config{Addrs: []netip.Addr{netip.MustParseAddr(addr)}, App: dev, Uplink: uplink, Panics: panics,
			OnFlow: func(f *Flow) {
				if f.Src().Port() == 666 || f.Dst().Port() == 666 {
					panic("boom")
				}
				if c, err := f.Accept(); err == nil {
					io.WriteString(c, "here")
					c.Close()
				}
			}})
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		work.Go(func() { done <- s.Run(context.Background()) })
		return s, app, done
	}
	bad, _, badDone := mk("10.1.0.2")
	good, _, goodDone := mk("10.1.0.3")
	client, _, clientDone := mk("10.1.0.4")
	reach := func(dst string) error {
		patience := patience
		if dst == "10.1.0.2:80" && panics.Total() > 0 {
			patience = 500 * time.Millisecond // it says nothing any more
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		c, err := client.DialPlain(ctx, netip.MustParseAddrPort(dst))
		if err != nil {
			return err
		}
		defer c.Close()
		got, err := io.ReadAll(c)
		if err == nil && string(got) != "here" {
			err = errors.New("read " + string(got))
		}
		return err
	}
	// In a flow's own goroutine: the flow is refused, and that is all.
	if err := reach("10.1.0.2:666"); err == nil {
		t.Error("a flow whose handler panicked was accepted")
	}
	if err := errors.Join(reach("10.1.0.2:81"), reach("10.1.0.3:80")); err != nil {
		t.Errorf("after a panic in a flow's handler: %v", err)
	}
	if n := panics.Total(); n != 1 {
		t.Errorf("%d panics counted", n)
	}

	// At a packet of bad's, in the shared reader, with a lock held for ever.
	var held sync.Mutex
	bad.up.port.disp.Store(nil)
	bad.up.port.first = func() { held.Lock(); panic("boom") }
	if err := reach("10.1.0.2:80"); err == nil {
		t.Error("a stack whose reader panicked accepts")
	}
	select {
	case err := <-badDone:
		var e *rescue.Error
		if !errors.As(err, &e) {
			t.Errorf("its Run returned %v", err)
		}
	case <-time.After(patience):
		t.Fatal("its Run goes on")
	}
	for range 3 {
		if err := reach("10.1.0.3:80"); err != nil {
			t.Errorf("another pod, after a panic at a packet of one: %v", err)
		}
		reach("10.1.0.2:80")
	}
	if n := panics.Total(); n != 2 {
		t.Errorf("%d panics counted: packets still reach the stack that is gone", n)
	}
	bad.Close()
	good.Close()
	client.Close()
	<-goodDone
	<-clientDone
	uplink.Close()
	nodeB.Close()
	work.Wait()
}

// TestPanicInAppReader: at the pod's own device it ends the pod's stack.
func TestPanicInAppReader(t *testing.T) {
	panics := rescue.New(slog.New(slog.DiscardHandler))
	dev, app := memPair(1500, true)
	s, err := New(Config{Addrs: []netip.Addr{netip.MustParseAddr("10.1.0.2")}, App: panicking{dev}, Panics: panics,
		OnFlow: func(f *Flow) {
			f.Refuse(refusal.Reset)
		}})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Run(context.Background()) }()
	app.inject(make([]byte, 40))
	select {
	case err := <-done:
		var e *rescue.Error
		if !errors.As(err, &e) || panics.Total() != 1 {
			t.Errorf("Run returned %v after %d panics", err, panics.Total())
		}
	case <-time.After(patience):
		t.Fatal("Run goes on")
	}
	s.Close()
}

// panicking is a device whose first packet is one too many.
type panicking struct{ tun.Device }

func (p panicking) ReadPacket(h *tun.VNetHdr, bufs [][]byte) (int, error) {
	if n, err := p.Device.ReadPacket(h, bufs); err != nil {
		return n, err
	}
	panic("boom")
}
