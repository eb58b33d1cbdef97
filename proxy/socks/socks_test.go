package socks

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
)

// client is a peer that said all it will say.
type client struct {
	in  *bytes.Reader
	out bytes.Buffer
}

func (c *client) Read(p []byte) (int, error)  { return c.in.Read(p) }
func (c *client) Write(p []byte) (int, error) { return c.out.Write(p) }

func TestNegotiate(t *testing.T) {
	hello := "\x05\x01\x00"
	for _, tt := range []struct {
		name, in string
		want     string // address or host, port; "" if it fails
		reply    Reply  // of a failure
		silent   bool   // there is nobody to answer
	}{
		{name: "IPv4", in: hello + "\x05\x01\x00\x01\x0a\x01\x02\x03\x00\x50", want: "10.1.2.3 80"},
		{name: "IPv6", in: hello + "\x05\x01\x00\x04\xfd" + strings.Repeat("\x00", 14) + "\x01\x1f\x90",
			want: "fd00::1 8080"},
		{name: "IPv4 in IPv6", in: hello + "\x05\x01\x00\x04" + strings.Repeat("\x00", 10) +
			"\xff\xff\x0a\x00\x00\x01\x00\x01", want: "10.0.0.1 1"},
		{name: "domain", in: hello + "\x05\x01\x00\x03\x05b.svc\x01\xbb", want: "b.svc 443"},
		{name: "domain that is an address", in: hello + "\x05\x01\x00\x03\x0810.1.2.3\x01\xbb", want: "10.1.2.3 443"},
		{name: "longest domain", in: hello + "\x05\x01\x00\x03\xff" + strings.Repeat("a", 255) + "\x00\x01",
			want: strings.Repeat("a", 255) + " 1"},
		{name: "one of several methods", in: "\x05\x03\x02\x01\x00\x05\x01\x00\x01\x7f\x00\x00\x01\x00\x01",
			want: "127.0.0.1 1"},
		{name: "the reserved byte is skipped", in: hello + "\x05\x01\xff\x01\x7f\x00\x00\x01\x00\x01", want: "127.0.0.1 1"},
		{name: "checklist 110: authentication only", in: "\x05\x01\x02", reply: NotSupported},
		{name: "no methods", in: "\x05\x00", reply: NotSupported},
		{name: "SOCKS4", in: "\x04\x01\x00\x50", reply: NotSupported},
		{name: "HTTP", in: "GET / HTTP/1.1\r\n", reply: NotSupported},
		{name: "request of another version", in: hello + "\x04\x01\x00\x01", reply: NotSupported},
		{name: "checklist 111: BIND", in: hello + "\x05\x02\x00\x01", reply: NotSupported},
		{name: "UDP ASSOCIATE", in: hello + "\x05\x03\x00\x01", reply: NotSupported},
		{name: "unknown address type", in: hello + "\x05\x01\x00\x02", reply: NotSupported},
		{name: "empty domain", in: hello + "\x05\x01\x00\x03\x00", reply: NotSupported},
		{name: "domain that is not UTF-8", in: hello + "\x05\x01\x00\x03\x02\xff\xfe", reply: NotSupported},
		{name: "cut short", in: hello + "\x05\x01\x00\x01\x0a", reply: GeneralFailure},
		{name: "left at once", in: "", silent: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := &client{in: bytes.NewReader([]byte(tt.in + "rest"))}
			if tt.want == "" {
				c.in.Reset([]byte(tt.in))
			}
			req, err := Negotiate(c)
			if tt.want == "" {
				r, ok := ReplyOf(err)
				if err == nil || ok == tt.silent || ok && r != tt.reply {
					t.Errorf("%v: reply %d, %v", err, r, ok)
				}
				return
			}
			got := req.Host
			if req.Addr.IsValid() {
				got += req.Addr.String()
			}
			if err != nil || got != strings.Fields(tt.want)[0] || c.out.String() != "\x05\x00" {
				t.Errorf("%+v, %v, answered %x", req, err, c.out.Bytes())
			}
			if rest, _ := io.ReadAll(c.in); string(rest) != "rest" {
				t.Errorf("what follows the handshake was read: %q is left", rest)
			}
		})
	}
}

func TestWriteReply(t *testing.T) {
	var b bytes.Buffer
	if err := WriteReply(&b, HostUnreachable); err != nil || b.String() != "\x05\x04\x00\x01\x00\x00\x00\x00\x00\x00" {
		t.Errorf("%x, %v", b.Bytes(), err)
	}
}

func FuzzNegotiate(f *testing.F) {
	f.Add([]byte("\x05\x01\x00\x05\x01\x00\x01\x0a\x01\x02\x03\x00\x50"))
	f.Add([]byte("\x05\x01\x00\x05\x01\x00\x03\x05b.svc\x01\xbb"))
	f.Add([]byte("\x05\x02\x00\x01\x05\x01\x00\x04\xfd00000000000000000"))
	f.Add([]byte("\x05\x01\x02"))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		c := &client{in: bytes.NewReader(in)}
		req, err := Negotiate(c)
		if used := len(in) - c.in.Len(); used > 521 {
			t.Fatalf("%d bytes were read", used)
		}
		if err != nil {
			var e *Error
			if !errors.As(err, &e) || e.Reply == Succeeded {
				t.Fatalf("%T %v", err, err)
			}
			return
		}
		if req.Addr.IsValid() == (req.Host != "") || len(req.Host) > 255 || req.Addr.Is4In6() {
			t.Fatalf("%+v", req)
		}
		if c.out.String() != "\x05\x00" {
			t.Fatalf("%x", c.out.Bytes())
		}
	})
}
