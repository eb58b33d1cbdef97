package identity

import (
	"crypto/tls"
	"crypto/x509"
	"testing"
	"time"
)

// BenchmarkHandshake is one full mutual handshake, both ends on this machine. "remembering server" is what the server
// would gain if it remembered chains as the client does, at the price of telling every refused client "bad
// certificate".
func BenchmarkHandshake(b *testing.B) {
	ca := newTestCA(b, "root")
	one, two := ca.issue(b, []string{uriA}, nil), ca.issue(b, []string{uriB}, nil)
	run := func(name string, server *tls.Config, client func() *tls.Config) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if o := shake(b, pipe, server, client()); o.client != nil {
					b.Fatal(o.client)
				}
			}
		})
	}
	client := func() *tls.Config { return ClientTLS(one, []ID{idB}, Params{}) }
	run("as built", ServerTLS(two, Params{}), client)
	remembering := ServerTLS(two, Params{}).Clone()
	remembering.ClientAuth = tls.RequireAnyClientCert
	var v verifier
	v.roots = two.Pool
	remembering.VerifyConnection = func(cs tls.ConnectionState) error {
		if err := v.verify(cs.PeerCertificates, x509.ExtKeyUsageServerAuth, time.Now()); err != nil {
			return err
		}
		return two.checkClient(cs, nil)
	}
	run("remembering server", remembering, client)
	run("forgetful client", ServerTLS(two, Params{}), func() *tls.Config {
		one.peers.seen = nil
		return client()
	})
	run("X25519 alone", ServerTLS(two, Params{}), func() *tls.Config {
		cfg := client()
		cfg.CurvePreferences = []tls.CurveID{tls.X25519}
		return cfg
	})
}

func BenchmarkParse(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Parse(uriA); err != nil {
			b.Fatal(err)
		}
	}
}
