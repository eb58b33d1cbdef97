package hbone

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// TestStress lets many streams of one connection do all that streams can do at once: half-close, abandon, reset,
// miss deadlines, be slow. Whoever gets bytes must get the right ones, in order; nobody may hang.
func TestStress(t *testing.T) {
	for name, mk := range transports(t) {
		t.Run(name, func(t *testing.T) {
			a, b := mk(t)
			sc := NewServerConn(b, Config{Resets: 1 << 20}, func(ss *ServerStream) {
				r := rand.New(rand.NewPCG(uint64(len(ss.Authority())), 1))
				if r.IntN(20) == 0 {
					ss.Refuse(503)
					return
				}
				s, err := ss.Accept(&Response{Status: 200})
				if err != nil {
					return
				}
				switch r.IntN(4) {
				case 0:
					io.CopyN(s, s, int64(r.IntN(1<<18)))
					s.Reset(http2.ErrCodeConnect)
				default:
					s.WriteTo(s)
					s.CloseWrite()
				}
			})
			served := make(chan error, 1)
			go func() { served <- sc.Serve(t.Context()) }()
			cc, err := NewClientConn(a, Config{})
			if err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			var whole, torn atomic.Int32
			for i := range 16 {
				wg.Go(func() {
					r := rand.New(rand.NewPCG(uint64(i), 2))
					for range 12 {
						if stressOne(t, cc, r) {
							whole.Add(1)
						} else {
							torn.Add(1)
						}
					}
				})
			}
			wg.Wait()
			if whole.Load() == 0 || torn.Load() == 0 {
				t.Error(whole.Load(), torn.Load())
			}
			eventually(t, func() bool { return cc.Streams() == 0 && sc.Streams() == 0 })
			if err := cc.Err(); err != nil {
				t.Error(err)
			}
			eventually(t, func() bool { return cc.c.unread.Load() == 0 && sc.c.unread.Load() == 0 })
			cc.Close()
			<-served
		})
	}
}

// stressOne is one stream's life; it reports whether everything came back.
func stressOne(t *testing.T, cc *ClientConn, r *rand.Rand) bool {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	s, _, err := cc.Open(ctx, &Request{Authority: "h:" + string(bytes.Repeat([]byte("1"), r.IntN(50)))})
	var status *StatusError
	if errors.As(err, &status) {
		return false
	}
	if err != nil {
		t.Error(err)
		return false
	}
	defer s.Close()
	data := payload(r.IntN(400_000) + 1)
	how := r.IntN(6)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		var err error
		switch how {
		case 0: // small writes
			for b := data; len(b) > 0 && err == nil; {
				n := min(len(b), 3000)
				_, err = s.Write(b[:n])
				b = b[n:]
			}
		case 1: // with deadlines that are missed
			for b := data; len(b) > 0; {
				s.SetWriteDeadline(time.Now().Add(time.Duration(len(b)%5+1) * 100 * time.Microsecond))
				var n int
				n, err = s.Write(b)
				b = b[n:]
				if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
					break
				}
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				err = nil
			}
		default:
			_, err = s.ReadFrom(bytes.NewReader(data))
		}
		if err == nil {
			err = s.CloseWrite()
		}
		if err != nil && !errors.Is(err, net.ErrClosed) && !errors.Is(err, syscall.ECONNRESET) &&
			!errors.Is(err, syscall.EPIPE) {
			t.Error(err)
		}
	})
	var got bytes.Buffer
	switch how {
	case 2: // gives up in the middle
		io.CopyN(&got, s, int64(len(data)/2))
		s.Close()
	case 3:
		io.CopyN(&got, s, int64(len(data)/2))
		s.Reset(http2.ErrCodeCancel)
	case 4: // slow
		for {
			s.SetReadDeadline(time.Now().Add(time.Millisecond))
			_, err := io.CopyN(&got, s, 50_000)
			if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
		}
	default:
		s.WriteTo(&got)
	}
	if !bytes.Equal(got.Bytes(), data[:min(got.Len(), len(data))]) || got.Len() > len(data) {
		t.Error("wrong bytes")
	}
	return got.Len() == len(data)
}
