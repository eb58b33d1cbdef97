package hbone

import (
	"context"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// serve runs a server for a raw peer. h nil: accept and hold.
func serve(t testing.TB, cfg Config, h func(*ServerStream)) (*rawPeer, *ServerConn, func()) {
	t.Helper()
	a, b := tcpPair(t)
	if h == nil {
		h = func(ss *ServerStream) {
			ss.Accept(&Response{Status: 200})
			<-ss.Done()
		}
	}
	sc := NewServerConn(b, cfg, h)
	served := make(chan error, 1)
	go func() { served <- sc.Serve(context.Background()) }()
	return newRawPeer(t, a), sc, func() {
		a.Close()
		select {
		case <-served:
		case <-time.After(20 * time.Second):
			t.Error("Serve did not return")
		}
	}
}

// TestRequestSyntax: what is reset, and what is delivered to be refused.
func TestRequestSyntax(t *testing.T) {
	p, _, stop := serve(t, Config{}, func(ss *ServerStream) { ss.Refuse(400) })
	defer stop()
	p.preface()
	id := uint32(1)
	try := func(want string, fields ...string) {
		t.Helper()
		p.headers(id, false, fields...)
		for {
			text, got, ok := p.next()
			if !ok {
				t.Fatal(text)
			}
			if got == id {
				if !strings.HasSuffix(text, want) {
					t.Errorf("%.200q: %s, want %s", fields, text, want)
				}
				break
			}
		}
		id += 2
	}
	c := []string{":method", "CONNECT", ":authority", "h:1"}
	bad, ok := "PROTOCOL_ERROR", ":status=400"
	try(ok, c...)
	try(ok, ":method", "CONNECT") // no :authority at all: ztunnel's 400
	try(ok, ":method", "CONNECT", ":authority", "[::1]:80")
	try(ok, ":method", "CONNECT", ":authority", "h:99999")
	try(ok, ":method", "POST", ":scheme", "http", ":path", "/", ":authority", "h:1")
	try(ok, append(c, "te", "trailers")...)
	try(ok, append(c, "forwarded", "\xff")...)
	try(bad, ":method", "CONNECT", ":authority", "")
	try(bad, ":method", "CONNECT", ":authority", "a b")
	try(bad, ":method", "CONNECT", ":authority", "a\xffb")
	try(bad, ":method", "CONNECT", ":authority", "a/b")
	try(bad, append(c, ":scheme", "http")...)
	try(bad, append(c, ":path", "/")...)
	try(bad, append(c, ":protocol", "websocket")...)
	try(bad, append(c, ":status", "200")...)
	try(bad, append(c, ":method", "CONNECT")...)
	try(bad, append(c, ":unknown", "x")...)
	try(bad, append(c, "x", "y", ":authority", "z")...)
	try(bad, append(c, "Upper", "x")...)
	try(bad, append(c, "ctl", "a\x01b")...)
	try(bad, append(c, "te", "gzip")...)
	try(bad, append(c, "connection", "close")...)
	try(bad, append(c, "transfer-encoding", "chunked")...)
	try(bad, ":authority", "h:1")
	try(bad, ":method", "GET", ":path", "/", ":authority", "h:1")
	try(bad, ":method", "GET", ":scheme", "http", ":authority", "h:1")
	try(bad, ":method", "GET", ":scheme", "http", ":path", "", ":authority", "h:1")
	for _, v := range []string{"", "x", "-1", "+1", "1.5", "0x1", "1,2", "1,", "99999999999999999999"} {
		try(bad, append(c, "content-length", v)...)
	}
	try(bad, append(c, "content-length", "1", "content-length", "2")...)
	try(ok, append(c, "content-length", "7")...) // says nothing of a tunnel
	try(ok, append(c, "content-length", "7, 7", "content-length", "7")...)
	for _, n := range []int{65536, 70000, 128 << 10, 200 << 10} { // more than the accepted header list
		try(":status=431", append(c, "huge", strings.Repeat("x", n))...)
		try(":status=431", append(c, "huge", strings.Repeat("\x7e", n))...) // without Huffman's help
	}
	try(":status=431", append(c, manyFields(2000)...)...)
	try(ok, c...)
}

func manyFields(n int) (out []string) {
	for i := range n {
		out = append(out, fmt.Sprintf("field-%d", i), "value")
	}
	return out
}

// TestGetWithEnd: without a body to come there is nothing to reset.
func TestGetWithEnd(t *testing.T) {
	p, _, stop := serve(t, Config{}, func(ss *ServerStream) { ss.Refuse(400) })
	defer stop()
	p.preface()
	p.headers(1, true, ":method", "GET", ":scheme", "http", ":path", "/", ":authority", "h:1")
	p.expect("HEADERS 1 END_STREAM :status=400")
	p.fr.WritePing(false, [8]byte{1})
	if text, _, _ := p.next(); !strings.HasPrefix(text, "PING 0 ACK") {
		t.Error(text)
	}
}

// TestViolations: what ends the connection, and with which code.
func TestViolations(t *testing.T) {
	type step = func(p *rawPeer)
	flood := func(n int, f func(p *rawPeer, i int) error) step {
		return func(p *rawPeer) {
			for i := range n {
				if f(p, i) != nil {
					return // we have been cut off already
				}
			}
		}
	}
	for name, tc := range map[string]struct {
		do   step
		want string
	}{
		"DATA on idle stream": {func(p *rawPeer) { p.fr.WriteData(5, false, []byte("x")) }, "PROTOCOL_ERROR"},
		"DATA on stream 0": {func(p *rawPeer) {
			p.fr.WriteRawFrame(http2.FrameData, 0, 0, []byte("x"))
		}, "PROTOCOL_ERROR"},
		"HEADERS on even stream": {func(p *rawPeer) { p.connect(2) }, "PROTOCOL_ERROR"},
		"HEADERS on stream 0": {func(p *rawPeer) {
			p.fr.WriteRawFrame(http2.FrameHeaders, 4, 0, p.block(":method", "CONNECT"))
		}, "PROTOCOL_ERROR"},
		"WINDOW_UPDATE idle": {func(p *rawPeer) { p.fr.WriteWindowUpdate(7, 1) }, "PROTOCOL_ERROR"},
		"WINDOW_UPDATE zero": {func(p *rawPeer) {
			p.fr.WriteRawFrame(http2.FrameWindowUpdate, 0, 0, make([]byte, 4))
		}, "PROTOCOL_ERROR"},
		"WINDOW_UPDATE overflow": {func(p *rawPeer) { p.fr.WriteWindowUpdate(0, 1<<31-1) }, "FLOW_CONTROL_ERROR"},
		"RST_STREAM idle":        {func(p *rawPeer) { p.fr.WriteRSTStream(9, http2.ErrCodeCancel) }, "PROTOCOL_ERROR"},
		"RST_STREAM length": {func(p *rawPeer) {
			p.fr.WriteRawFrame(http2.FrameRSTStream, 0, 1, make([]byte, 5))
		}, "FRAME_SIZE_ERROR"},
		"PING length": {func(p *rawPeer) {
			p.fr.WriteRawFrame(http2.FramePing, 0, 0, make([]byte, 7))
		}, "FRAME_SIZE_ERROR"},
		"SETTINGS length": {func(p *rawPeer) {
			p.fr.WriteRawFrame(http2.FrameSettings, 0, 0, make([]byte, 7))
		}, "FRAME_SIZE_ERROR"},
		"SETTINGS on a stream": {func(p *rawPeer) { p.fr.WriteRawFrame(http2.FrameSettings, 0, 1, nil) }, "PROTOCOL_ERROR"},
		"SETTINGS window": {func(p *rawPeer) {
			p.fr.WriteSettings(http2.Setting{ID: 4, Val: 1 << 31})
		}, "FLOW_CONTROL_ERROR"},
		"SETTINGS frame size": {func(p *rawPeer) { p.fr.WriteSettings(http2.Setting{ID: 5, Val: 100}) }, "PROTOCOL_ERROR"},
		"window by SETTINGS": {func(p *rawPeer) {
			p.connect(1)
			p.fr.WriteWindowUpdate(1, 1<<30)
			p.fr.WriteSettings(http2.Setting{ID: 4, Val: 1<<31 - 1})
		}, "FLOW_CONTROL_ERROR"},
		"decreasing stream id": {func(p *rawPeer) { p.connect(5); p.connect(3) }, "PROTOCOL_ERROR"},
		"stream id again": {func(p *rawPeer) {
			p.connect(1)
			p.fr.WriteRSTStream(1, http2.ErrCodeCancel)
			p.connect(1)
		}, "PROTOCOL_ERROR"},
		"DATA after the end": {func(p *rawPeer) {
			p.headers(1, true, "huge", strings.Repeat("x", 5000)) // refused by the reader itself: at once
			p.fr.WriteData(1, false, []byte("x"))
		}, "STREAM_CLOSED"},
		"trailers after the end": {func(p *rawPeer) {
			p.headers(1, true, "huge", strings.Repeat("x", 5000)) // refused by the reader itself: at once
			p.headers(1, true, "a", "b")
		}, "STREAM_CLOSED"},
		"DATA on a skipped stream": {func(p *rawPeer) {
			p.connect(5)
			p.fr.WriteData(3, false, []byte("x"))
		}, "STREAM_CLOSED"},
		"PRIORITY length": {func(p *rawPeer) {
			p.fr.WriteRawFrame(http2.FramePriority, 0, 1, make([]byte, 4))
		}, "FRAME_SIZE_ERROR"},
		"PRIORITY on stream 0": {func(p *rawPeer) {
			p.fr.WriteRawFrame(http2.FramePriority, 0, 0, make([]byte, 5))
		}, "PROTOCOL_ERROR"},
		"WINDOW_UPDATE of zero, idle": {func(p *rawPeer) {
			p.connect(1)
			p.fr.WriteRawFrame(http2.FrameWindowUpdate, 0, 9, make([]byte, 4))
		}, "PROTOCOL_ERROR"},
		"WINDOW_UPDATE length": {func(p *rawPeer) {
			p.fr.WriteRawFrame(http2.FrameWindowUpdate, 0, 0, make([]byte, 5))
		}, "FRAME_SIZE_ERROR"},
		"GOAWAY on a stream": {func(p *rawPeer) {
			p.fr.WriteRawFrame(http2.FrameGoAway, 0, 1, make([]byte, 8))
		}, "PROTOCOL_ERROR"},
		"GOAWAY length": {func(p *rawPeer) {
			p.fr.WriteRawFrame(http2.FrameGoAway, 0, 0, make([]byte, 7))
		}, "FRAME_SIZE_ERROR"},
		"PING on a stream": {func(p *rawPeer) {
			p.fr.WriteRawFrame(http2.FramePing, 0, 1, make([]byte, 8))
		}, "PROTOCOL_ERROR"},
		"RST_STREAM on stream 0": {func(p *rawPeer) {
			p.fr.WriteRawFrame(http2.FrameRSTStream, 0, 0, make([]byte, 4))
		}, "PROTOCOL_ERROR"},
		"acknowledgement that says a lot": {func(p *rawPeer) {
			p.fr.WriteRawFrame(http2.FrameSettings, http2.FlagSettingsAck, 0, make([]byte, 6))
		}, "FRAME_SIZE_ERROR"},
		"HEADERS of padding": {func(p *rawPeer) {
			p.fr.WriteRawFrame(http2.FrameHeaders, http2.FlagHeadersEndHeaders|http2.FlagHeadersPadded, 1,
				append([]byte{200}, p.block(":method", "CONNECT")...))
		}, "PROTOCOL_ERROR"},
		"long SETTINGS": {func(p *rawPeer) {
			p.fr.WriteSettings(make([]http2.Setting, maxSettings+1)...)
		}, "ENHANCE_YOUR_CALM"},
		"huge header": {func(p *rawPeer) {
			p.fr.WriteRawFrame(http2.FrameHeaders, 0, 1, make([]byte, 300<<10))
		}, "ENHANCE_YOUR_CALM"},
		"PUSH_PROMISE": {func(p *rawPeer) {
			p.fr.WriteRawFrame(http2.FramePushPromise, 4, 1, make([]byte, 8))
		}, "PROTOCOL_ERROR"},
		"frame too large":    {func(p *rawPeer) { p.fr.WriteRawFrame(99, 0, 0, make([]byte, 1<<20+1)) }, "FRAME_SIZE_ERROR"},
		"CONTINUATION alone": {func(p *rawPeer) { p.fr.WriteContinuation(1, true, nil) }, "PROTOCOL_ERROR"},
		"GOAWAY too long":    {func(p *rawPeer) { p.fr.WriteGoAway(0, 0, make([]byte, 8<<10)) }, "ENHANCE_YOUR_CALM"},
		"hpack garbage": {func(p *rawPeer) {
			p.fr.WriteRawFrame(http2.FrameHeaders, 4, 1, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
		}, "COMPRESSION_ERROR"},
		"padding too long": {func(p *rawPeer) {
			p.connect(1)
			p.fr.WriteRawFrame(http2.FrameData, http2.FlagDataPadded, 1, []byte{4, 0, 0})
		}, "PROTOCOL_ERROR"},
		"padding of nothing": {func(p *rawPeer) {
			p.connect(1)
			p.fr.WriteRawFrame(http2.FrameData, http2.FlagDataPadded, 1, nil)
		}, "FRAME_SIZE_ERROR"},
		"interrupted header block": {func(p *rawPeer) {
			p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.block(":method", "CONNECT")})
			p.fr.WritePing(false, [8]byte{})
		}, "PROTOCOL_ERROR"},
		"connection window": {func(p *rawPeer) {
			// Nobody reads: thirteen streams of almost 4 MiB are more than the 32 that may lie unread and 16 on the way.
			buf := make([]byte, 1<<20-1)
			for id := uint32(1); id < 27; id += 2 {
				p.connect(id)
				for range 4 {
					if p.fr.WriteData(id, false, buf) != nil {
						return
					}
				}
			}
		}, "FLOW_CONTROL_ERROR"},
		"CONTINUATION flood": {func(p *rawPeer) {
			p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.block(":method", "CONNECT")})
			flood(1000, func(p *rawPeer, i int) error { return p.fr.WriteContinuation(1, false, nil) })(p)
		}, "ENHANCE_YOUR_CALM"},
		"header block without end": {func(p *rawPeer) {
			p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: make([]byte, 16000)})
			flood(30, func(p *rawPeer, i int) error { return p.fr.WriteContinuation(1, false, make([]byte, 16000)) })(p)
		}, "ENHANCE_YOUR_CALM"},
		"rapid reset": {flood(5000, func(p *rawPeer, i int) error {
			id := uint32(2*i + 1)
			p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: p.block(":method", "CONNECT", ":authority",
				"slow:1"), EndHeaders: true})
			return p.fr.WriteRSTStream(id, http2.ErrCodeCancel)
		}), "ENHANCE_YOUR_CALM"},
		"malformed flood": {flood(5000, func(p *rawPeer, i int) error {
			return p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: uint32(2*i + 1),
				BlockFragment: p.block(":method", "CONNECT", ":authority", ""), EndHeaders: true})
		}), "ENHANCE_YOUR_CALM"},
		"refused flood": {flood(5000, func(p *rawPeer, i int) error {
			return p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: uint32(2*i + 1),
				BlockFragment: p.block(":method", "CONNECT", ":authority", "x:1"), EndHeaders: true})
		}), "ENHANCE_YOUR_CALM"},
		"PING flood": {flood(5000, func(p *rawPeer, i int) error {
			return p.fr.WritePing(false, [8]byte{1})
		}), "ENHANCE_YOUR_CALM"},
		"SETTINGS flood": {flood(5000, func(p *rawPeer, i int) error {
			return p.fr.WriteSettings()
		}), "ENHANCE_YOUR_CALM"},
		"PRIORITY flood": {flood(5000, func(p *rawPeer, i int) error {
			return p.fr.WritePriority(1, http2.PriorityParam{StreamDep: 3})
		}), "ENHANCE_YOUR_CALM"},
		"unknown flood": {flood(5000, func(p *rawPeer, i int) error {
			return p.fr.WriteRawFrame(77, 0, 0, nil)
		}), "ENHANCE_YOUR_CALM"},
		"WINDOW_UPDATE flood": {flood(5000, func(p *rawPeer, i int) error {
			return p.fr.WriteWindowUpdate(0, 1)
		}), "ENHANCE_YOUR_CALM"},
		"WINDOW_UPDATE flood, stream": {func(p *rawPeer) {
			p.connect(1)
			flood(5000, func(p *rawPeer, i int) error { return p.fr.WriteWindowUpdate(1, 1) })(p)
		}, "ENHANCE_YOUR_CALM"},
		"WINDOW_UPDATE flood, late": {func(p *rawPeer) {
			p.connect(1)
			p.fr.WriteRSTStream(1, http2.ErrCodeCancel)
			flood(5000, func(p *rawPeer, i int) error { return p.fr.WriteWindowUpdate(1, 1) })(p)
		}, "ENHANCE_YOUR_CALM"},
		"RST_STREAM flood": {func(p *rawPeer) {
			p.connect(1)
			flood(5000, func(p *rawPeer, i int) error { return p.fr.WriteRSTStream(1, http2.ErrCodeCancel) })(p)
		}, "ENHANCE_YOUR_CALM"},
		"DATA flood after RST_STREAM": {func(p *rawPeer) {
			p.connect(1)
			p.fr.WriteRSTStream(1, http2.ErrCodeCancel)
			flood(5000, func(p *rawPeer, i int) error { return p.fr.WriteData(1, false, []byte("x")) })(p)
		}, "ENHANCE_YOUR_CALM"},
		"DATA flood on a refused stream": {func(p *rawPeer) {
			p.headers(1, false, ":method", "CONNECT", ":authority", "") // reset at once
			flood(50000, func(p *rawPeer, i int) error { return p.fr.WriteData(1, false, []byte("x")) })(p)
		}, "ENHANCE_YOUR_CALM"},
		"trailer flood": {func(p *rawPeer) {
			p.headers(1, false, ":method", "CONNECT", ":authority", "") // reset at once
			b := p.block("a", "b")
			flood(50000, func(p *rawPeer, i int) error {
				return p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: b, EndHeaders: true, EndStream: true})
			})(p)
		}, "ENHANCE_YOUR_CALM"},
		"GOAWAY flood": {func(p *rawPeer) {
			p.connect(1)
			flood(5000, func(p *rawPeer, i int) error { return p.fr.WriteGoAway(0, 0, nil) })(p)
		}, "ENHANCE_YOUR_CALM"},
		"flood of DATA that is padding": {func(p *rawPeer) {
			p.connect(1)
			flood(5000, func(p *rawPeer, i int) error { return p.fr.WriteDataPadded(1, false, nil, make([]byte, 3)) })(p)
		}, "ENHANCE_YOUR_CALM"},
		"flood of large headers": {func(p *rawPeer) {
			b := p.block(append([]string{":method", "CONNECT", ":authority", "x:1"}, "huge", strings.Repeat("x", 5000))...)
			flood(3000, func(p *rawPeer, i int) error {
				return p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: uint32(2*i + 1), BlockFragment: b, EndHeaders: true})
			})(p)
		}, "ENHANCE_YOUR_CALM"},
		"empty DATA flood": {func(p *rawPeer) {
			p.connect(1)
			flood(5000, func(p *rawPeer, i int) error { return p.fr.WriteData(1, false, nil) })(p)
		}, "ENHANCE_YOUR_CALM"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var stats Stats
			var calmed atomic.Int32
			p, _, stop := serve(t, Config{ControlFrames: 200, MaxHeaderList: 4096, Stats: &stats, Calmed: func(net.Addr) {
				calmed.Add(1)
			}}, func(ss *ServerStream) {
				if ss.Authority() != "slow:1" {
					ss.Accept(&Response{Status: 200})
				}
				<-ss.Done()
			})
			defer stop()
			p.preface()
			read := make(chan string, 1)
			go func() {
				for {
					text, _, ok := p.next()
					if strings.HasPrefix(text, "GOAWAY") || !ok {
						read <- text
						io.Copy(io.Discard, p.c)
						return
					}
				}
			}()
			tc.do(p)
			if got := <-read; !strings.HasSuffix(got, tc.want) {
				t.Errorf("%.300s, want %s", got, tc.want)
			}
			want := int32(0)
			if tc.want == "ENHANCE_YOUR_CALM" {
				want = 1
			}
			if n := calmed.Load(); n != want || stats.Calmed.Load() != uint64(want) || stats.Violations.Load() != 1 {
				t.Error(n, "calmed,", stats.Calmed.Load(), stats.Violations.Load())
			}
		})
	}
}

// TestFirstFrames: no preface, a wrong one, no SETTINGS, HTTP/1, silence.
func TestFirstFrames(t *testing.T) {
	for _, first := range []string{"GET / HTTP/1.1\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", http2.ClientPreface +
		"\x00\x00\x08\x06\x00\x00\x00\x00\x00........", http2.ClientPreface + "\x00\x00\x00\x04\x01\x00\x00\x00\x00"} {
		p, _, stop := serve(t, Config{}, nil)
		io.WriteString(p.c, first)
		p.expect("GOAWAY 0 last=0 PROTOCOL_ERROR")
		stop()
	}
	for _, first := range []string{"", http2.ClientPreface[:10], http2.ClientPreface} {
		p, sc, stop := serve(t, Config{PrefaceTimeout: 50 * time.Millisecond}, nil)
		io.WriteString(p.c, first)
		<-sc.Done()
		stop()
	}
}

// TestTooManyStreams: the 201st is refused, and there is room again when one ends.
func TestTooManyStreams(t *testing.T) {
	p, sc, stop := serve(t, Config{MaxStreams: 3}, nil)
	defer stop()
	p.preface()
	for id := uint32(1); id <= 7; id += 2 {
		p.connect(id)
	}
	p.expect("RST_STREAM 7 REFUSED_STREAM")
	p.fr.WriteRSTStream(1, http2.ErrCodeCancel)
	p.connect(9)
	p.expect("HEADERS 9 :status=200")
	if sc.Streams() != 3 {
		t.Error(sc.Streams())
	}
}

// TestStreamFaults: what costs the stream, and not the connection.
func TestStreamFaults(t *testing.T) {
	p, _, stop := serve(t, Config{StreamWindow: 1 << 16, ConnWindow: 1 << 20}, nil)
	defer stop()
	p.preface()
	p.fr.WriteSettingsAck()
	p.connect(1)
	for range 5 {
		p.fr.WriteData(1, false, make([]byte, 1<<14))
	}
	p.expect("RST_STREAM 1 FLOW_CONTROL_ERROR")
	p.connect(3)
	p.fr.WriteWindowUpdate(3, 1<<31-1)
	p.expect("RST_STREAM 3 FLOW_CONTROL_ERROR")
	p.connect(5)
	p.fr.WriteData(5, true, nil)
	p.fr.WriteData(5, false, []byte("more"))
	p.expect("RST_STREAM 5 STREAM_CLOSED")
	p.connect(7)
	p.headers(7, false, "a", "b") // trailers that end nothing
	p.expect("RST_STREAM 7 PROTOCOL_ERROR")
	p.connect(9)
	p.fr.WriteRawFrame(http2.FrameWindowUpdate, 0, 9, make([]byte, 4))
	p.expect("RST_STREAM 9 PROTOCOL_ERROR")
	// What comes late for streams that are over is ignored.
	p.fr.WriteData(1, false, []byte("late"))
	p.fr.WriteRSTStream(1, http2.ErrCodeCancel)
	p.fr.WriteWindowUpdate(3, 1)
	p.headers(7, true, "late", "trailers")
	p.fr.WriteRawFrame(http2.FramePriority, 0, 1, make([]byte, 5))
	p.connect(11)
	p.expect("HEADERS 11 :status=200")
	// Trailers that end the stream do so.
	p.headers(11, true, "a", "b")
	p.connect(13)
	p.expect("HEADERS 13 :status=200")
	p.headers(13, true, ":path", "/")
	p.expect("RST_STREAM 13 PROTOCOL_ERROR") // no trailers have pseudo-headers
	p.connect(15)
	p.fr.WriteRawFrame(http2.FramePriority, 0, 15, make([]byte, 4))
	p.expect("RST_STREAM 15 FRAME_SIZE_ERROR")
	// After its own RST_STREAM a peer has nothing to say on a stream.
	p.connect(17)
	p.fr.WriteRSTStream(17, http2.ErrCodeCancel)
	p.fr.WriteData(17, false, []byte("x"))
	p.expect("RST_STREAM 17 STREAM_CLOSED")
	p.connect(19)
	p.expect("HEADERS 19 :status=200")
}

// TestStarvedReader: a peer that reads nothing cannot make us hold more than a bounded queue of answers.
func TestStarvedReader(t *testing.T) {
	a, b := net.Pipe() // nothing is buffered beneath
	sc := NewServerConn(b, Config{ControlFrames: 1 << 20}, nil)
	served := make(chan error, 1)
	go func() { served <- sc.Serve(context.Background()) }()
	a.SetDeadline(time.Now().Add(patience))
	io.WriteString(a, http2.ClientPreface)
	fr := http2.NewFramer(a, a)
	fr.WriteSettings()
	sent := 0
	for ; fr.WritePing(false, [8]byte{}) == nil; sent++ {
	}
	<-sc.Done()
	if sent < maxQueuedReplies/2 || cap(sc.c.ctrl) > 64*maxQueuedReplies {
		t.Error(sent, "pings taken,", cap(sc.c.ctrl), "bytes of answers held")
	}
	a.Close()
	if err := <-served; err == nil || !strings.Contains(err.Error(), "ENHANCE_YOUR_CALM") {
		t.Error(err)
	}
}

// TestHostileServer is the client's side: nothing of this may hang or panic.
func TestHostileServer(t *testing.T) {
	for name, do := range map[string]func(p *rawPeer){
		"garbage":            func(p *rawPeer) { io.WriteString(p.c, "HTTP/1.1 400 Bad Request\r\n\r\n") },
		"no SETTINGS":        func(p *rawPeer) { p.headers(1, false, ":status", "200") },
		"answer to nobody":   func(p *rawPeer) { p.fr.WriteSettings(); p.headers(3, false, ":status", "200") },
		"DATA first":         func(p *rawPeer) { p.fr.WriteSettings(); p.fr.WriteData(1, false, []byte("x")) },
		"no status":          func(p *rawPeer) { p.fr.WriteSettings(); p.headers(1, false, "a", "b") },
		"bad status":         func(p *rawPeer) { p.fr.WriteSettings(); p.headers(1, false, ":status", "2x0") },
		"request":            func(p *rawPeer) { p.fr.WriteSettings(); p.headers(1, false, ":method", "GET") },
		"informational, end": func(p *rawPeer) { p.fr.WriteSettings(); p.headers(1, true, ":status", "103") },
		"push":               func(p *rawPeer) { p.fr.WriteSettings(http2.Setting{ID: http2.SettingEnablePush, Val: 1}) },
		"reset":              func(p *rawPeer) { p.fr.WriteSettings(); p.fr.WriteRSTStream(1, http2.ErrCodeInternal) },
		"reset, orderly":     func(p *rawPeer) { p.fr.WriteSettings(); p.fr.WriteRSTStream(1, http2.ErrCodeNo) },
		"goaway":             func(p *rawPeer) { p.fr.WriteSettings(); p.fr.WriteGoAway(0, 0, nil) },
		"end":                func(p *rawPeer) { p.c.Close() },
		"huge header": func(p *rawPeer) {
			p.fr.WriteSettings()
			p.headers(1, false, ":status", "200", "x", strings.Repeat("y", 20000))
		},
		"informational flood": func(p *rawPeer) {
			p.fr.WriteSettings()
			for range 3000 {
				p.headers(1, false, ":status", "103")
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := tcpPair(t)
			cc, err := NewClientConn(a, Config{})
			if err != nil {
				t.Fatal(err)
			}
			go func() {
				p := newRawPeer(quietTB{t}, b)
				go io.Copy(io.Discard, b)
				do(p)
			}()
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			defer cancel()
			_, _, err = cc.Open(ctx, &Request{Authority: "h:1"})
			if err == nil || ctx.Err() != nil {
				t.Error(err)
			}
			cc.Close()
			b.Close()
		})
	}
}

// quietTB forgives write errors of a peer that was cut off, which is the point.
type quietTB struct{ testing.TB }

func (q quietTB) Fatal(args ...any) { runtime.Goexit() }
