package hbone

import (
	"bytes"
	"context"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"ztun/proxy/fair"
)

// TestPausedReaders: readers who pause, many more than fill the connection's window, stall themselves only, hold
// little, and get all of it when they go on; both ways.
func TestPausedReaders(t *testing.T) {
	const paused, each = 60, 5 << 20
	for _, up := range []bool{true, false} {
		a, b := tlsPair(t, false)
		cc, sc, reqs, stop := link(t, a, b, Config{})
		receiver := sc.c
		if !up {
			receiver = cc.c
		}
		open := func() (w, r *Stream) {
			w, r = pair(t, cc, reqs)
			if !up {
				w, r = r, w
			}
			return w, r
		}
		var wg sync.WaitGroup
		var readers []*Stream
		fill := func(n int) {
			for range n {
				w, r := open()
				readers = append(readers, r)
				wg.Go(func() {
					io.Copy(w, io.LimitReader(neverending{}, each))
					w.CloseWrite()
				})
			}
		}
		fill(8)
		eventually(t, func() bool { receiver.mu.Lock(); defer receiver.mu.Unlock(); return receiver.crowded })
		fill(paused - 8)
		time.Sleep(200 * time.Millisecond)
		if held, bound := receiver.unread.Load(), int64(2*16<<20); held > bound {
			t.Errorf("up %v: %d bytes held for %d readers who pause, want %d at most", up, held, paused, bound)
		}
		w, r := open()
		w.SetWriteDeadline(time.Now().Add(patience))
		r.SetReadDeadline(time.Now().Add(patience))
		wg.Go(func() {
			if n, err := io.Copy(w, io.LimitReader(neverending{}, 32<<20)); n != 32<<20 {
				t.Errorf("up %v: a stream beside them sent %d bytes: %v", up, n, err)
			}
		})
		if n, err := io.ReadFull(r, make([]byte, 32<<20)); err != nil {
			t.Errorf("up %v: a stream beside them got %d bytes: %v", up, n, err)
		}
		for i, r := range readers { // one after the other
			r.SetReadDeadline(time.Now().Add(patience))
			if n, err := io.Copy(io.Discard, r); n != each || err != nil {
				t.Fatalf("up %v: reader %d got %d bytes of %d: %v", up, i, n, each, err)
			}
		}
		wg.Wait()
		receiver.mu.Lock()
		grown := receiver.grown
		receiver.mu.Unlock()
		if grown > 16<<20 {
			t.Errorf("up %v: windows have grown by %d", up, grown)
		}
		stop()
	}
}

// TestWindowsComeBack: what streams' windows have grown by goes with them.
func TestWindowsComeBack(t *testing.T) {
	a, b := tcpPair(t)
	cc, sc, reqs, stop := link(t, a, b, Config{})
	defer stop()
	for range 20 {
		w, r := pair(t, cc, reqs)
		go io.Copy(w, io.LimitReader(neverending{}, 8<<20))
		io.ReadFull(r, make([]byte, 8<<20))
		w.Reset(http2.ErrCodeCancel)
		r.Close()
	}
	eventually(t, func() bool {
		sc.c.mu.Lock()
		defer sc.c.mu.Unlock()
		return sc.c.grown == 0
	})
}

// TestUnreadIsBounded: streams that are over can leave more behind than live ones can hold; the connection's window
// does not come back for it before it is read.
func TestUnreadIsBounded(t *testing.T) {
	const window = 1 << 17
	streams := make(chan *Stream, 16)
	p, sc, stop := serve(t, Config{StreamWindow: 1 << 16, ConnWindow: window}, func(ss *ServerStream) {
		s, _ := ss.Accept(&Response{Status: 200})
		s.CloseWrite()
		ss.Detach()
		streams <- s
	})
	defer stop()
	p.preface()
	p.fr.WriteSettingsAck()
	var credit, sent atomic.Int64
	credit.Store(window) // the WINDOW_UPDATE of the start is not counted below
	go func() {
		for first := true; ; {
			f, err := p.fr.ReadFrame()
			if err != nil {
				return
			}
			if u, ok := f.(*http2.WindowUpdateFrame); ok && u.StreamID == 0 {
				if first {
					first = false
				} else {
					credit.Add(int64(u.Increment))
				}
			}
		}
	}()
	var opened []*Stream
	// 64 KiB on a stream of its own, which then is over; false: it took too long to be allowed to
	send := func(id uint32, within time.Duration) bool {
		for until := time.Now().Add(within); credit.Load()-sent.Load() < 1<<16; time.Sleep(time.Millisecond) {
			if time.Now().After(until) {
				return false
			}
		}
		p.connect(id)
		opened = append(opened, <-streams)
		for range 4 {
			p.fr.WriteData(id, false, make([]byte, 1<<14))
		}
		p.fr.WriteData(id, true, nil)
		sent.Add(1 << 16)
		return true
	}
	n, wait := 0, patience
	for n < 16 && send(uint32(2*n+1), wait) {
		if n++; n >= 4 {
			wait = 3 * time.Second // to see that there is no more
		}
	}
	if total := int64(n) << 16; total > 4*window || n < 4 {
		t.Fatalf("%d bytes were taken that nobody reads, with a window of %d", total, window)
	}
	if sc.c.cfg.Stats.Withheld.Load() == 0 {
		t.Error("nothing was withheld")
	}
	for _, s := range opened {
		io.Copy(io.Discard, s)
	}
	if !send(uint32(2*n+1), patience) {
		t.Error("the window did not come back when everything was read")
	}
}

// hoarder is a server as ztunnel is one: 4 MiB for a stream, 16 for the connection, given back as they are read, by
// thirds; streams up to id pause are never read.
type hoarder struct {
	pause uint32
	got   sync.Map // stream id -> *atomic.Int64
}

func (h *hoarder) serve(c net.Conn) {
	defer c.Close()
	const streamWindow, connWindow = 4 << 20, 16 << 20
	io.ReadFull(c, make([]byte, len(http2.ClientPreface)))
	fr := http2.NewFramer(c, c)
	fr.SetMaxReadFrameSize(1 << 20)
	fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: streamWindow},
		http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1 << 20})
	fr.WriteWindowUpdate(0, connWindow-65535)
	type window struct{ left, owed uint32 }
	conn, streams := &window{left: connWindow}, map[uint32]*window{}
	eat := func(w *window, id, n uint32) { // as the h2 library does
		if w.owed += n; w.owed >= w.left/2 {
			fr.WriteWindowUpdate(id, w.owed)
			w.left, w.owed = w.left+w.owed, 0
		}
	}
	for {
		f, err := fr.ReadFrame()
		if err != nil {
			return
		}
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				fr.WriteSettingsAck()
			}
		case *http2.HeadersFrame:
			streams[f.StreamID] = &window{left: streamWindow}
			h.got.Store(f.StreamID, new(atomic.Int64))
			var b bytes.Buffer
			hpack.NewEncoder(&b).WriteField(hpack.HeaderField{Name: ":status", Value: "200"})
			fr.WriteHeaders(http2.HeadersFrameParam{StreamID: f.StreamID, BlockFragment: b.Bytes(), EndHeaders: true})
		case *http2.DataFrame:
			n := uint32(len(f.Data()))
			s := streams[f.StreamID]
			if s.left -= n; s.left > streamWindow {
				return // overdrawn
			}
			conn.left -= n
			got, _ := h.got.Load(f.StreamID)
			got.(*atomic.Int64).Add(int64(n))
			if f.StreamID > h.pause {
				eat(s, f.StreamID, n)
				eat(conn, 0, n)
			}
		}
	}
}

// TestPausedReadersOfOthers: a peer whose connection window is four streams' windows, and comes back as it is read.
// Four streams that it does not read leave the others room, and their tunnel gets no new streams.
func TestPausedReadersOfOthers(t *testing.T) {
	const paused = 4
	h := &hoarder{pause: 2*paused - 1}
	var dials atomic.Int32
	var wg sync.WaitGroup
	p := NewPool(PoolOptions{Dial: func(context.Context, Key) (Dialled, error) {
		dials.Add(1)
		a, b := tcpPair(t)
		h := h
		if dials.Load() > 1 {
			h = &hoarder{}
		}
		wg.Go(func() { h.serve(b) })
		return Dialled{Conn: a}, nil
	}})
	open := func() *Stream {
		s, _, err := p.Open(t.Context(), testKey(1), &Request{Authority: "h:1"})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	var all []*Stream
	for range paused + 1 {
		all = append(all, open())
	}
	for _, s := range all[:paused] {
		wg.Go(func() { io.Copy(s, neverending{}) })
	}
	eventually(t, func() bool { return all[0].c.stuck() })
	last := all[paused]
	last.SetWriteDeadline(time.Now().Add(patience))
	if n, err := io.Copy(last, io.LimitReader(neverending{}, 64<<20)); n != 64<<20 {
		t.Errorf("the stream beside %d that are not read sent %d bytes: %v", paused, n, err)
	}
	if s := open(); dials.Load() != 2 || s.c == last.c {
		t.Errorf("%d tunnels: a new stream went to the one that is stuck", dials.Load())
	}
	p.Close()
	wg.Wait()
}

// TestServerRotates: the same the other way round. A client that leaves its streams unread is told to open another
// connection (GOAWAY), and those that it has go on.
func TestServerRotates(t *testing.T) {
	p, sc, stop := serve(t, Config{}, func(ss *ServerStream) {
		if s, err := ss.Accept(&Response{Status: 200}); err == nil {
			io.Copy(s, neverending{})
		}
	})
	defer stop()
	io.WriteString(p.c, http2.ClientPreface)
	p.fr.SetMaxReadFrameSize(1 << 20)
	p.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 4 << 20},
		http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1 << 20})
	p.fr.WriteWindowUpdate(0, 16<<20-65535)
	for id := uint32(1); id < 9; id += 2 {
		p.connect(id)
	}
	asked, goneAway, got, stuck := false, false, 0, make(chan struct{})
	go func() {
		for !sc.c.stuck() {
			time.Sleep(time.Millisecond)
		}
		close(stuck)
	}()
	p.c.SetReadDeadline(time.Now().Add(patience))
	for got < 2<<20 || !goneAway {
		if !asked {
			select {
			case <-stuck:
				p.connect(9)
				asked = true
			default:
				p.fr.WritePing(false, [8]byte{}) // there is something to read again
				time.Sleep(5 * time.Millisecond)
			}
		}
		f, err := p.fr.ReadFrame()
		if err != nil {
			t.Fatalf("%v; %d bytes on the new stream, GOAWAY %v, asked %v", err, got, goneAway, asked)
		}
		switch f := f.(type) {
		case *http2.GoAwayFrame:
			goneAway = f.ErrCode == http2.ErrCodeNo
		case *http2.DataFrame:
			if f.StreamID == 9 {
				got += len(f.Data())
			}
		}
	}
	if sc.c.cfg.Stats.Rotated.Load() != 1 {
		t.Error("not counted")
	}
}

// TestTightWindows: what nobody reads is charged to the pod's memory; while that is tight, windows are small from the
// first stream on and do not grow, all bytes arrive all the same, and in the end nothing is charged.
func TestTightWindows(t *testing.T) {
	budget := fair.NewBudget(nil, 1<<20)
	a, b := tcpPair(t)
	cc, sc, reqs, stop := link(t, a, b, Config{Memory: budget})
	defer stop()
	const each = 8 << 20
	var wg sync.WaitGroup
	var readers []*Stream
	fill := func() {
		w, r := pair(t, cc, reqs)
		readers = append(readers, r)
		wg.Go(func() {
			io.Copy(w, io.LimitReader(neverending{}, each))
			w.CloseWrite()
		})
	}
	fill()
	eventually(t, budget.Tight)
	eventually(t, func() bool { sc.c.mu.Lock(); defer sc.c.mu.Unlock(); return sc.c.acks == 2 })
	for range 10 {
		fill()
	}
	time.Sleep(100 * time.Millisecond)
	if held := sc.c.unread.Load(); held > 4<<20+10*leastWindow {
		t.Errorf("%d bytes are held", held)
	}
	for i, r := range readers {
		if n, err := io.Copy(io.Discard, r); n != each || err != nil {
			t.Errorf("reader %d got %d bytes: %v", i, n, err)
		}
	}
	wg.Wait()
	eventually(t, func() bool { return budget.Used() == 0 })
}
