package e2e

import (
	"context"
	"crypto/rand"
	"io"
	"net"
	"strconv"
	"sync"
	"testing"
	"time"

	"ztun/test/lab"
)

// door is a TCP relay in front of a server that can be made to misbehave.
type door struct {
	ns     *lab.NS
	ip     string
	port   int
	behind string
	l      net.Listener
	work   sync.WaitGroup

	mu    sync.Mutex
	mode  string // "", "shut", "hung", "slow", "garbage"
	conns map[net.Conn]struct{}
	end   chan struct{}
}

func newDoor(t testing.TB, ns *lab.NS, ip string, port, behind int) *door {
	t.Helper()
	d := &door{ns: ns, ip: ip, port: port, behind: net.JoinHostPort(ip, strconv.Itoa(behind)),
		conns: map[net.Conn]struct{}{}, end: make(chan struct{})}
	must(t, d.listen())
	t.Cleanup(func() {
		close(d.end)
		d.set("shut")
		d.work.Wait()
	})
	return d
}

func (d *door) listen() error {
	l, err := d.ns.Listen("tcp", net.JoinHostPort(d.ip, strconv.Itoa(d.port)))
	if err != nil {
		return err
	}
	d.l = l
	d.work.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			d.work.Go(func() { d.serve(c) })
		}
	})
	return nil
}

// set changes how it behaves from now on. "shut" cuts what is open and refuses; leaving any mode for "" cuts what it
// had let in.
func (d *door) set(mode string) {
	d.mu.Lock()
	was := d.mode
	d.mode = mode
	if mode == "shut" || mode == "garbage" || was != "" {
		for c := range d.conns {
			c.Close()
		}
	}
	d.mu.Unlock()
	if mode == "shut" {
		d.l.Close()
	} else if was == "shut" {
		d.listen()
	}
}

func (d *door) now() string { d.mu.Lock(); defer d.mu.Unlock(); return d.mode }

func (d *door) serve(c net.Conn) {
	d.mu.Lock()
	d.conns[c] = struct{}{}
	d.mu.Unlock()
	defer func() {
		c.Close()
		d.mu.Lock()
		delete(d.conns, c)
		d.mu.Unlock()
	}()
	if d.now() == "garbage" {
		junk := make([]byte, 64<<10)
		rand.Read(junk)
		c.Write(junk)
		return
	}
	up, err := d.ns.Dial(context.Background(), "tcp", d.behind)
	if err != nil {
		return
	}
	defer up.Close()
	done := make(chan struct{})
	d.work.Go(func() { defer close(done); defer up.Close(); d.copy(up, c) })
	d.copy(c, up)
	c.Close()
	<-done
}

// copy obeys the mode with every piece.
func (d *door) copy(dst io.Writer, src io.Reader) {
	b := make([]byte, 16<<10)
	for {
		part := b
		if d.now() == "slow" {
			part = b[:100]
			if !d.sleep(50 * time.Millisecond) {
				return
			}
		}
		n, err := src.Read(part)
		for d.now() == "hung" {
			if !d.sleep(50 * time.Millisecond) {
				return
			}
		}
		if n > 0 {
			if _, err := dst.Write(b[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

func (d *door) sleep(t time.Duration) bool {
	select {
	case <-d.end:
		return false
	case <-time.After(t):
		return true
	}
}
