package proxy

import (
	"context"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"
)

// shortFlow is a fakeFlow whose packets can pass to an application of the world's.
type shortFlow struct {
	*fakeFlow
	w *world
}

// fakeShortcut passes bytes in place of packets: from the client's socket to the application's, and back.
type fakeShortcut struct {
	f  *shortFlow
	up Conn

	mu      sync.Mutex
	down    Conn // nil: not accepted yet
	moved   [2]int
	watch   []func(bool, int)
	ended   []func(error)
	isEnded bool
	why     error
}

func (f *shortFlow) Shortcut(ctx context.Context, to Network, dst netip.AddrPort) (Shortcut, error) {
	return f.made(to.DialApp(ctx, f.src, dst))
}

func (f *shortFlow) ShortcutPlain(ctx context.Context, dst netip.AddrPort) (Shortcut, error) {
	return f.made(f.w.proxies[0].o.Network.DialPlain(ctx, dst))
}

func (f *shortFlow) made(up Conn, err error) (Shortcut, error) {
	if err != nil {
		return nil, err
	}
	f.w.shortcuts.Add(1)
	return &fakeShortcut{f: f, up: up}, nil
}

func (s *fakeShortcut) Accept() error {
	down, err := s.f.Accept()
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.down = down
	s.mu.Unlock()
	var both sync.WaitGroup
	both.Go(func() { s.copy(true, s.up, down) })
	both.Go(func() { s.copy(false, down, s.up) })
	go func() {
		both.Wait()
		s.end()
	}()
	return nil
}

// copy is one way; an end that is not orderly is passed on as a reset.
func (s *fakeShortcut) copy(forth bool, dst, src Conn) {
	b := make([]byte, 4096)
	for {
		n, err := src.Read(b)
		if n > 0 {
			if _, werr := dst.Write(b[:n]); werr != nil {
				err = werr
			} else {
				s.count(forth, n)
			}
		}
		if err == io.EOF {
			dst.CloseWrite()
			return
		}
		if err != nil {
			s.abort()
			return
		}
	}
}

func (s *fakeShortcut) count(forth bool, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.moved[map[bool]int{true: 0, false: 1}[forth]] += n
	for _, w := range s.watch {
		w(forth, n)
	}
}

func (s *fakeShortcut) abort() {
	s.mu.Lock()
	down := s.down
	s.mu.Unlock()
	abort(s.up)
	if down != nil {
		abort(down)
	}
}

func (s *fakeShortcut) end() {
	s.mu.Lock()
	ended, why := s.ended, s.why
	s.ended, s.isEnded = nil, true
	s.mu.Unlock()
	s.up.Close()
	s.down.Close()
	for _, e := range ended {
		e(why)
	}
}

func (s *fakeShortcut) Watch(carried func(bool, int), ended func(error)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	carried(true, s.moved[0])
	carried(false, s.moved[1])
	if s.isEnded {
		go ended(s.why)
		return
	}
	s.watch, s.ended = append(s.watch, carried), append(s.ended, ended)
}

// Reset of one that was never accepted has nobody else to end it.
func (s *fakeShortcut) Reset() {
	s.mu.Lock()
	s.why = net.ErrClosed
	never := s.down == nil
	ended := s.ended
	if never {
		s.ended, s.isEnded = nil, true
	}
	s.mu.Unlock()
	s.abort()
	if never {
		for _, e := range ended {
			go e(net.ErrClosed)
		}
	}
}

// TestShortcutPanic: what panics after the shortcut was made ends it, and nobody waits for it.
func TestShortcutPanic(t *testing.T) {
	w := newLocalWorld(t)
	w.short = true
	c := w.proxies[0].enter(outbound)
	up, down := net.Pipe()
	defer up.Close()
	s := &fakeShortcut{f: &shortFlow{w: w}, up: pipeConn{down}}
	c.shortcut = s
	c.settle()
	up.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := up.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the application's end: %v", err)
	}
	w.settle()
}

type pipeConn struct{ net.Conn }

func (p pipeConn) CloseWrite() error { return p.Close() }
