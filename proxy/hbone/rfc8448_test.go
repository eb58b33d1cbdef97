package hbone

import (
	"bytes"
	"crypto/tls"
	"encoding/hex"
	"io"
	"strings"
	"testing"
)

// unhex reads RFC 8448's way of writing octets.
func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestRFC8448 is the application data and the ends of the simple 1-RTT handshake of RFC 8448, 3, in both directions,
// sealed and opened.
func TestRFC8448(t *testing.T) {
	payload := make([]byte, 50, 51)
	for i := range payload {
		payload[i] = byte(i)
	}
	for _, tc := range []struct{ name, secret, iv, data, alert string }{
		{
			"client",
			"9e 40 64 6c e7 9a 7f 9d c0 5a f8 88 9b ce 65 52 87 5a fa 0b 06 df 00 87 f7 92 eb b7 c1 75 04 a5",
			"5b 78 92 3d ee 08 57 90 33 e5 23 d9",
			`17 03 03 00 43 a2 3f 70 54 b6 2c 94 d0 af fa fe 82 28 ba 55 cb ef ac ea 42 f9 14 aa 66 bc ab 3f 2b
			 98 19 a8 a5 b4 6b 39 5b d5 4a 9a 20 44 1e 2b 62 97 4e 1f 5a 62 92 a2 97 70 14 bd 1e 3d ea e6 3a ee bb 21 69 49 15 e4`,
			"17 03 03 00 13 c9 87 27 60 65 56 66 b7 4d 7f f1 15 3e fd 6d b6 d0 b0 e3",
		},
		{
			"server",
			"a1 1a f9 f0 55 31 f8 56 ad 47 11 6b 45 a9 50 32 82 04 b4 f4 4b fb 6b 3a 4b 4f 1f 3f cb 63 16 43",
			"cf 78 2b 88 dd 83 54 9a ad f1 e9 84",
			`17 03 03 00 43 2e 93 7e 11 ef 4a c7 40 e5 38 ad 36 00 5f c4 a4 69 32 fc 32 25 d0 5f 82 aa 1b 36 e3
			 0e fa f9 7d 90 e6 df fc 60 2d cb 50 1a 59 a8 fc c4 9c 4b f2 e5 f0 a2 1c 00 47 c2 ab f3 32 54 0d d0 32 e1 67 c2 95 5d`,
			"17 03 03 00 13 b5 8f d6 71 66 eb f5 99 d2 47 20 cf be 7e fa 7a 88 64 a9",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			seal, open := memoryRecords(t, tls.TLS_AES_128_GCM_SHA256, 32)
			var err error
			if seal.out, err = newDirection(tls.TLS_AES_128_GCM_SHA256, unhex(t, tc.secret)); err != nil {
				t.Fatal(err)
			}
			if open.in, err = newDirection(tls.TLS_AES_128_GCM_SHA256, unhex(t, tc.secret)); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(seal.out.iv[:], unhex(t, tc.iv)) {
				t.Errorf("IV % x", seal.out.iv)
			}
			if tc.name == "server" { // its first record is a ticket
				seal.out.seq, open.in.seq = 1, 1
			}
			wire, err := seal.seal(nil, payload)
			if err != nil || !bytes.Equal(wire, unhex(t, tc.data)) {
				t.Errorf("% x %v", wire, err)
			}
			if wire = seal.closeNotify(nil); !bytes.Equal(wire, unhex(t, tc.alert)) {
				t.Errorf("% x", wire)
			}
			open.feed(unhex(t, tc.data+tc.alert))
			buf := make([]byte, blockLarge)
			if n, err := open.fill(buf); err != io.EOF || !bytes.Equal(buf[:n], payload) {
				t.Errorf("% x %v", buf[:n], err)
			}
		})
	}
}
