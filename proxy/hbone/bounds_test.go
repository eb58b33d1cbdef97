package hbone

import (
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// TestRapidResetIsBlamed: requests that are reset before their answer are counted, even if each is over and done with
// before the next one comes.
func TestRapidResetIsBlamed(t *testing.T) {
	began, ended := make(chan struct{}), make(chan struct{})
	var stats Stats
	p, sc, stop := serve(t, Config{Resets: 20, Stats: &stats}, func(ss *ServerStream) {
		ctx, release := ss.Context(t.Context())
		began <- struct{}{}
		<-ctx.Done()
		release()
		ended <- struct{}{}
	})
	defer stop()
	p.preface()
	for i := range uint32(100) {
		p.connect(2*i + 1)
		select {
		case <-began:
		case <-sc.Done():
			if i < 20 || i > 30 || stats.Calmed.Load() != 1 {
				t.Error("ended after", i, stats.Calmed.Load())
			}
			return
		}
		p.fr.WriteRSTStream(2*i+1, http2.ErrCodeCancel)
		<-ended
		eventually(t, func() bool { return sc.c.running.Load() == 0 })
	}
	t.Error("no end to it")
}

// TestRunningHandlers: handlers that outlive their streams count, too.
func TestRunningHandlers(t *testing.T) {
	const most = 3
	proceed := make(chan struct{})
	p, sc, stop := serve(t, Config{MaxStreams: most}, func(ss *ServerStream) {
		ss.Accept(&Response{Status: 200})
		<-proceed
	})
	defer stop()
	p.preface()
	id := uint32(1)
	for range 2 * most {
		p.connect(id)
		p.expect("HEADERS")
		p.fr.WriteRSTStream(id, http2.ErrCodeCancel) // after the answer: nothing to blame
		id += 2
	}
	eventually(t, func() bool { return sc.Streams() == 0 })
	p.connect(id)
	p.expect("REFUSED_STREAM")
	close(proceed)
	eventually(t, func() bool { return sc.c.running.Load() == 0 })
	p.connect(id + 2)
	p.expect(":status=200")
}

// TestGoAwayLeavesStreamsUnprocessed: streams above the last one of a GOAWAY may be asked for elsewhere, those up to it
// may not: they go on.
func TestGoAwayLeavesStreamsUnprocessed(t *testing.T) {
	cc, p, b := clientOfRawPeer(t, Config{})
	defer cc.Close()
	defer b.Close()
	p.preface2()
	opened := make([]chan error, 3)
	for i := range opened {
		opened[i] = make(chan error, 1)
		go func() {
			_, _, err := cc.Open(t.Context(), &Request{Authority: "h:1"})
			opened[i] <- err
		}()
		p.expect("HEADERS")
	}
	p.fr.WriteGoAway(3, http2.ErrCodeNo, nil)
	var se *StreamError
	if err := <-opened[2]; !errors.As(err, &se) || !se.Unprocessed || !se.Remote {
		t.Errorf("above the last: %v", err)
	}
	for i := range 2 {
		p.headers(uint32(2*i+1), false, ":status", "200")
		if err := <-opened[i]; err != nil {
			t.Errorf("stream %d: %v", 2*i+1, err)
		}
	}
	if _, _, err := cc.Open(t.Context(), &Request{Authority: "h:1"}); !errors.Is(err, ErrGoAway) {
		t.Error(err)
	}
}

// nowhere is a connection that is never used.
type nowhere struct{ net.Conn }

// TestBulkIsNotStarved: however many small frames wait, bulk gets half of each batch; and small ones come first.
func TestBulkIsNotStarved(t *testing.T) {
	c := newConn(nowhere{}, Config{}, true)
	add := func(n int) *Stream {
		s := newStream(c, c.nextID)
		c.nextID += 2
		c.streams[s.id] = s
		s.sendWin = 1 << 30
		s.pend = c.bufs.frame(classFor(n))
		s.pend.end += n
		c.schedule(s)
		return s
	}
	c.sendWin = 1 << 30
	bulk := map[uint32]bool{}
	for range 12 { // more than four batches take
		bulk[add(60000).id] = true
	}
	for range 1000 {
		add(lightLen)
	}
	for round := range 4 {
		if !c.assemble() {
			t.Fatal("nothing to send")
		}
		light, heavy := 0, 0
		for i, e := range c.plan {
			if bulk[e.id] {
				heavy += e.n
			} else if light += e.n; heavy > 0 {
				t.Errorf("round %d: a small frame behind bulk, at %d", round, i)
			}
			c.plan[i].f = nil
		}
		if light < c.cfg.Batch/2-2*lightLen || heavy == 0 {
			t.Errorf("round %d: %d bytes of small frames, %d of bulk", round, light, heavy)
		}
	}
}

// TestFloodEndsSoon: who was told to calm down is not listened to for half a second, as others are.
func TestFloodEndsSoon(t *testing.T) {
	var took time.Duration
	for end := time.Now().Add(patience); time.Now().Before(end); { // the machine may be busy; it is never that quick
		p, sc, stop := serve(t, Config{ControlFrames: 10}, nil)
		p.preface()
		start := time.Now()
		for p.fr.WritePing(false, [8]byte{1}) == nil {
		}
		<-sc.Done()
		took = time.Since(start)
		stop()
		if err := sc.Err(); err == nil || !strings.Contains(err.Error(), "ENHANCE_YOUR_CALM") {
			t.Error(err)
		}
		if took < partingStep*4/5 {
			return
		}
	}
	t.Error("listened to for", took)
}

// TestConfigBounds: what a configuration asks for stays within what HTTP/2 allows, and stream users write to a socket
// of their own accord.
func TestConfigBounds(t *testing.T) {
	const most = 1<<32 - 1
	for _, client := range []bool{true, false} {
		big := Config{StreamWindow: most, ConnWindow: most, FrameSize: most}.withDefaults(client)
		small := Config{StreamWindow: 1, ConnWindow: 1, FrameSize: 1}.withDefaults(client)
		if big.StreamWindow != 1<<31-1 || big.ConnWindow != 1<<31-1 || big.FrameSize != 1<<24-1 || small.StreamWindow != 1 ||
			small.ConnWindow != 65535 || small.FrameSize != 16384 {
			t.Errorf("%+v %+v", big, small)
		}
	}
	a, b := tcpPair(t)
	defer a.Close()
	defer b.Close()
	x, y := net.Pipe()
	defer x.Close()
	defer y.Close()
	if !newConn(a, Config{}, true).inline || newConn(x, Config{}, true).inline {
		t.Error("who writes?")
	}
}

// TestInformational: any number that is sane of them may come before the answer, 101 may not.
func TestInformational(t *testing.T) {
	cc, p, b := clientOfRawPeer(t, Config{})
	defer cc.Close()
	defer b.Close()
	p.preface2()
	for id, codes := range [][]string{{"100", "103", "199", "200"}, {"101", "200"}} {
		opened := make(chan error, 1)
		go func() {
			_, _, err := cc.Open(t.Context(), &Request{Authority: "h:1"})
			opened <- err
		}()
		p.expect("HEADERS")
		for _, code := range codes {
			p.headers(uint32(2*id+1), false, ":status", code)
		}
		var se *StreamError
		if err := <-opened; id == 0 && err != nil || id == 1 && (!errors.As(err, &se) || se.Code != http2.ErrCodeProtocol) {
			t.Error(codes, err)
		}
	}
}

// TestEndOfConnection: a peer that hangs up has done so in good order if nothing was open, or if it said GOAWAY before;
// otherwise it was cut.
func TestEndOfConnection(t *testing.T) {
	for _, tc := range []struct{ stream, goaway, good bool }{
		{false, false, true}, {false, true, true}, {true, true, true}, {true, false, false},
	} {
		a, b := tcpPair(t)
		sc := NewServerConn(b, Config{}, func(ss *ServerStream) {
			ss.Accept(&Response{Status: 200})
			<-ss.Done()
		})
		served := make(chan error, 1)
		go func() { served <- sc.Serve(t.Context()) }()
		p := newRawPeer(t, a)
		p.preface()
		p.expect("SETTINGS 0 ACK")
		if tc.stream {
			p.connect(1)
			p.expect(":status=200")
		}
		if tc.goaway {
			p.fr.WriteGoAway(0, http2.ErrCodeNo, nil)
		}
		a.CloseWrite()
		if err := <-served; tc.good != (err == nil) || !tc.good && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%+v: %v", tc, err)
		}
		a.Close()
	}
}
