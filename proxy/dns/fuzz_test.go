package dns

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// Whatever a message is, the server survives it, an answer of ours is a
// well-formed reply to it within its sender's limit, and what it passes on, it
// passes on unchanged.
func FuzzServe(f *testing.F) {
	for _, q := range []string{"A cart", "AAAA hl.blue", "A api.acme.test.blue.svc.cluster.local", "MX cart",
		"AXFR acme.test", "A elsewhere.test", `A x\.y.acme.test`, "A ."} {
		f.Add(mustPack(ask(q)), false, []byte("reply"))
		f.Add(mustPack(ask(q).SetEdns0(600, true)), true, mustPack(new(dns.Msg).SetReply(ask(q))))
	}
	f.Add(mustPack(new(dns.Msg).SetUpdate("acme.test.")), false, []byte{})
	f.Add(append([]byte{7, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0}, 0xc0, 12, 0, 1, 0, 1), false, []byte{})
	f.Add(append([]byte{7, 7, 1, 0, 0, 1, 0xff, 0xff, 0, 0, 0, 0}, 3, 'w', 'w', 'w', 0xc0, 0xff), false, []byte{})
	f.Add(slices.Repeat([]byte{1, 'a'}, 130), true, []byte{1, 'a', 0x80})
	var relayed, reply []byte
	s, err := New(Config{Client: blueClient.Info(), Knowledge: know(build(vectors()...)), Options: Options{IPv6: true},
		Timeout: time.Second, Upstream: &upstream{}})
	if err != nil {
		f.Fatal(err)
	}
	nothing := errors.New("nothing")
	f.Fuzz(func(t *testing.T, raw []byte, tcp bool, up []byte) {
		if len(raw) > maxPacket {
			return
		}
		before := bytes.Clone(raw)
		relayed, reply = nil, nil
		q := &query{raw: raw, tcp: tcp, asked: netip.MustParseAddrPort("10.0.0.1:53")}
		out := s.serve(t.Context(), q, func(_ context.Context, q *query) ([]byte, error) {
			relayed = bytes.Clone(q.raw)
			if !answers(q.raw, up) {
				return nil, nothing
			}
			reply = up
			return up, nil
		})
		switch {
		case !bytes.Equal(raw, before) || relayed != nil && !bytes.Equal(relayed, before):
			t.Fatal("the message was changed")
		case out == nil:
			if len(raw) >= headerSize && !isResponse(raw) {
				t.Fatal("no reply")
			}
		case reply != nil:
			if !bytes.Equal(out, reply) {
				t.Fatal("upstream's reply was changed")
			}
		default:
			m := new(dns.Msg)
			if err := m.Unpack(out); err != nil {
				t.Fatalf("%x: %v", out, err)
			}
			limit := maxTCP
			if q.msg != nil && !tcp {
				limit = udpLimit(q.msg)
			}
			if [2]byte(out) != [2]byte(raw) || !m.Response || m.AuthenticatedData || len(out) > limit {
				t.Fatalf("%d bytes of %d: %v", len(out), limit, m)
			}
		}
	})
}
