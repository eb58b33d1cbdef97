package hbone

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// seedFrames is a good session after the preface, as bytes.
func seedFrames(build func(p *rawPeer)) []byte {
	var b bytes.Buffer
	build(newRawPeerOn(&b))
	return b.Bytes()
}

func newRawPeerOn(w io.Writer) *rawPeer {
	a, b := net.Pipe()
	a.Close()
	b.Close()
	p := newRawPeer(nil, a)
	p.fr = http2.NewFramer(w, nil)
	p.fr.AllowIllegalWrites = true
	return p
}

func seeds() map[string][]byte {
	return map[string][]byte{
		"session": seedFrames(func(p *rawPeer) {
			p.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 100})
			p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.block(":method", "CONNECT", ":authority",
				"h:1", "baggage", "a=b"), EndHeaders: true})
			p.fr.WriteData(1, false, []byte("hello"))
			p.fr.WriteWindowUpdate(1, 1000)
			p.fr.WriteDataPadded(1, true, []byte("x"), []byte("pad"))
			p.fr.WritePing(false, [8]byte{1})
			p.fr.WriteSettingsAck()
			p.fr.WriteRSTStream(1, http2.ErrCodeCancel)
			p.fr.WriteGoAway(0, 0, nil)
		}),
		"answers": seedFrames(func(p *rawPeer) {
			p.fr.WriteSettings()
			p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.block(":status", "200", "baggage", "a=b"),
				EndHeaders: true})
			p.fr.WriteData(1, false, []byte("hello"))
			p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.block("t", "u"), EndHeaders: true,
				EndStream: true})
		}),
		"pieces": seedFrames(func(p *rawPeer) {
			p.fr.WriteSettings(http2.Setting{ID: http2.SettingHeaderTableSize, Val: 0},
				http2.Setting{ID: http2.SettingMaxFrameSize, Val: 16384})
			b := p.block(":method", "GET", ":scheme", "http", ":path", "/")
			p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, BlockFragment: b[:1]})
			p.fr.WriteContinuation(3, true, b[1:])
			p.fr.WritePriority(3, http2.PriorityParam{StreamDep: 1})
			p.fr.WriteRawFrame(99, 0xff, 3, []byte("unknown"))
		}),
		"empty": {},
	}
}

// TestSeedsAreCommitted keeps testdata/fuzz in step with the code that made it.
func TestSeedsAreCommitted(t *testing.T) {
	for _, target := range []string{"FuzzServer", "FuzzClient"} {
		for name, b := range seeds() {
			path := filepath.Join("testdata", "fuzz", target, name)
			want := "go test fuzz v1\n[]byte(" + strconv.Quote(string(b)) + ")\nbyte('\\x05')\n"
			got, err := os.ReadFile(path)
			if err != nil || string(got) != want {
				if os.Getenv("UPDATE") == "" {
					t.Errorf("%s is not what seeds() makes (UPDATE=1 writes it)", path)
					continue
				}
				os.MkdirAll(filepath.Dir(path), 0o755)
				os.WriteFile(path, []byte(want), 0o644)
			}
		}
	}
}

// feed writes b in pieces of step bytes, and closes.
func feed(c net.Conn, b []byte, step byte) {
	c.SetDeadline(time.Now().Add(patience))
	go io.Copy(io.Discard, c)
	n := max(1, int(step))
	for len(b) > 0 {
		m := min(n, len(b))
		if _, err := c.Write(b[:m]); err != nil {
			break
		}
		b = b[m:]
	}
	c.Close()
}

// FuzzServer is what comes after a client's preface. Nothing may panic, hang, or stay behind.
func FuzzServer(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte, step byte) {
		x, y := net.Pipe()
		sc := NewServerConn(y, Config{}, func(ss *ServerStream) {
			if ss.Method() != "CONNECT" {
				ss.Refuse(400)
				return
			}
			s, err := ss.Accept(&Response{Status: 200, HasBaggage: true})
			if err == nil {
				s.WriteTo(s)
				s.CloseWrite()
			}
		})
		served := make(chan error, 1)
		go func() { served <- sc.Serve(context.Background()) }()
		feed(x, append([]byte(http2.ClientPreface), b...), step)
		<-served
		sound(t, sc.c)
	})
}

// FuzzClient is what a server says.
func FuzzClient(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte, step byte) {
		x, y := net.Pipe()
		cc, err := NewClientConn(y, Config{})
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			s, _, err := cc.Open(context.Background(), &Request{Authority: "h:1"})
			if err == nil {
				s.Write([]byte("hello"))
				io.Copy(io.Discard, s)
				s.Close()
			}
		}()
		feed(x, b, step)
		<-done
		cc.Close()
		sound(t, cc.c)
	})
}

// sound checks the books of a connection that is over.
func sound(t *testing.T, c *conn) {
	c.work.Wait()
	if len(c.streams) != 0 || c.running.Load() != 0 || c.light.head != nil || c.bulk.head != nil || c.starved.head != nil {
		t.Error("left behind:", len(c.streams), c.running.Load(), c.light, c.bulk, c.starved)
	}
}
