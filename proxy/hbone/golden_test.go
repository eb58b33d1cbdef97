package hbone

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// rawPeer speaks frames by hand, with nothing of ours.
type rawPeer struct {
	t    testing.TB
	c    net.Conn
	fr   *http2.Framer
	henc *hpack.Encoder
	hbuf bytes.Buffer
}

func newRawPeer(t testing.TB, c net.Conn) *rawPeer {
	p := &rawPeer{t: t, c: c, fr: http2.NewFramer(c, c)}
	p.fr.SetMaxReadFrameSize(1 << 20)
	p.fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	p.fr.AllowIllegalWrites = true
	p.henc = hpack.NewEncoder(&p.hbuf)
	c.SetDeadline(time.Now().Add(patience))
	return p
}

// clientOfRawPeer is a client, the peer that it has sent its preface to, and the peer's socket.
func clientOfRawPeer(t testing.TB, cfg Config) (cc *ClientConn, p *rawPeer, b *net.TCPConn) {
	t.Helper()
	a, b := tcpPair(t)
	cc, err := NewClientConn(a, cfg)
	if err != nil {
		t.Fatal(err)
	}
	p = newRawPeer(t, b)
	if _, err := io.ReadFull(b, make([]byte, len(http2.ClientPreface))); err != nil {
		t.Fatal(err)
	}
	return cc, p, b
}

func (p *rawPeer) preface() {
	p.t.Helper()
	p.check(io.WriteString(p.c, http2.ClientPreface))
	p.check(0, p.fr.WriteSettings())
}

func (p *rawPeer) check(_ int, err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

func (p *rawPeer) block(fields ...string) []byte {
	p.hbuf.Reset()
	for i := 0; i < len(fields); i += 2 {
		p.henc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return bytes.Clone(p.hbuf.Bytes())
}

func (p *rawPeer) headers(id uint32, end bool, fields ...string) {
	p.t.Helper()
	p.check(0, p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: p.block(fields...), EndHeaders: true,
		EndStream: end}))
}

func (p *rawPeer) connect(id uint32) {
	p.t.Helper()
	p.headers(id, false, ":method", "CONNECT", ":authority", "10.0.0.1:80")
}

// next is the next frame, as text: enough to compare. ok is false at the end of the connection.
func (p *rawPeer) next() (text string, id uint32, ok bool) {
	f, err := p.fr.ReadFrame()
	if err != nil {
		return err.Error(), 0, false
	}
	return frameText(f), f.Header().StreamID, true
}

// expect skips frames until one reads like want.
func (p *rawPeer) expect(want string) {
	p.t.Helper()
	var seen []string
	for {
		text, _, ok := p.next()
		if strings.Contains(text, want) {
			return
		}
		seen = append(seen, text)
		if !ok {
			p.t.Fatalf("no %q, but %q", want, seen)
		}
	}
}

func frameText(f http2.Frame) string {
	h := f.Header()
	s := fmt.Sprintf("%v %d", h.Type, h.StreamID)
	switch f := f.(type) {
	case *http2.SettingsFrame:
		if f.IsAck() {
			s += " ACK"
		}
		f.ForeachSetting(func(st http2.Setting) error {
			s += fmt.Sprintf(" %v=%d", st.ID, st.Val)
			return nil
		})
	case *http2.MetaHeadersFrame:
		if f.StreamEnded() {
			s += " END_STREAM"
		}
		for _, hf := range f.Fields {
			s += fmt.Sprintf(" %s=%s", hf.Name, hf.Value)
		}
	case *http2.DataFrame:
		s += fmt.Sprintf(" len=%d", h.Length)
		if f.StreamEnded() {
			s += " END_STREAM"
		}
	case *http2.RSTStreamFrame:
		s += " " + f.ErrCode.String()
	case *http2.WindowUpdateFrame:
		s += fmt.Sprintf(" +%d", f.Increment)
	case *http2.GoAwayFrame:
		s += fmt.Sprintf(" last=%d %v", f.LastStreamID, f.ErrCode)
	case *http2.PingFrame:
		if f.IsAck() {
			s += " ACK"
		}
		s += fmt.Sprintf(" %x", f.Data)
	}
	return s
}

// session is one of samples/inbound-answers.txt.
type session struct {
	name    string
	streams []sessionStream
	want    map[uint32][]string // by stream; 0: the connection's
}

type sessionStream struct {
	id     uint32
	fields []string
}

var (
	sentLine  = regexp.MustCompile(`^>> stream (\d+) \[(.*)\]$`)
	sentField = regexp.MustCompile(`header field ("(?:[^"\\]|\\.)*") = ("(?:[^"\\]|\\.)*")`)
	gotLine   = regexp.MustCompile(`^<< \[FrameHeader (\w+)(?: flags=(\S+))?(?: stream=(\d+))? len=\d+\]$`)
)

func readSessions(t *testing.T) (out []*session) {
	data, err := os.ReadFile("../../docs/samples/inbound-answers.txt")
	if err != nil {
		t.Fatal(err)
	}
	var s *session
	var id uint32
	for line := range strings.Lines(string(data)) {
		line = strings.TrimRight(line, "\n")
		last := func(add string) { l := s.want[id]; l[len(l)-1] += add }
		switch {
		case strings.HasPrefix(line, "## "):
			s = &session{name: line[3:], want: map[uint32][]string{}}
			out = append(out, s)
		case sentLine.MatchString(line):
			m := sentLine.FindStringSubmatch(line)
			n, _ := strconv.Atoi(m[1])
			st := sessionStream{id: uint32(n)}
			for _, f := range sentField.FindAllStringSubmatch(m[2], -1) {
				name, _ := strconv.Unquote(f[1])
				value, _ := strconv.Unquote(f[2])
				st.fields = append(st.fields, name, value)
			}
			s.streams = append(s.streams, st)
		case gotLine.MatchString(line):
			m := gotLine.FindStringSubmatch(line)
			n, _ := strconv.Atoi("0" + m[3])
			id = uint32(n)
			text := fmt.Sprintf("%s %d", m[1], id)
			if m[2] == "ACK" {
				text += " ACK"
			}
			if strings.Contains(m[2], "END_STREAM") {
				text += " END_STREAM"
			}
			s.want[id] = append(s.want[id], text)
		case strings.HasPrefix(line, "      + "):
			last(" +" + line[8:])
		case strings.HasPrefix(line, "      "):
			v := strings.Trim(strings.TrimSpace(line), "[]")
			last(" " + strings.Replace(v, " = ", "=", 1))
		case strings.HasPrefix(line, "<< end: remote error"), strings.HasPrefix(line, "handshake: "):
			out = out[:len(out)-1] // about TLS, not about HTTP/2
		}
	}
	return out
}

const sampleBaggage = "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.deployment.name=b-deploy,service.name=b,service.version=v2,cloud.region=r1,cloud.availability_zone=z1"

// sampleHandler decides as the ztunnel of the samples did; what is tested is how that looks on the wire.
func sampleHandler(ss *ServerStream) {
	if ss.Method() != "CONNECT" {
		ss.Refuse(400)
		return
	}
	switch ss.Authority() {
	case "10.91.2.2:9000", "b.default.svc.cluster.local:80":
		ss.Accept(&Response{Status: 200, Baggage: sampleBaggage, HasBaggage: true})
		<-ss.Done()
	case "10.91.2.2:9998", "10.91.2.2:15008", "10.91.2.2:0", "nope.default.svc.cluster.local:80":
		ss.Refuse(503)
	case "10.91.2.2:7777":
		ss.Refuse(401)
	default:
		ss.Refuse(400)
	}
}

func TestGoldenInbound(t *testing.T) {
	sessions := readSessions(t)
	if len(sessions) != 9 {
		t.Errorf("%d sessions about HTTP/2 in the sample", len(sessions))
	}
	for _, s := range sessions {
		t.Run(s.name, func(t *testing.T) {
			a, b := tcpPair(t)
			sc := NewServerConn(b, Config{}, sampleHandler)
			served := make(chan error, 1)
			go func() { served <- sc.Serve(context.Background()) }()
			p := newRawPeer(t, a)
			p.preface()
			for _, st := range s.streams {
				p.headers(st.id, false, st.fields...)
			}
			left := 0
			for _, l := range s.want {
				left += len(l)
			}
			got := map[uint32][]string{}
			for range left {
				text, id, ok := p.next()
				if !ok {
					t.Fatal(text)
				}
				got[id] = append(got[id], text)
			}
			// Within a stream the order counts. On the connection SETTINGS come first; the sample itself shows the
			// acknowledgement before and after WINDOW_UPDATE.
			if got[0][0] != s.want[0][0] {
				t.Errorf("first frame %s", got[0][0])
			}
			slices.Sort(got[0])
			slices.Sort(s.want[0])
			for id := range s.want {
				if !slices.Equal(got[id], s.want[id]) {
					t.Errorf("stream %d:\n got %q\nwant %q", id, got[id], s.want[id])
				}
			}
			a.Close()
			<-served
		})
	}
}

func TestGoldenConnectRequest(t *testing.T) {
	data, err := os.ReadFile("../../docs/samples/connect-request.txt")
	if err != nil {
		t.Fatal(err)
	}
	var settings string
	var fields []string
	var window int
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSpace(line)
		if v, ok := strings.CutPrefix(line, "preface, SETTINGS: "); ok {
			settings = v
		} else if v, ok := strings.CutPrefix(line, "WINDOW_UPDATE stream 0: +"); ok {
			window, _ = strconv.Atoi(v)
		} else if k, v, ok := strings.Cut(line, " = "); ok && !strings.HasPrefix(line, "#") {
			v, _, _ = strings.Cut(v, "    ")
			fields = append(fields, k+"="+v)
		}
	}
	if len(fields) != 5 || settings == "" || window == 0 {
		t.Fatal("sample not understood:", fields, settings, window)
	}
	value := func(name string) string {
		for _, f := range fields {
			if v, ok := strings.CutPrefix(f, name+"="); ok {
				return v
			}
		}
		t.Fatal(name)
		return ""
	}

	a, b := tcpPair(t)
	cc, err := NewClientConn(a, Config{})
	if err != nil {
		t.Fatal(err)
	}
	type result struct {
		s   *Stream
		err error
	}
	opened := make(chan result, 2)
	go func() {
		for _, req := range []*Request{
			{Authority: value(":authority"), Baggage: value("baggage"), Forwarded: value("forwarded"),
				Traceparent: value("traceparent")},
			{Authority: value(":authority"), Forwarded: `for="10.91.1.2:25036"`, SendForwardedNetwork: true},
		} {
			s, _, err := cc.Open(context.Background(), req)
			opened <- result{s, err}
		}
	}()
	p := newRawPeer(t, b)
	preface := make([]byte, len(http2.ClientPreface))
	if _, err := io.ReadFull(b, preface); err != nil || string(preface) != http2.ClientPreface {
		t.Fatalf("%q %v", preface, err)
	}
	// All of this before the server has said anything.
	for _, want := range []string{
		"SETTINGS 0 " + settings,
		fmt.Sprintf("WINDOW_UPDATE 0 +%d", window),
		"HEADERS 1 " + strings.Join(fields, " "),
	} {
		if got, _, _ := p.next(); got != want {
			t.Errorf("\n got %s\nwant %s", got, want)
		}
	}
	p.check(0, p.fr.WriteSettings())
	p.headers(1, false, ":status", "200", "baggage", "k=v")
	first := <-opened
	if first.err != nil {
		t.Fatal(first.err)
	}
	p.expect(
		`HEADERS 3 :method=CONNECT :authority=10.91.2.2:9000 baggage= forwarded=for="10.91.1.2:25036" traceparent= x-forwarded-network=`)
	first.s.Write([]byte("hello"))
	first.s.CloseWrite()
	p.expect("DATA 1 len=5")
	if got, _, _ := p.next(); got != "DATA 1 len=0 END_STREAM" {
		t.Error(got)
	}
	p.headers(3, true, ":status", "503")
	second := <-opened
	if second.err == nil || second.err.Error() != "http status: 503 Service Unavailable" {
		t.Error(second.err)
	}
	p.fr.WriteData(1, true, nil)
	if n, err := first.s.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Error(n, err)
	}
	cc.Close()
	b.Close()
}
