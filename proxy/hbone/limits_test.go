package hbone

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// TestGreedyReaderIsHonest: a peer that gives back every 4 KiB at once, for the stream and for the connection, takes
// any amount.
func TestGreedyReaderIsHonest(t *testing.T) {
	var stats Stats
	cc, p, b := clientOfRawPeer(t, Config{Stats: &stats, ControlFrames: 20})
	defer cc.Close()
	defer b.Close()
	p.preface2()
	const size = 32 << 20
	done := make(chan error, 1)
	go func() {
		s, _, err := cc.Open(t.Context(), &Request{Authority: "h:1"})
		if err == nil {
			_, err = s.ReadFrom(io.LimitReader(neverending{}, size))
			s.CloseWrite()
		}
		done <- err
	}()
	for got, end := 0, false; !end; {
		f, err := p.fr.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		switch f := f.(type) {
		case *http2.MetaHeadersFrame:
			p.headers(1, false, ":status", "200")
		case *http2.DataFrame:
			got += len(f.Data())
			for left := len(f.Data()); left > 0; left -= 4096 {
				n := uint32(min(left, 4096))
				p.check(0, p.fr.WriteWindowUpdate(0, n))
				p.check(0, p.fr.WriteWindowUpdate(1, n))
			}
			if end = f.StreamEnded(); end && got != size {
				t.Error(got)
			}
		}
	}
	if err := <-done; err != nil || stats.Violations.Load() != 0 {
		t.Error(err, stats.Violations.Load())
	}
}

// preface2 is a server's part.
func (p *rawPeer) preface2() {
	p.t.Helper()
	p.check(0, p.fr.WriteSettings())
}

// TestLateFramesAreHonest: what is on its way when a stream ends is in order, however many streams end so.
func TestLateFramesAreHonest(t *testing.T) {
	t.Run("after a refusal", func(t *testing.T) {
		var stats Stats
		p, _, stop := serve(t, Config{Stats: &stats, ControlFrames: 20}, func(ss *ServerStream) { ss.Refuse(503) })
		defer stop()
		p.preface()
		for id := uint32(1); id < 2000; id += 2 {
			p.connect(id)
			for text := ""; !strings.HasPrefix(text, "RST_STREAM"); {
				var ok bool
				if text, _, ok = p.next(); !ok {
					t.Fatal(id, text)
				}
			}
			p.fr.WriteData(id, false, make([]byte, 100))
			p.fr.WriteWindowUpdate(id, 1)
			p.headers(id, true, "late", "trailers")
			p.fr.WriteRSTStream(id, http2.ErrCodeCancel)
		}
		p.fr.WritePing(false, [8]byte{1})
		p.expect("PING 0 ACK 01")
		if stats.Violations.Load() != 0 {
			t.Error(stats.Violations.Load())
		}
	})
	t.Run("after a client's reset", func(t *testing.T) {
		// A server sends all that the window allows, in the frames that it likes, to a client that has gone.
		var stats Stats
		const window = 256 << 10
		cc, p, b := clientOfRawPeer(t, Config{Stats: &stats, ControlFrames: 20, StreamWindow: window})
		defer cc.Close()
		defer b.Close()
		p.preface2()
		p.fr.WriteSettingsAck()
		for id := uint32(1); id < 60; id += 2 {
			ctx, cancel := context.WithCancel(t.Context())
			opened := make(chan struct{})
			go func() {
				defer close(opened)
				if _, _, err := cc.Open(ctx, &Request{Authority: "h:1"}); !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
			}()
			p.expect("HEADERS")
			cancel()
			<-opened
			p.headers(id, false, ":status", "200")
			for sent := 0; sent+1000 < window; sent += 1000 {
				p.check(0, p.fr.WriteData(id, false, make([]byte, 1000)))
			}
			p.check(0, p.fr.WriteData(id, true, nil))
			p.expect("RST_STREAM")
		}
		p.fr.WritePing(false, [8]byte{1})
		p.expect("PING 0 ACK 01")
		if stats.Violations.Load() != 0 {
			t.Error(stats.Violations.Load())
		}
	})
}

// TestUnreadAnswers: whoever asks and does not read the answers is told to calm down before they are many, however
// they come about.
func TestUnreadAnswers(t *testing.T) {
	for name, h := range map[string]func(ss *ServerStream){
		"refused": func(ss *ServerStream) { ss.Refuse(503) },
		"reset": func(ss *ServerStream) {
			if s, err := ss.Accept(&Response{Status: 200}); err == nil {
				s.Reset(http2.ErrCodeConnect)
			}
		},
		"closed": func(ss *ServerStream) { ss.Accept(&Response{Status: 200}) },
	} {
		t.Run(name, func(t *testing.T) {
			a, b := net.Pipe() // nothing is buffered beneath
			var stats Stats
			sc := NewServerConn(b, Config{Stats: &stats}, h)
			served := make(chan error, 1)
			go func() { served <- sc.Serve(context.Background()) }()
			p := newRawPeer(t, a)
			io.WriteString(a, http2.ClientPreface)
			p.fr.WriteSettings()
			block := p.block(":method", "CONNECT", ":authority", "h:1")
			id := uint32(1)
			for ; id < 100000; id += 2 {
				if p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block, EndHeaders: true}) != nil {
					break
				}
			}
			<-sc.Done()
			if err := <-served; err == nil || !strings.Contains(err.Error(), "ENHANCE_YOUR_CALM") || stats.Calmed.Load() != 1 {
				t.Error(err, stats.Calmed.Load())
			}
			if held := cap(sc.c.ctrl); held > 128<<10 {
				t.Error(held, "bytes of answers held after", id/2, "requests")
			}
			a.Close()
		})
	}
}

// TestRefusalsArePaced: a client that keeps to the limit of streams is refused no faster than is honest, and not cut
// off for it; one that does not is.
func TestRefusalsArePaced(t *testing.T) {
	var stats Stats
	gate := make(chan struct{})
	var shut atomic.Bool
	p, _, stop := serve(t, Config{Stats: &stats, MaxStreams: 50}, func(ss *ServerStream) {
		if shut.Load() {
			<-gate
		}
		ss.Refuse(401)
	})
	defer stop()
	defer close(gate)
	p.preface()
	start, id, open, refused := time.Now(), uint32(1), 0, 0
	for refused < refusalBurst+refusalsPerSecond {
		for ; open < 40; open++ {
			p.connect(id)
			id += 2
		}
		text, _, ok := p.next()
		if !ok {
			t.Fatal(text)
		}
		if strings.HasPrefix(text, "RST_STREAM") {
			open--
			if strings.HasSuffix(text, "REFUSED_STREAM") {
				continue // the goroutines of as many again, answered before, have yet to return
			}
			refused++
			if !strings.HasSuffix(text, "NO_ERROR") {
				t.Fatal(text)
			}
		}
	}
	if d := time.Since(start); d < 800*time.Millisecond || stats.Violations.Load() != 0 {
		t.Error(refused, "refusals in", d, stats.Violations.Load())
	}
	shut.Store(true)            // on a slow machine they would be refused as fast as they come
	for ; open < 2000; open++ { // too many at once
		p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: p.block(":method", "CONNECT", ":authority",
			"h:1"), EndHeaders: true})
		id += 2
	}
	p.expect("ENHANCE_YOUR_CALM")
}

// TestUnreadRequests is the client's side: a server that reads nothing gets no more streams.
func TestUnreadRequests(t *testing.T) {
	a, b := net.Pipe()
	cc, err := NewClientConn(a, Config{PingEvery: -1})
	if err != nil {
		t.Fatal(err)
	}
	p := newRawPeer(t, b)
	p.preface2() // it speaks, and does not listen
	opened := 0
	for ; opened < 5000; opened++ {
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(50*time.Microsecond, cancel)
		if _, _, err = cc.Open(ctx, &Request{Authority: "h:1"}); errors.Is(err, ErrSaturated) {
			break
		}
	}
	if !errors.Is(err, ErrSaturated) || opened < 100 || cc.CanTakeStream() {
		t.Error(opened, "streams opened:", err)
	}
	b.Close()
	cc.Close()
}
