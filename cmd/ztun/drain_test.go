package main

import (
	"context"
	"io"
	"net/netip"
	"testing"
	"time"

	"github.com/miekg/dns"

	"ztun/cmd/attach/attachtest"
	"ztun/netstack"
)

// drainLab has two pods of one daemon, the second of which answers at port 80, and a connection between them.
func drainLab(t *testing.T) (m *memoryDaemon, one *attachtest.Host, kept *netstack.Conn) {
	t.Helper()
	m = newMemoryDaemon(t, "ISTIO_META_DNS_CAPTURE", "true")
	addr := netip.MustParseAddr
	one = m.net.Host("host-one", addr("10.1.0.1"))
	m.net.Host("host-two", addr("10.1.0.2")).Listen(80, echo)
	m.knows(t, "")
	for _, name := range []string{"one", "two"} {
		if err := m.pods.Add(t.Context(), specOf(name)); err != nil {
			t.Fatal(err)
		}
	}
	kept, err := one.Dial(t.Context(), netip.MustParseAddrPort("10.1.0.2:80"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kept.Close() })
	goesOn(t, kept)
	return m, one, kept
}

// goesOn waits until something comes by a connection to echo.
func goesOn(t *testing.T, c *netstack.Conn) {
	t.Helper()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.WriteString(c, "x"); err != nil {
		t.Fatal(err)
	}
	for b := make([]byte, 1); b[0] != 'x'; {
		if _, err := c.Read(b); err != nil {
			t.Fatal(err)
		}
	}
}

// name asks a nameserver, whose part the pod's DNS proxy takes, for what needs nobody else.
func name(t *testing.T, from *attachtest.Host) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	c, err := from.Dial(ctx, netip.MustParseAddrPort("192.0.2.53:53"))
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	client := dns.Conn{Conn: c}
	if err := client.WriteMsg(new(dns.Msg).SetQuestion("localhost.", dns.TypeA)); err != nil {
		return err
	}
	_, err = client.ReadMsg()
	return err
}

// Names are answered as long as a pod has connections that finish: who has one that waits would not know where to, and
// nobody else answers.
func TestNamesDuringDrain(t *testing.T) {
	m, one, kept := drainLab(t)
	pod := m.pods.pods["n/one"]
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	over := make(chan struct{})
	go func() { defer close(over); pod.stop(ctx) }()
	eventually(t, "draining", func() bool { return pod.status().State == "Stopping" })
	for range 3 {
		if err := name(t, one); err != nil {
			t.Fatal("a name while the pod drains:", err)
		}
	}
	goesOn(t, kept)
	select {
	case <-over:
		t.Error("the connection was not waited for")
	default:
	}
	cancel()
	<-over
}

// A daemon that is told to go serves new connections and names as long as it waits for an old connection: nobody else
// has its pods' devices. It goes as soon as that has ended.
func TestServesOnUntilTheEnd(t *testing.T) {
	m, one, kept := drainLab(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	over := make(chan struct{})
	go func() { defer close(over); m.pods.shutdown(ctx, nil, nil) }()
	eventually(t, "the end's beginning", func() bool {
		m.pods.mu.Lock()
		defer m.pods.mu.Unlock()
		return m.pods.closed
	})
	for end := time.Now().Add(3 * brief / 2); time.Now().Before(end); { // with what is brief and what is not
		if got, err := ask(t, one, "10.1.0.2:80"); err != nil || got != "10.1.0.1\nhello" {
			t.Fatalf("a new connection: %q, %v", got, err)
		}
		if err := name(t, one); err != nil {
			t.Fatal("a name:", err)
		}
	}
	goesOn(t, kept)
	kept.Close()
	select {
	case <-over:
	case <-time.After(time.Minute):
		t.Fatal("it does not end")
	}
}

// What does not end is cut at the deadline, and before it there is a time in which nothing new is taken.
func TestLastCall(t *testing.T) {
	m, _, kept := drainLab(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	over := make(chan struct{})
	go func() { defer close(over); m.pods.shutdown(ctx, nil, nil) }()
	eventually(t, "the last call", func() bool { return m.pods.pods["n/one"].stopping.Load() })
	<-over
	if ctx.Err() == nil {
		t.Error("it ended before the deadline, with a connection open")
	}
	kept.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.Copy(io.Discard, kept); err == nil {
		t.Error("the connection has ended in good order")
	}
}
