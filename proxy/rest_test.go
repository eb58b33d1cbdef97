package proxy

import (
	"errors"
	"io"
	"net"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"ztun/proxy/hbone"
)

// TestRestingConnection: a direction that rests has no goroutine, and whatever happens then happens as if it had one.
func TestRestingConnection(t *testing.T) {
	for name, c := range map[string]struct {
		do    func(w *world, s *hbone.Stream)
		app   error // what the application reads after "ping", nil: its end
		stays bool  // the other direction goes on
	}{
		"data":   {do: func(_ *world, s *hbone.Stream) { io.WriteString(s, "ping"); s.CloseWrite() }, stays: true},
		"end":    {do: func(_ *world, s *hbone.Stream) { s.CloseWrite() }, stays: true},
		"reset":  {do: func(_ *world, s *hbone.Stream) { s.Reset(http2.ErrCodeConnect) }, app: syscall.ECONNRESET},
		"policy": {do: func(w *world, _ *hbone.Stream) { w.forbid9000() }, app: syscall.ECONNRESET},
		"drain":  {do: func(w *world, _ *hbone.Stream) { w.proxies[1].Close() }, app: syscall.ECONNRESET},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.proxies[1].restAfter = 5 * time.Millisecond
			apps := make(chan net.Conn, 1)
			w.listen(appB, func(c net.Conn) { apps <- c; <-t.Context().Done() })
			cc := w.peerOfB("10.91.1.2:4000")
			s, _, err := cc.Open(t.Context(), &hbone.Request{Authority: "10.91.2.2:9000"})
			if err != nil {
				t.Fatal(err)
			}
			app := <-apps
			for range 2 { // from the stream to the application, who is a kernel's and does not rest
				io.WriteString(s, "x")
				if _, err := io.ReadFull(app, make([]byte, 1)); err != nil {
					t.Fatal(err)
				}
				until(t, "the direction to rest", func() bool { return !copiesUpstream() })
			}
			c.do(w, s)
			got, err := io.ReadAll(app)
			if !errors.Is(err, c.app) || string(got) != map[bool]string{true: "ping"}[name == "data"] {
				t.Errorf("the application read %q, %v", got, err)
			}
			if c.stays {
				io.WriteString(app, "pong")
				app.(*net.TCPConn).CloseWrite()
				if got, err := io.ReadAll(s); string(got) != "pong" || err != nil {
					t.Errorf("the peer read %q, %v", got, err)
				}
			}
			w.settle()
		})
	}
}

// TestIdleWorkersEnd: a worker does not stay for what was no connection, or for one that ended after the last sweep.
func TestIdleWorkersEnd(t *testing.T) {
	p := newWorld(t).proxies[1]
	p.restAfter = 5 * time.Millisecond
	for range 3 {
		ended := make(chan struct{})
		p.workers.Go(func() {})
		go func() { p.workers.Work.Wait(); close(ended) }()
		select {
		case <-ended:
		case <-time.After(20 * time.Second):
			t.Fatal("a worker waits for work although there is no connection")
		}
	}
}

// TestRestIsAskedForOnce: a direction that was asked while its write waited counts what it wrote and then rests. It is
// not asked again, which would wake it for nothing at each sweep (netstack.Conn.Rest).
func TestRestIsAskedForOnce(t *testing.T) {
	src, r := &restCounter{}, &restState{}
	s := &copying{}
	s.look(r, 0, src, nil)
	for range 3 {
		s.look(r, 7, src, nil)
	}
	if src.asked != 1 {
		t.Errorf("asked %d times, want once", src.asked)
	}
	r.asked.Store(false) // as the wake-up does
	s.look(r, 7, src, nil)
	if src.asked != 2 {
		t.Errorf("asked %d times after a wake-up, want twice", src.asked)
	}
}

// restCounter counts how often it was asked to rest.
type restCounter struct {
	Conn
	asked int
}

func (c *restCounter) Rest(func()) { c.asked++ }

func (w *world) forbid9000() {
	w.know.publish(loadView(w.t, func(s string) string {
		return strings.Replace(s, "destinationPorts: [7777]", "destinationPorts: [7777, 9000]", 1)
	}))
	w.proxies[1].Recheck()
}

// copiesUpstream reports whether a goroutine copies to an upstream.
func copiesUpstream() bool {
	buf := make([]byte, 1<<20)
	return strings.Contains(string(buf[:runtime.Stack(buf, true)]), "(*copying).copyToUpstream")
}

func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !done(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}
