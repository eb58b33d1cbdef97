package identity

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

const uriA, uriB = "spiffe://cluster.local/ns/default/sa/a", "spiffe://cluster.local/ns/default/sa/b"

var idA, idB = ID{"cluster.local", "default", "a"}, ID{"cluster.local", "default", "b"} // never assigned to

// TestHandshake is samples/inbound-answers.txt's TLS sessions and more: who is let in, and what the other is told.
func TestHandshake(t *testing.T) {
	ca, other := newTestCA(t, "root"), newTestCA(t, "other root")
	a := ca.issue(t, []string{uriA}, nil)
	b := ca.issue(t, []string{uriB}, nil)
	want := []ID{idB}
	// raw is a client that checks nothing, so that only the server can refuse.
	raw := func(c *Certificate, change func(*tls.Config)) *tls.Config {
		cfg := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}
		if c != nil {
			cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &c.TLS, nil }
		}
		if change != nil {
			change(cfg)
		}
		return cfg
	}
	protos := func(p ...string) func(*tls.Config) { return func(c *tls.Config) { c.NextProtos = p } }
	tls12 := func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 }
	issue := func(uri string, opts ...leafOpt) *Certificate { return ca.issue(t, []string{uri}, nil, opts...) }
	both := []*testCA{other, ca}

	for _, c := range []struct {
		name           string
		server, client *tls.Config
		serverErr      string // "" = accepted; "?" = any
		clientErr      string
		alpn           string
	}{
		{"mutual authentication", ServerTLS(b, Params{}), ClientTLS(a, want, Params{}), "", "", "h2"},
		{"second of the expected SANs", ServerTLS(b, Params{}), ClientTLS(a, []ID{idA, idB}, Params{}), "", "", "h2"},
		{"expected SAN is the server's second", ServerTLS(ca.issue(t, []string{"https://x", uriA, uriB}, nil), Params{}),
			ClientTLS(a, want, Params{}), "", "", "h2"},
		{"two roots in both bundles, server of the other", ServerTLS(other.issue(t, []string{uriB}, both), Params{}),
			ClientTLS(ca.issue(t, []string{uriA}, both), want, Params{}), "", "", "h2"},
		{"two roots in both bundles, client of the other", ServerTLS(ca.issue(t, []string{uriB}, both), Params{}),
			ClientTLS(other.issue(t, []string{uriA}, both), want, Params{}), "", "", "h2"},
		{"no ALPN", ServerTLS(b, Params{}), raw(a, protos()), "", "", ""},
		{"ALPN http/1.1 and h2", ServerTLS(b, Params{}), raw(a, protos("http/1.1", "h2")), "", "", "h2"},
		{"client whose second SAN has the trust domain", ServerTLS(b, Params{}),
			raw(ca.issue(t, []string{"spiffe://x/ns/n/sa/s", uriA}, nil), nil), "", "", "h2"},
		{"server without a SPIFFE SAN checks no trust domain", ServerTLS(ca.issue(t, nil, nil), Params{}),
			raw(issue("spiffe://x/ns/n/sa/s"), nil), "", "", "h2"},
		{"TLS 1.2 where it is allowed", ServerTLS(b, Params{TLS12: true}), raw(a, tls12), "", "", "h2"},
		{"TLS 1.2 allowed on both sides: 1.3", ServerTLS(b, Params{TLS12: true}), ClientTLS(a, want, Params{TLS12: true}), "",
			"", "h2"},

		{"no client certificate", ServerTLS(b, Params{}), raw(nil, nil),
			"tls: client didn't provide a certificate", "remote error: tls: certificate required", ""},
		{"other trust domain", ServerTLS(b, Params{}), raw(issue("spiffe://other/ns/default/sa/a"), nil),
			"identity verification error: peer did not present the expected trustdomain (cluster.local), got " +
				"spiffe://other/ns/default/sa/a",
			"remote error: tls: bad certificate", ""}, // ztunnel: unknown certificate
		{"trust domain in other case", ServerTLS(b, Params{}), raw(issue("spiffe://Cluster.local/ns/default/sa/a"), nil),
			"identity verification error: peer did not present the expected trustdomain (cluster.local), got " +
				"spiffe://Cluster.local/ns/default/sa/a",
			"remote error: tls: bad certificate", ""},
		{"SAN that is no SPIFFE id", ServerTLS(b, Params{}), raw(issue("https://cluster.local/ns/default/sa/a"), nil),
			"identity verification error: peer did not present the expected trustdomain (cluster.local), got ",
			"remote error: tls: bad certificate", ""}, // ztunnel: unknown certificate
		{"client certificate without SAN", ServerTLS(b, Params{}), raw(ca.issue(t, nil, nil), nil), "?",
			"remote error: tls: bad certificate", ""},
		{"client certificate expired", ServerTLS(b, Params{}), raw(issue(uriA, valid(-time.Hour, -time.Minute)), nil), "?",
			"remote error: tls: expired certificate", ""},
		{"client certificate not valid yet", ServerTLS(b, Params{}), raw(issue(uriA, valid(time.Hour, 2*time.Hour)), nil),
			"?", "remote error: tls: expired certificate", ""},
		{"client of another root", ServerTLS(b, Params{}), raw(other.issue(t, []string{uriA}, nil), nil), "?",
			"remote error: tls: unknown certificate authority", ""},
		{"client certificate for servers only", ServerTLS(b, Params{}), raw(issue(uriA, usage(x509.ExtKeyUsageServerAuth)),
			nil), "?", "remote error: tls: bad certificate", ""},
		{"client with a CA certificate", ServerTLS(b, Params{}), raw(issue(uriA, isCA), nil),
			"identity verification error: peer presented a CA certificate as its own: ",
			"remote error: tls: bad certificate", ""},
		{"TLS 1.2", ServerTLS(b, Params{}), raw(a, tls12), "?", "remote error: tls: protocol version not supported", ""},
		{"ALPN http/1.1", ServerTLS(b, Params{}), raw(a, protos("http/1.1")), "?",
			"remote error: tls: no application protocol", ""},
		{"ALPN http/1.1, TLS 1.2 allowed", ServerTLS(b, Params{TLS12: true}), raw(a, protos("http/1.1", "spdy/3")), "?",
			"remote error: tls: no application protocol", ""},
		{"ALPN h3", ServerTLS(b, Params{}), raw(a, protos("h3")), "?", "remote error: tls: no application protocol", ""},
		{"ALPN guesses our inner name", ServerTLS(b, Params{}), raw(a, protos(refuseALPN)),
			"identity verification error: peer negotiated the application protocol ztun-refuses, not h2",
			"remote error: tls: bad certificate", ""},

		{"server SAN not expected", ServerTLS(b, Params{}), ClientTLS(a, []ID{idA, {"cluster.local", "default", "c"}},
			Params{}), "remote error: tls: bad certificate",
			"identity verification error: peer did not present the expected SAN " +
				"(spiffe://cluster.local/ns/default/sa/a,spiffe://cluster.local/ns/default/sa/c), got " +
				"spiffe://cluster.local/ns/default/sa/b", ""},
		{"nothing expected", ServerTLS(b, Params{}), ClientTLS(a, nil, Params{}), "remote error: tls: bad certificate",
			"identity verification error: peer did not present the expected SAN (), got spiffe://cluster.local/ns/default/sa/b",
			""},
		{"server of another root", ServerTLS(other.issue(t, []string{uriB}, both), Params{}), ClientTLS(a, want, Params{}),
			"remote error: tls: bad certificate", "?", ""},
		{"server certificate expired", ServerTLS(issue(uriB, valid(-time.Hour, -time.Minute)), Params{}),
			ClientTLS(a, want, Params{}), "remote error: tls: bad certificate", "?", ""},
		{"server certificate for clients only", ServerTLS(issue(uriB, usage(x509.ExtKeyUsageClientAuth)), Params{}),
			ClientTLS(a, want, Params{}), "remote error: tls: bad certificate", "?", ""},
		{"server with a CA certificate", ServerTLS(issue(uriB, isCA), Params{}), ClientTLS(a, want, Params{}),
			"remote error: tls: bad certificate", "identity verification error: peer presented a CA certificate as its own: ",
			""},
		{"server of TLS 1.2", ServerTLS(b, Params{TLS12: true}).Clone(), nil, "?", "?", ""},
	} {
		if c.client == nil { // the last one: a server that cannot do more than 1.2
			c.server.GetConfigForClient, c.server.MaxVersion = nil, tls.VersionTLS12
			c.client = ClientTLS(a, want, Params{})
		}
		for name, dial := range map[string]dialer{"pipe": pipe, "loopback": loopback} {
			t.Run(c.name+"/"+name, func(t *testing.T) {
				o := shake(t, dial, c.server, c.client)
				check := func(who string, err error, want string) {
					t.Helper()
					if want == "?" && err != nil || want == "" && err == nil || err != nil && err.Error() == want {
						return
					}
					t.Errorf("%s: got %v, want %q", who, err, want)
				}
				check("server", o.server, c.serverErr)
				check("client", o.client, c.clientErr)
				if c.serverErr != "" || t.Failed() {
					return
				}
				if o.serverState.NegotiatedProtocol != c.alpn || o.serverState.DidResume {
					t.Errorf("ALPN %q, resumed %v", o.serverState.NegotiatedProtocol, o.serverState.DidResume)
				}
				if _, ok := PeerID(o.serverState); !ok {
					t.Error("server got no identity")
				}
			})
		}
	}
}

// TestErrorTypes: what crypto/tls returns still is our type, for errors.As in the proxy.
func TestErrorTypes(t *testing.T) {
	ca := newTestCA(t, "root")
	a, b := ca.issue(t, []string{uriA}, nil), ca.issue(t, []string{uriB}, nil)
	o := shake(t, pipe, ServerTLS(b, Params{}), ClientTLS(a, []ID{idA}, Params{}))
	var san *PeerSANError
	if !errors.As(o.client, &san) || !slices.Equal(san.Want, []ID{idA}) || !slices.Equal(san.Got, []ID{idB}) {
		t.Errorf("%#v", o.client)
	}
	o = shake(t, pipe, ServerTLS(ca.issue(t, []string{"spiffe://x/ns/n/sa/s"}, nil), Params{}),
		ClientTLS(a, []ID{{"x", "n", "s"}}, Params{}))
	var td *PeerTrustDomainError
	if !errors.As(o.server, &td) || td.Want != "x" || !slices.Equal(td.Got, []ID{idA}) {
		t.Errorf("%#v", o.server)
	}
	var verification *tls.CertificateVerificationError
	o = shake(t, pipe, ServerTLS(newTestCA(t, "other").issue(t, []string{uriB}, []*testCA{ca}), Params{}),
		ClientTLS(a, []ID{idB}, Params{}))
	if !errors.As(o.client, &verification) || len(verification.UnverifiedCertificates) != 1 {
		t.Errorf("%#v", o.client)
	}
}

// TestIntermediates: a chain through an intermediate CA works both ways, and is refused without it.
func TestIntermediates(t *testing.T) {
	root := newTestCA(t, "root")
	key, cert := root.leaf(t, []string{"spiffe://cluster.local"}, isCA, func(c *x509.Certificate) {
		c.Subject.CommonName, c.ExtKeyUsage = "middle", nil
	})
	middle := &testCA{cert, key}
	make := func(uri string, chain ...*x509.Certificate) *Certificate {
		key, leaf := middle.leaf(t, []string{uri})
		c, err := New(ID{}, key, append([]*x509.Certificate{leaf}, chain...), []*x509.Certificate{root.cert})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	a, b, bad := make(uriA, cert), make(uriB, cert), make(uriB)
	for range 2 { // the second time from memory
		if o := shake(t, pipe, ServerTLS(b, Params{}), ClientTLS(a, []ID{idB}, Params{})); o.client != nil ||
			o.server != nil {
			t.Fatal(o.client, o.server)
		}
	}
	if o := shake(t, pipe, ServerTLS(bad, Params{}), ClientTLS(a, []ID{idB}, Params{})); o.client == nil {
		t.Fatal("a chain without its intermediate was accepted")
	}
}

// TestClientHello: samples/connect-request.txt, checklist 58.
func TestClientHello(t *testing.T) {
	ca := newTestCA(t, "root")
	a, b := ca.issue(t, []string{uriA}, nil), ca.issue(t, []string{uriB}, nil)
	var hello *tls.ClientHelloInfo
	server := ServerTLS(b, Params{}).Clone()
	server.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) { hello = h; return nil, nil }
	client := ClientTLS(a, []ID{idB}, Params{})
	for range 2 { // no resumption the second time either
		if o := shake(t, pipe, server, client); o.client != nil || o.clientState.CurveID != tls.X25519MLKEM768 ||
			o.clientState.DidResume {
			t.Fatal(o.client, o.clientState.CurveID, o.clientState.DidResume)
		}
		if hello.ServerName != "" || !slices.Equal(hello.SupportedProtos, []string{"h2"}) ||
			!slices.Equal(hello.SupportedVersions, []uint16{tls.VersionTLS13}) {
			t.Errorf("%+v", hello)
		}
		groups := slices.Sorted(slices.Values(hello.SupportedCurves))
		if want := []tls.CurveID{tls.CurveP256, tls.CurveP384, tls.X25519, tls.X25519MLKEM768}; !slices.Equal(groups, want) {
			t.Errorf("groups %v", groups)
		}
		const serverName, sessionTicket, preSharedKey = 0, 35, 41
		for _, ext := range []uint16{serverName, sessionTicket, preSharedKey} {
			if slices.Contains(hello.Extensions, ext) {
				t.Errorf("extension %d offered", ext)
			}
		}
	}
}

func TestServerTLSIsShared(t *testing.T) {
	c := newTestCA(t, "root").issue(t, []string{uriA}, nil)
	first, again := ServerTLS(c, Params{}), ServerTLS(c, Params{})
	if first != again || ServerTLS(c, Params{}) == ServerTLS(c, Params{TLS12: true}) {
		t.Fatal("made anew, or mixed up")
	}
	if n := testing.AllocsPerRun(100, func() { ServerTLS(c, Params{}) }); n != 0 {
		t.Fatalf("%v allocations", n)
	}
}

// TestRememberedChain: what was verified once is not verified again, but not beyond its validity, and not without
// bound.
func TestRememberedChain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newTestCA(t, "root")
		a, b := ca.issue(t, []string{uriA}, nil, valid(0, 100*time.Hour)), ca.issue(t, []string{uriB}, nil)
		try := func(server *Certificate) error {
			return shake(t, pipe, ServerTLS(server, Params{}), ClientTLS(a, []ID{idB}, Params{})).client
		}
		for range 3 {
			if err := try(b); err != nil {
				t.Fatal(err)
			}
			if len(a.peers.seen) != 1 {
				t.Fatalf("%d chains remembered", len(a.peers.seen))
			}
		}
		// The SAN is compared although the chain is known.
		if o := shake(t, pipe, ServerTLS(b, Params{}), ClientTLS(a, []ID{idA}, Params{})); o.client == nil {
			t.Fatal("another SAN was accepted")
		}
		time.Sleep(time.Hour + time.Second)
		var invalid x509.CertificateInvalidError
		if err := try(b); !errors.As(err, &invalid) || invalid.Reason != x509.Expired {
			t.Fatalf("after its end: %v", err)
		}
		if err := try(ca.issue(t, []string{uriB}, nil)); err != nil {
			t.Fatal(err)
		}
	})
}

func TestRememberedChainsAreBounded(t *testing.T) {
	ca := newTestCA(t, "root")
	a := ca.issue(t, []string{uriA}, nil)
	for range maxVerified {
		var key [32]byte
		key[0], key[1] = byte(len(a.peers.seen)), byte(len(a.peers.seen)>>8)
		if a.peers.seen == nil {
			a.peers.seen = map[[32]byte]window{}
		}
		a.peers.seen[key] = window{}
	}
	for range 3 {
		_, leaf := ca.leaf(t, []string{uriB})
		if err := a.peers.verify([]*x509.Certificate{leaf}, x509.ExtKeyUsageServerAuth, time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	if len(a.peers.seen) != maxVerified {
		t.Fatalf("%d", len(a.peers.seen))
	}
}
