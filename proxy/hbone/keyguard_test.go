package hbone

import (
	"crypto/tls"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// panics runs f and reports what it panicked with.
func panics(f func()) (what any) {
	defer func() { what = recover() }()
	f()
	return nil
}

// TestOneSealerAtATime: the guard finds a second goroutine at a key, in either direction, and whoever seals after
// close_notify.
func TestOneSealerAtATime(t *testing.T) {
	r, _ := memoryRecords(t, tls.TLS_AES_128_GCM_SHA256, 32)
	for _, tc := range []struct {
		name string
		dir  *direction
		do   func()
	}{
		{"fill", r.in, func() { r.fill(make([]byte, blockLarge)) }},
		{"seal", r.out, func() { r.seal(nil, spare("x")) }},
		{"close_notify", r.out, func() { r.closeNotify(nil) }},
	} {
		if err := tc.dir.guard.begin(); err != nil {
			t.Fatal(err)
		}
		seq := tc.dir.seq
		if got := panics(tc.do); got != errTwoAtKey {
			t.Errorf("%s beside another: %v", tc.name, got)
		}
		if tc.dir.seq != seq {
			t.Errorf("%s took a nonce", tc.name)
		}
		tc.dir.guard.end()
		if got := panics(tc.do); got != nil {
			t.Errorf("%s alone: %v", tc.name, got)
		}
	}
	if got := panics(func() { r.seal(nil, spare("x")) }); got != errKeyOver {
		t.Errorf("after close_notify: %v", got)
	}
}

// TestNothingAfterGoodbye: a KeyUpdate that wants an answer, arriving while close_notify is being written, gets none:
// whoever answered it would be a second sealer.
func TestNothingAfterGoodbye(t *testing.T) {
	a, b := net.Pipe() // a write waits until the peer reads
	near, far := tlsOver(t, a, b)
	peer := near.(*tlsConn)
	sc := NewServerConn(far, Config{}, nil)
	served := make(chan error, 1)
	go func() { served <- sc.Serve(t.Context()) }()
	p := newRawPeer(t, near)
	p.preface()
	p.expect("SETTINGS 0 ACK")
	sc.c.leave(http2.ErrCodeNo, ErrClosed)
	p.expect("GOAWAY")
	eventually(t, func() bool { sc.c.mu.Lock(); defer sc.c.mu.Unlock(); return sc.c.said })
	for range 10 {
		out := peer.rec.sealRecord(nil, spare("\x18\x00\x00\x01\x01"), typeHandshake)
		peer.rec.out.update()
		out, err := peer.rec.seal(out, spare("\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x00\x01"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := a.Write(out); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
	}
	if n, err := near.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Error(n, err)
	}
	if n, err := a.Read(make([]byte, 1)); n != 0 {
		t.Error("a byte after close_notify", err)
	}
	<-served
	near.Close()
}

// TestAdoptedIsTaken: who keeps the TLS connection after he gave it to HTTP/2 cannot write between its frames.
func TestAdoptedIsTaken(t *testing.T) {
	a, b := tlsPair(t, false)
	_, _, _, stop := link(t, a, b, Config{})
	defer stop()
	if _, err := a.Write([]byte("x")); err != errAdopted {
		t.Error(err)
	}
	if _, err := a.Read(make([]byte, 1)); err != errAdopted {
		t.Error(err)
	}
	if err := a.(*tlsConn).CloseWrite(); err != errAdopted {
		t.Error(err)
	}
}
