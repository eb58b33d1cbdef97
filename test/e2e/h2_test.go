package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// h2Client is a bare HTTP/2 client: what it sends is exactly what it is told, and it writes down all that comes.
type h2Client struct {
	conn *tls.Conn
	fr   *http2.Framer
	enc  *hpack.Encoder
	hbuf bytes.Buffer

	mu     sync.Mutex
	events []h2Event
	end    error
	done   chan struct{}
}

// h2Event is one frame that came, in words that can be compared.
type h2Event struct {
	stream uint32
	text   string
}

// dialH2 does the TLS handshake on c and sends preface and SETTINGS.
func dialH2(t testing.TB, c net.Conn, conf *tls.Config) (*h2Client, error) {
	t.Helper()
	c.SetDeadline(time.Now().Add(60 * time.Second))
	tc := tls.Client(c, conf)
	if err := tc.Handshake(); err != nil {
		c.Close()
		return nil, err
	}
	h := &h2Client{conn: tc, fr: http2.NewFramer(tc, tc), done: make(chan struct{})}
	h.enc = hpack.NewEncoder(&h.hbuf)
	h.fr.SetMaxReadFrameSize(1 << 20)
	// In TLS 1.3 a client is done before the server has looked at its certificate: a write may meet the reset of a
	// server that has refused it. What the refusal was is for the reader to find, so errors of writing are not the end
	// here.
	_, _ = tc.Write([]byte(http2.ClientPreface))
	_ = h.fr.WriteSettings(http2.Setting{ID: http2.SettingEnablePush, Val: 0},
		http2.Setting{ID: http2.SettingInitialWindowSize, Val: 4 << 20},
		http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1 << 20}, http2.Setting{ID: http2.SettingMaxHeaderListSize,
			Val: 16384})
	return h, nil
}

// run reads frames until the connection ends.
func (h *h2Client) run() {
	defer close(h.done)
	dec := hpack.NewDecoder(4096, nil)
	for {
		f, err := h.fr.ReadFrame()
		if err != nil {
			h.mu.Lock()
			h.end = err
			h.mu.Unlock()
			return
		}
		var text string
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if f.IsAck() {
				text = "SETTINGS ACK"
				break
			}
			text = "SETTINGS"
			_ = f.ForeachSetting(func(s http2.Setting) error { text += fmt.Sprintf(" %v=%d", s.ID, s.Val); return nil })
			h.mu.Lock()
			_ = h.fr.WriteSettingsAck()
			h.mu.Unlock()
		case *http2.WindowUpdateFrame:
			text = fmt.Sprintf("WINDOW_UPDATE +%d", f.Increment)
		case *http2.HeadersFrame:
			text = "HEADERS"
			if f.StreamEnded() {
				text += " END_STREAM"
			}
			fields, err := dec.DecodeFull(f.HeaderBlockFragment())
			if err != nil {
				text += " " + err.Error()
			}
			for _, x := range fields {
				text += fmt.Sprintf(" %s=%s", x.Name, x.Value)
			}
		case *http2.RSTStreamFrame:
			text = "RST_STREAM " + f.ErrCode.String()
		case *http2.GoAwayFrame:
			text = fmt.Sprintf("GOAWAY last=%d %v", f.LastStreamID, f.ErrCode)
		case *http2.PingFrame:
			if f.IsAck() {
				text = "PING ACK"
				break
			}
			h.mu.Lock()
			_ = h.fr.WritePing(true, f.Data)
			h.mu.Unlock()
			continue
		case *http2.DataFrame:
			text = fmt.Sprintf("DATA %q", f.Data())
			if f.StreamEnded() {
				text += " END_STREAM"
			}
		default:
			text = f.Header().Type.String()
		}
		h.mu.Lock()
		h.events = append(h.events, h2Event{f.Header().StreamID, text})
		h.mu.Unlock()
	}
}

// headers sends a HEADERS frame, END_HEADERS only.
func (h *h2Client) headers(stream uint32, fields ...hpack.HeaderField) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.hbuf.Reset()
	for _, f := range fields {
		if err := h.enc.WriteField(f); err != nil {
			return err
		}
	}
	return h.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: h.hbuf.Bytes(), EndHeaders: true})
}

func (h *h2Client) connect(stream uint32, authority string) error {
	return h.headers(stream, hpack.HeaderField{Name: ":method", Value: "CONNECT"},
		hpack.HeaderField{Name: ":authority", Value: authority})
}

func (h *h2Client) reset(stream uint32) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.fr.WriteRSTStream(stream, http2.ErrCodeCancel)
}

// flood sends what f writes, again and again, as many frames to a record as go into it, until the peer has enough; it
// returns how many frames that were.
func (h *h2Client) flood(ctx context.Context, f func(*http2.Framer) error) (sent int) {
	var b bytes.Buffer
	fr := http2.NewFramer(&b, nil)
	fr.AllowIllegalWrites = true
	n := 0
	for ; b.Len() < 16000; n++ {
		if err := f(fr); err != nil {
			return 0
		}
	}
	for ctx.Err() == nil && sent < 1<<18 {
		h.mu.Lock()
		_, err := h.conn.Write(b.Bytes())
		h.mu.Unlock()
		if err != nil {
			break
		}
		sent += n
	}
	return sent
}

// calmed waits for the end of the connection, and reports whether it came with ENHANCE_YOUR_CALM.
func (h *h2Client) calmed() bool {
	select {
	case <-h.done:
	case <-time.After(3 * time.Second):
	}
	got, _ := h.of(0)
	return slices.ContainsFunc(got, func(s string) bool {
		return strings.HasPrefix(s, "GOAWAY") && strings.HasSuffix(s, "ENHANCE_YOUR_CALM")
	})
}

// of returns what came for a stream so far (0: the connection), and the error that ended the connection, if any.
func (h *h2Client) of(stream uint32) ([]string, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []string
	for _, e := range h.events {
		if e.stream == stream {
			out = append(out, e.text)
		}
	}
	return out, h.end
}

func (h *h2Client) close() { h.conn.Close(); <-h.done }
