package hbone

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

func FuzzCleanReason(f *testing.F) {
	for _, s := range []string{"", "explicitly denied by: default/no", "a\r\nb: c", "\x1b[31m", strings.Repeat("é", 400),
		strings.Repeat(" x", 300), " "} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got := CleanReason(s)
		if len(got) > MaxReason || strings.TrimSpace(got) != got || strings.Contains(got, "  ") {
			t.Errorf("%q becomes %q", s, got)
		}
		for i := 0; i < len(got); i++ {
			if got[i] < ' ' || got[i] > '~' {
				t.Errorf("%q becomes %q", s, got)
			}
		}
		if again := CleanReason(got); again != got {
			t.Errorf("%q becomes %q, and that %q", s, got, again)
		}
		plain := len(s) <= MaxReason && strings.TrimSpace(s) == s && !strings.Contains(s, "  ")
		for i := 0; i < len(s); i++ {
			plain = plain && s[i] >= ' ' && s[i] <= '~'
		}
		if plain && got != s {
			t.Errorf("%q becomes %q though there is nothing wrong with it", s, got)
		}
	})
}

// TestReasonTravels: a refusal says why, cleaned where it is sent and where it is believed; what is no refusal has
// none.
func TestReasonTravels(t *testing.T) {
	long := strings.Repeat("long ", 1000)
	for _, c := range []struct {
		status       int
		reason, want string
	}{
		{401, "explicitly denied by: default/no", "http status: 401 Unauthorized: explicitly denied by: default/no"},
		{503, "", "http status: 503 Service Unavailable"},
		{400, "two\r\nlines \x1b[31m", "http status: 400 Bad Request: two lines ?[31m"},
		{503, long, "http status: 503 Service Unavailable: " + CleanReason(long)},
	} {
		client, server := net.Pipe()
		sc := NewServerConn(server, Config{}, func(ss *ServerStream) {
			ss.RefuseWith(&Response{Status: c.status, Reason: c.reason})
		})
		done := make(chan struct{})
		go func() { defer close(done); sc.Serve(context.Background()) }()
		cc, err := NewClientConn(client, Config{})
		if err != nil {
			t.Fatal(err)
		}
		_, _, err = cc.Open(context.Background(), &Request{Authority: "10.0.0.1:80"})
		var refused *StatusError
		if !errors.As(err, &refused) || err.Error() != c.want {
			t.Errorf("refused with %d %.60q: %v", c.status, c.reason, err)
		}
		cc.Close()
		sc.Close()
		<-done
	}
}

// TestReasonIsForeign: a peer that is no ztun may write anything there, as often as it likes, and with any answer.
func TestReasonIsForeign(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	c := newClientConn(a, Config{}).c
	answer := func(status string, values ...string) Response {
		s := newStream(c, 1)
		s.opened = make(chan struct{})
		c.streams[1] = s
		f := &http2.MetaHeadersFrame{HeadersFrame: &http2.HeadersFrame{FrameHeader: http2.FrameHeader{StreamID: 1}},
			Fields: []hpack.HeaderField{{Name: ":status", Value: status}}}
		for _, v := range values {
			f.Fields = append(f.Fields, hpack.HeaderField{Name: reasonHeader, Value: v})
		}
		if err := c.takeAnswer(f); err != nil {
			t.Fatal(err)
		}
		return s.response
	}
	if r := answer("401", "\x1b[2J\x00 "+strings.Repeat("x", 9999), "second"); len(r.Reason) != MaxReason ||
		!strings.HasPrefix(r.Reason, "?[2J? x") || !strings.HasSuffix(r.Reason, "...") {
		t.Errorf("believed is %q", r.Reason)
	}
	if r := answer("200", "why not"); r.Reason != "" {
		t.Errorf("a granted request has the reason %q", r.Reason)
	}
}
