package hbone

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// suites: crypto/tls does not let a configuration choose among TLS 1.3 suites; which one is taken depends on the
// processor. The other one is covered by TestRecordsBothSuites, without crypto/tls.

func TestRecordsWithCryptoTLS(t *testing.T) {
	for _, oursIsClient := range []bool{true, false} {
		name := "server"
		if oursIsClient {
			name = "client"
		}
		t.Run(name, func(t *testing.T) {
			a, b := mixedTLS(t, oursIsClient, nil)
			ours, theirs := a, b
			if !oursIsClient {
				ours, theirs = b, a
			}
			if _, ok := ours.(*tlsConn); !ok {
				t.Fatalf("record layer not taken over: %T", ours)
			}
			// Our key changes often; crypto/tls has to follow.
			ours.(*tlsConn).rec.rekeyAfter = 5
			want := payload(2 << 20)
			for _, ends := range [][2]net.Conn{{ours, theirs}, {theirs, ours}} {
				errs := make(chan error, 1)
				go func() {
					_, err := ends[0].Write(want)
					errs <- err
				}()
				got := make([]byte, len(want))
				if _, err := io.ReadFull(ends[1], got); err != nil || !bytes.Equal(got, want) {
					t.Fatal(err)
				}
				if err := <-errs; err != nil {
					t.Fatal(err)
				}
			}
			// close_notify in both directions.
			go func() {
				theirs.(*tls.Conn).CloseWrite()
			}()
			if n, err := ours.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Error(n, err)
			}
			ours.(*tlsConn).CloseWrite()
			if n, err := theirs.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Error(n, err)
			}
			ours.Close()
			theirs.Close()
		})
	}
}

// TestRecordsTickets: tickets of a server that sends them are read over.
func TestRecordsTickets(t *testing.T) {
	a, b := mixedTLS(t, true, func(c, s *tls.Config) { c.ClientSessionCache = tls.NewLRUClientSessionCache(4) })
	defer a.Close()
	defer b.Close()
	if _, ok := a.(*tlsConn); !ok {
		t.Fatalf("%T", a)
	}
	go b.Write([]byte("after the tickets"))
	buf := make([]byte, 17)
	if _, err := io.ReadFull(a, buf); err != nil || string(buf) != "after the tickets" {
		t.Fatal(string(buf), err)
	}
}

// TestRecordsServerRefuses: in TLS 1.3 the client has finished when the server rejects its certificate.
func TestRecordsServerRefuses(t *testing.T) {
	a, b := tcpPair(t)
	ccfg, scfg := testTLS(t)
	ccfg.Certificates = nil
	go func() {
		if _, _, err := Server(context.Background(), b, scfg, nil); err == nil {
			t.Error("server took a client without certificate")
		}
	}()
	c, _, err := Client(context.Background(), a, ccfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err = c.Read(make([]byte, 1)); err == nil || err.Error() != "remote error: tls: certificate required" {
		t.Fatal(err)
	}
	cc, err := NewClientConn(c, Config{})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := cc.Open(context.Background(), &Request{}); err == nil ||
		!strings.Contains(err.Error(), "certificate required") {
		t.Error(err)
	}
	cc.Close()
}

// memoryRecords is a pair of record layers without a handshake: what one seals, feed gives the other.
func memoryRecords(t testing.TB, suite uint16, secretLen int) (seal, open *records) {
	t.Helper()
	mk := func() *direction {
		h, err := newDirection(suite, bytes.Repeat([]byte{7}, secretLen))
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	a, b := net.Pipe()
	t.Cleanup(func() { a.Close(); b.Close() })

	return newRecords(newWire(a, new(Buffers)), mk(), mk(), false), newRecords(newWire(b, new(Buffers)), mk(), mk(), true)
}

func (r *records) feed(b []byte) { r.end += copy(r.take(), b) }

// spare gives b the byte that seal needs after it.
func spare(b string) []byte { return append([]byte(b), 0)[:len(b)] }

func TestRecordsBothSuites(t *testing.T) {
	for suite, secret := range map[uint16]int{tls.TLS_AES_128_GCM_SHA256: 32, tls.TLS_AES_256_GCM_SHA384: 48} {
		seal, open := memoryRecords(t, suite, secret)
		seal.rekeyAfter = 2
		buf := make([]byte, blockLarge)
		for i := range 10 {
			wire, err := seal.seal(nil, spare(strings.Repeat("x", i*5000)))
			if err != nil {
				t.Fatal(err)
			}
			open.feed(wire)
			n, err := open.fill(buf)
			if err != nil || n != i*5000 || strings.Trim(string(buf[:n]), "x") != "" {
				t.Fatal(i, n, err)
			}
		}
		// A KeyUpdate that wants an answer.
		open.feed(seal.sealRecord(nil, spare("\x18\x00\x00\x01\x01"), typeHandshake))
		seal.out.update()
		if _, err := open.fill(buf); err != nil || !open.urgent() {
			t.Fatal(err)
		}
		answer, err := open.seal(nil, spare("y"))
		if err != nil || open.urgent() {
			t.Fatal(err)
		}
		seal.feed(answer)
		if n, err := seal.fill(buf); err != nil || string(buf[:n]) != "y" {
			t.Fatal(n, err)
		}
	}
	if _, err := newDirection(tls.TLS_CHACHA20_POLY1305_SHA256, make([]byte, 32)); err == nil {
		t.Error("ChaCha20")
	}
}

// TestRecordsHostile is one fault per case; the alert must be the right one, and stick.
func TestRecordsHostile(t *testing.T) {
	good := func(r *records, typ byte, plain string) []byte { return r.sealRecord(nil, spare(plain), typ) }
	const ticket = "\x04\x00\x00\x0elifetime\x00\x00\x01t\x00\x00"
	cases := map[string]struct {
		wire  func(r *records) []byte
		alert uint8
	}{
		"flipped bit": {func(r *records) []byte {
			b := good(r, typeApplicationData, "hello")
			b[9] ^= 1
			return b
		}, alertBadRecordMAC},
		"replayed": {func(r *records) []byte {
			b := good(r, typeApplicationData, "hello")
			return append(b, b...)
		}, alertBadRecordMAC},
		"too long": {func(r *records) []byte { return []byte{23, 3, 3, 0x41, 1, 0} }, alertRecordOverflow},
		"too short": {func(r *records) []byte {
			return append([]byte{23, 3, 3, 0, 16}, make([]byte, 16)...)
		}, alertBadRecordMAC},
		"plaintext alert":    {func(r *records) []byte { return []byte{21, 3, 3, 0, 2, 2, 40} }, alertUnexpectedMessage},
		"change cipher spec": {func(r *records) []byte { return []byte{20, 3, 3, 0, 1, 1} }, alertUnexpectedMessage},
		"padding only":       {func(r *records) []byte { return good(r, 0, "\x00\x00") }, alertUnexpectedMessage},
		"unknown type":       {func(r *records) []byte { return good(r, 99, "x") }, alertUnexpectedMessage},
		"plaintext overflow": {func(r *records) []byte {
			return good(r, typeApplicationData, strings.Repeat("x", recordLen+1))
		}, alertRecordOverflow},
		"empty handshake": {func(r *records) []byte { return good(r, typeHandshake, "") }, alertUnexpectedMessage},
		"finished": {func(r *records) []byte {
			return good(r, typeHandshake, "\x14\x00\x00\x01\x00")
		}, alertUnexpectedMessage},
		"huge handshake": {func(r *records) []byte {
			return good(r, typeHandshake, "\x04\x10\x00\x00")
		}, alertDecodeError},
		"long key update": {func(r *records) []byte {
			return good(r, typeHandshake, "\x18\x00\x00\x02\x00\x00")
		}, alertDecodeError},
		"odd key update": {func(r *records) []byte {
			return good(r, typeHandshake, "\x18\x00\x00\x01\x02")
		}, alertIllegalParameter},
		"key update, then more": {func(r *records) []byte {
			return good(r, typeHandshake, "\x18\x00\x00\x01\x00\x04")
		}, alertUnexpectedMessage},
		"data in a message": {func(r *records) []byte {
			return append(good(r, typeHandshake, "\x04\x00\x00\x05x"), good(r, typeApplicationData, "x")...)
		}, alertUnexpectedMessage},
		"empty flood": {func(r *records) (b []byte) {
			for range maxUseless + 1 {
				b = append(b, good(r, typeApplicationData, "")...)
			}
			return b
		}, alertUnexpectedMessage},
		"short ticket": {func(r *records) []byte {
			return good(r, typeHandshake, "\x04\x00\x00\x04abcd")
		}, alertDecodeError},
		"long ticket": {func(r *records) []byte {
			return good(r, typeHandshake, "\x04\x00\x00\x0f"+ticket[4:]+"x")
		}, alertDecodeError},
		"ticket's extension": {func(r *records) []byte {
			return good(r, typeHandshake, "\x04\x00\x00\x11"+ticket[4:16]+"\x00\x03abc")
		}, alertDecodeError},
		"ticket's early data": {func(r *records) []byte {
			return good(r, typeHandshake, "\x04\x00\x00\x13"+ticket[4:16]+"\x00\x05\x00\x2a\x00\x01x")
		}, alertDecodeError},
		"odd alert": {func(r *records) []byte { return good(r, typeAlert, "\x01") }, alertUnexpectedMessage},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			seal, open := memoryRecords(t, tls.TLS_AES_128_GCM_SHA256, 32)
			open.feed(tc.wire(seal))
			buf := make([]byte, blockLarge)
			for range 2 {
				_, err := open.fill(buf)
				var alert tls.AlertError
				if !errors.As(err, &alert) || uint8(alert) != tc.alert || uint8(open.fatal.Load()) != tc.alert {
					t.Fatal(err)
				}
			}
		})
	}
	seal, open := memoryRecords(t, tls.TLS_AES_128_GCM_SHA256, 32)
	for _, b := range [][]byte{
		good(seal, typeAlert, "\x01\x5a"),                   // user_canceled
		good(seal, typeHandshake, ticket[:7]),               // a ticket in two records
		good(seal, typeHandshake, ticket[7:]+ticket+ticket), // and two more
		good(seal, typeApplicationData, ""),
		good(seal, 0, "padded\x17\x00\x00\x00"),
	} {
		open.feed(b)
		if _, err := open.fill(make([]byte, blockLarge)); err != nil {
			t.Fatal(err)
		}
	}
	open.feed(good(seal, typeAlert, "\x01\x00"))
	if _, err := open.fill(make([]byte, blockLarge)); err != io.EOF {
		t.Fatal(err)
	}
}

// TestRecordsTruncation: without close_notify the end is not a good one.
func TestRecordsTruncation(t *testing.T) {
	a, b := tlsPair(t, false)
	b.(*tlsConn).NetConn().Close()
	if _, err := a.Read(make([]byte, 1)); err != io.ErrUnexpectedEOF {
		t.Error(err)
	}
	a.Close()
}

// TestRecordsAlertReachesPeer: a violation is answered with its alert.
func TestRecordsAlertReachesPeer(t *testing.T) {
	a, b := mixedTLS(t, true, nil)
	cc, err := NewClientConn(a, Config{})
	if err != nil {
		t.Fatal(err)
	}
	b.(*tls.Conn).NetConn().Write([]byte{23, 3, 3, 0, 20, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18,
		19, 20})
	b.SetReadDeadline(time.Now().Add(patience))
	_, err = io.Copy(io.Discard, b)
	if err == nil || !strings.Contains(err.Error(), "bad record MAC") {
		t.Error(err)
	}
	<-cc.Done()
	cc.Close()
	b.Close()
}

func FuzzRecords(f *testing.F) {
	seal, _ := memoryRecords(f, tls.TLS_AES_128_GCM_SHA256, 32)
	f.Add(seal.sealRecord(nil, spare("hello"), typeApplicationData), []byte("hello"), byte(typeApplicationData))
	f.Add([]byte{23, 3, 3, 0, 2, 1, 0}, []byte("\x18\x00\x00\x01\x01"), byte(typeHandshake))
	f.Add([]byte{}, []byte("\x01\x00"), byte(typeAlert))
	f.Fuzz(func(t *testing.T, wire, plain []byte, typ byte) {
		seal, open := memoryRecords(t, tls.TLS_AES_128_GCM_SHA256, 32)
		buf := make([]byte, blockLarge)
		if len(plain) > recordLen {
			plain = plain[:recordLen]
		}
		open.feed(seal.sealRecord(nil, spare(string(plain)), typ))
		n, err := open.fill(buf)
		if typ == typeApplicationData && (err != nil || !bytes.Equal(buf[:n], plain)) {
			t.Fatal(err)
		}
		if len(wire) > wireLen/2 {
			wire = wire[:wireLen/2]
		}
		open.feed(wire)
		open.fill(buf)
	})
}
