package hbone

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"ztun/proxy/rescue"
)

// written calls f when nobody writes.
func (c *conn) written(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.flushing || c.hasWork() {
		c.mu.Unlock()
		time.Sleep(time.Millisecond)
		c.mu.Lock()
	}
	f()
}

// TestRequestsDoNotWait: who asks writes himself, but does not wait for a peer that does not read; and all that was
// asked arrives whole and in order once it does.
func TestRequestsDoNotWait(t *testing.T) {
	cc, p, b := clientOfRawPeer(t, Config{})
	defer cc.Close()
	defer b.Close()
	p.preface2()
	cc.c.written(func() {})
	const n = 2000 // of 8 KB: more than sockets on loopback take
	baggage := strings.Repeat("\xff", 8<<10)
	asked := make(chan error, 1)
	go func() {
		var err error
		for range n {
			if _, e := cc.request(context.Background(), &Request{Authority: "h:1", Baggage: baggage}, nil); e != nil {
				err = e
			}
		}
		asked <- err
	}()
	select {
	case err := <-asked:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(patience):
		t.Fatal("requests wait for the peer to read")
	}
	p.fr.ReadMetaHeaders.SetMaxStringLength(64 << 10)
	p.fr.MaxHeaderListSize = 64 << 10
	for next := uint32(1); next < 2*n; {
		f, err := p.fr.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		h, ok := f.(*http2.MetaHeadersFrame)
		if !ok {
			continue
		}
		if h.StreamID != next || len(h.RegularFields()) == 0 || h.RegularFields()[0].Value != baggage {
			t.Fatalf("stream %d, where %d should be", h.StreamID, next)
		}
		next += 2
	}
}

// TestWriterPanics: a panic of who writes his own request ends the tunnel, for nobody else would write for it.
func TestWriterPanics(t *testing.T) {
	panics := rescue.New(slog.New(slog.DiscardHandler))
	cc, p, b := clientOfRawPeer(t, Config{Panics: panics})
	defer cc.Close()
	defer b.Close()
	p.preface2()
	cc.c.written(func() { cc.c.brief = &sockWriter{} }) // without a socket
	ctx, cancel := context.WithTimeout(context.Background(), patience/3)
	defer cancel()
	if _, _, err := cc.Open(ctx, &Request{Authority: "h:1"}); err == nil || ctx.Err() != nil {
		t.Errorf("a request whose writer panics: %v", err)
	}
	if panics.Total() == 0 {
		t.Error("no panic was counted")
	}
}

// interrupted has something happen while a batch is written.
type interrupted struct {
	transport
	meanwhile func()
}

func (t *interrupted) seal(out, plain []byte) ([]byte, error) {
	t.meanwhile()
	return t.transport.seal(out, plain)
}

// TestLastWriteFails: a tunnel whose reader has met something that ends it, and leaves the last word to a user who is
// writing, ends when that write fails: whoever closes it waits for that.
func TestLastWriteFails(t *testing.T) {
	a, b := tcpPair(t)
	defer b.Close()
	c := newClientConn(a, Config{}).c
	c.started = true // by a reader that ends in the middle of the write
	c.tr = &interrupted{c.tr, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.readerGone = true
		c.leaveLocked(http2.ErrCodeProtocol, io.ErrUnexpectedEOF)
		a.CloseWrite()
	}}
	c.mu.Lock()
	c.framer.WritePing(false, [8]byte{})
	c.flushHere()
	select {
	case <-c.done:
	case <-time.After(patience / 3):
		t.Error("nobody ends the tunnel")
	}
	a.Close()
}

// counted counts records.
type counted struct {
	transport
	sealed atomic.Int32
}

func (t *counted) seal(out, plain []byte) ([]byte, error) {
	t.sealed.Add(1)
	return t.transport.seal(out, plain)
}

// TestRequestsGoTogether: what several users ask at the same time goes in few records. One processor, so that they are
// ready at the same time.
func TestRequestsGoTogether(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	a, b := tcpPair(t)
	defer b.Close()
	cc := newClientConn(a, Config{})
	records := &counted{transport: cc.c.tr}
	cc.c.tr = records
	cc.c.start()
	defer cc.Close()
	ask := func() {
		if _, err := cc.request(context.Background(), &Request{Authority: "h:1"}, nil); err != nil {
			t.Error(err)
		}
	}
	ask() // one alone does not wait for others
	cc.c.written(func() {})
	before := records.sealed.Load()
	const n = 64
	start := make(chan struct{})
	var work sync.WaitGroup
	for range n {
		work.Go(func() {
			<-start
			ask()
		})
	}
	close(start)
	work.Wait()
	cc.c.written(func() {})
	if got := records.sealed.Load() - before; got > n/2 {
		t.Errorf("%d records for %d requests", got, n)
	}
}

// scripted is a source whose end may be known together with its bytes.
type scripted struct {
	parts   []string
	early   bool // it says in time that more can be read
	waited  atomic.Int32
	goahead chan struct{} // closed: its end may be seen
}

func (s *scripted) WaitRead() error {
	if s.waited.Add(1) > 1 {
		<-s.goahead
	}
	return nil
}
func (s *scripted) Readable() bool { return s.early }
func (s *scripted) Read(p []byte) (int, error) {
	if len(s.parts) == 0 {
		return 0, io.EOF
	}
	n := copy(p, s.parts[0])
	s.parts = s.parts[1:]
	return n, nil
}

// TestEndGoesWithLastBytes: END_STREAM does not wait for CloseWrite where the source says in time that it has ended,
// what can be read at once goes in one frame, and without that nothing is ended early.
func TestEndGoesWithLastBytes(t *testing.T) {
	for _, early := range []bool{true, false} {
		cc, p, b := clientOfRawPeer(t, Config{})
		p.preface2()
		opened := make(chan *Stream, 1)
		go func() {
			s, _, err := cc.Open(t.Context(), &Request{Authority: "h:1"})
			if err != nil {
				t.Error(err)
			}
			opened <- s
		}()
		next := func() *http2.DataFrame {
			for {
				f, err := p.fr.ReadFrame()
				if err != nil {
					t.Fatal(err)
				}
				switch f := f.(type) {
				case *http2.MetaHeadersFrame:
					p.headers(1, false, ":status", "200")
				case *http2.DataFrame:
					return f
				}
			}
		}
		src := &scripted{parts: []string{"one", "two"}, early: early, goahead: make(chan struct{})}
		read := make(chan int64, 1)
		go func() {
			s := <-opened
			n, err := s.ReadToEnd(src)
			if err != nil {
				t.Error(err)
			}
			read <- n
			<-src.goahead
			if err := s.CloseWrite(); err != nil {
				t.Error(err)
			}
		}()
		want := map[bool]string{true: "onetwo", false: "one"}[early]
		if f := next(); string(f.Data()) != want || f.StreamEnded() {
			t.Errorf("early %v: first frame %q", early, f.Data())
		}
		if early { // without CloseWrite
			if f := next(); len(f.Data()) != 0 || !f.StreamEnded() {
				t.Errorf("early: second frame %q", f.Data())
			}
			close(src.goahead)
		} else {
			close(src.goahead)
			if f := next(); string(f.Data()) != "two" || f.StreamEnded() {
				t.Errorf("late: second frame %q", f.Data())
			}
			if f := next(); len(f.Data()) != 0 || !f.StreamEnded() {
				t.Errorf("late: last frame %q", f.Data())
			}
		}
		if n := <-read; n != 6 {
			t.Errorf("early %v: %d bytes", early, n)
		}
		cc.Close()
		b.Close()
	}
}

// TestFirstFrameIsLarge: a stream that has sent nothing yet takes all that its source says it has into one frame.
func TestFirstFrameIsLarge(t *testing.T) {
	a, b := tlsPair(t, false)
	cc, sc, reqs, stop := link(t, a, b, Config{})
	defer stop()
	c, s := pair(t, cc, reqs)
	frames := make(chan uint8, 4)
	src := &buffered{Reader: bytes.NewReader(make([]byte, bulkLen)), read: func(size int) {
		if size > 0 {
			frames <- c.class
		}
	}}
	if n, err := c.ReadFrom(src); err != nil || n != bulkLen {
		t.Fatalf("%d bytes, %v", n, err)
	}
	eventually(t, func() bool { return sc.c.unread.Load() == bulkLen })
	if got := <-frames; int(got) != len(frameLens)-1 || len(frames) > 0 {
		t.Errorf("the first frame is of class %d, and %d followed", got, len(frames))
	}
	s.Reset(http2.ErrCodeCancel)
}

// buffered is a source that tells how much it has.
type buffered struct {
	*bytes.Reader
	read func(size int)
}

func (b *buffered) Buffered() int { return b.Len() }
func (b *buffered) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	b.read(n)
	return n, err
}
