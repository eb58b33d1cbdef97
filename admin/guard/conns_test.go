package guard

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"testing"
	"time"
)

// server serves h behind the bounds of o until the test ends.
func server(t *testing.T, o ConnsOptions, h http.Handler) (*Conns, string) {
	t.Helper()
	l, err := net.Listen("tcp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	c := NewConns(o)
	s := &http.Server{Handler: h, ConnState: c.Change}
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(l) }()
	t.Cleanup(func() { s.Close(); <-done })
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return c, port
}

// dial connects from one of loopback's addresses.
func dial(t *testing.T, from, port string) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: 10 * time.Second}
	c, err := d.Dial("tcp4", from+":"+port)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(10 * time.Second))
	return c
}

func ask(c net.Conn) error {
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		return err
	}
	r, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	_, err = io.Copy(io.Discard, r.Body)
	return err
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// TestHalfOpen: neither the same source's nor another's half-open connections keep a request out, and another's
// connection that is idle stays.
func TestHalfOpen(t *testing.T) {
	c, port := server(t, ConnsOptions{Waiting: 16}, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	kept := dial(t, "127.0.0.3", port)
	if err := ask(kept); err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		a := dial(t, "127.0.0.2", port)
		io.WriteString(a, "GET /healthz")
		if i%10 != 0 {
			continue
		}
		for _, from := range []string{"127.0.0.2", "127.0.0.4"} {
			if err := ask(dial(t, from, port)); err != nil {
				t.Fatalf("after %d half-open connections, from %s: %v", i+1, from, err)
			}
		}
	}
	until(t, "80 turned away", func() bool { return c.Turned() >= 80 })
	if err := ask(kept); err != nil {
		t.Errorf("the bystander's idle connection was cut: %v", err)
	}
	if n := c.Waiting(); n > 16 {
		t.Errorf("%d places taken of 16", n)
	}
}

// TestBusy: requests that are never over do not keep others from being answered, unless that is asked for.
func TestBusy(t *testing.T) {
	for _, keep := range []bool{false, true} {
		release := make(chan struct{})
		entered := make(chan struct{}, 100)
		c, port := server(t, ConnsOptions{Busy: 4, KeepBusy: keep},
			http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Header.Get("X-Slow") != "" {
					entered <- struct{}{}
					<-release
				}
			}))
		var slow []net.Conn
		for range 4 {
			a := dial(t, "127.0.0.2", port)
			io.WriteString(a, "GET / HTTP/1.1\r\nHost: x\r\nX-Slow: 1\r\n\r\n")
			<-entered
			slow = append(slow, a)
		}
		err := ask(dial(t, "127.0.0.3", port))
		if keep != (err != nil) {
			t.Errorf("keep %v: the newcomer got %v", keep, err)
		}
		close(release)
		_, err = http.ReadResponse(bufio.NewReader(slow[0]), nil)
		if keep != (err == nil) {
			t.Errorf("keep %v: the oldest got %v", keep, err)
		}
		if _, err := http.ReadResponse(bufio.NewReader(slow[3]), nil); err != nil {
			t.Errorf("keep %v: the newest of the slow got %v", keep, err)
		}
		for _, a := range slow {
			a.Close()
		}
		until(t, "no places taken", func() bool { return c.Open() <= 1 && c.busy.Used() == 0 })
	}
}
