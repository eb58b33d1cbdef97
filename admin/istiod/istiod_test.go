package istiod

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"ztun/test/pki"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// port swaps the host of a server's address.
func port(addr, host string) string {
	_, p, _ := net.SplitHostPort(addr)
	return net.JoinHostPort(host, p)
}

// TestConnection: who is trusted under which name, and what an operator is told otherwise.
func TestConnection(t *testing.T) {
	ca, other := pki.New(t), pki.New(t)
	expired := &tls.Config{Certificates: []tls.Certificate{ca.Issue(t, -time.Minute, "127.0.0.1")}}
	local := &tls.Config{Certificates: []tls.Certificate{ca.Issue(t, time.Hour, "localhost", "istiod.istio-system.svc")}}
	ip := &tls.Config{Certificates: []tls.Certificate{ca.Issue(t, time.Hour, "127.0.0.1")}}
	roots := Roots{PEM: ca.PEM()}
	missing := filepath.Join(t.TempDir(), "none.pem")
	only12 := ip.Clone()
	only12.MaxVersion = tls.VersionTLS12
	noPQ := ip.Clone()
	noPQ.CurvePreferences = []tls.CurveID{tls.X25519, tls.CurveP256}
	asks := ip.Clone()
	asks.ClientAuth, asks.ClientCAs = tls.RequireAndVerifyClientCert, x509.NewCertPool()
	asks.ClientCAs.AddCert(ca.Cert)
	cert, key := files(t, ca.Issue(t, time.Hour, "client"))
	_, wrongKey := files(t, ca.Issue(t, time.Hour, "client"))

	const (
		shake   = `status: Unavailable, message: "connection error: desc = \"transport: authentication handshake failed: `
		unknown = shake + `tls: failed to verify certificate: x509: certificate signed by unknown authority`
	)
	for _, c := range []struct {
		name   string
		server *tls.Config
		host   string // "" = 127.0.0.1
		o      Options
		want   string // "" = the call works; otherwise how the error begins
	}{
		{"IP literal", ip, "", Options{Roots: roots}, ""},
		{"host name", local, "localhost", Options{Roots: roots}, ""},
		{"root file", ip, "", Options{Roots: Roots{File: file(t, "roots.pem", ca.PEM())}}, ""},
		{"two roots in the file, and what is none", ip, "",
			Options{Roots: Roots{File: file(t, "roots.pem", slices.Concat(other.PEM(),
				[]byte("-----BEGIN CERTIFICATE-----\nbm9uZQ==\n-----END CERTIFICATE-----\n-----BEGIN X-----\n-----END X-----\n"),
				ca.PEM()))}}, ""},
		{"alternate name", local, "", Options{Roots: roots, AltHostname: "istiod.istio-system.svc"}, ""},
		{"alternate IP", ip, "localhost", Options{Roots: roots, AltHostname: "127.0.0.1"}, ""},
		{"TLS 1.2 where it is allowed", only12, "", Options{Roots: roots, TLS12: true}, ""},
		{"post-quantum", ip, "", Options{Roots: roots, PQC: true}, ""},
		{"client certificate", asks, "", Options{Roots: roots, ClientCert: cert, ClientKey: key}, ""},

		{"wrong name", local, "", Options{Roots: roots},
			shake +
				`tls: failed to verify certificate: x509: cannot validate certificate for 127.0.0.1 because it doesn't contain any IP SANs\""`},
		{"wrong name and wrong alternate", ip, "localhost", Options{Roots: roots, AltHostname: "istiod.x"},
			shake +
				`tls: failed to verify certificate: x509: certificate is not valid for any names, but wanted to match localhost (nor is it for the alternate hostname istiod.x)\""`},
		{"chain before name", expired, "localhost", Options{Roots: roots, AltHostname: "127.0.0.1"},
			shake + `tls: failed to verify certificate: x509: certificate has expired or is not yet valid: `},
		{"wrong root", ip, "", Options{Roots: Roots{File: file(t, "roots.pem", other.PEM())}}, unknown},
		{"no root", ip, "", Options{}, unknown + ` (not trusted by any root certificate, for none is configured)\""`},
		{"a path taken for PEM", ip, "", Options{Roots: Roots{PEM: []byte(missing)}},
			unknown +
				` (not trusted by the text given for root certificates, for there is none in it: is it meant to be the path of a file that exists?)\""`},
		{"the system's roots", ip, "", Options{Roots: Roots{System: true}},
			unknown + ` (not trusted by the system's root certificates)\""`},
		{"no root file", ip, "", Options{Roots: Roots{File: missing}},
			"control plane 127.0.0.1:PORT: root certificates: open " + missing + ": no such file or directory"},
		{"empty root file", ip, "", Options{Roots: Roots{File: file(t, "r.pem", []byte("\n"))}},
			"control plane 127.0.0.1:PORT: root certificates "},
		{"TLS 1.2", only12, "", Options{Roots: roots}, shake + `remote error: tls: protocol version not supported\""`},
		{"TLS 1.2 and post-quantum", only12, "", Options{Roots: roots, TLS12: true, PQC: true},
			shake + `remote error: tls: protocol version not supported\""`},
		{"server without X25519MLKEM768", noPQ, "", Options{Roots: roots, PQC: true},
			shake + `remote error: tls: handshake failure\""`},
		{"client certificate wanted", asks, "", Options{Roots: roots}, `status: Unavailable, message: "`},
		{"client certificate of another key", asks, "", Options{Roots: roots, ClientCert: cert, ClientKey: wrongKey},
			"control plane 127.0.0.1:PORT: client certificate " + cert + " with key " + wrongKey +
				": tls: private key does not match public key"},
		{"no client key file", asks, "", Options{Roots: roots, ClientCert: cert, ClientKey: missing},
			"control plane 127.0.0.1:PORT: client key: open " + missing + ": no such file or directory"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := serve(t, c.server)
			if c.host == "" {
				c.host = "127.0.0.1"
			}
			c.o.Address = port(s.addr, c.host)
			got, err := call(t, c.o)
			_, p, _ := net.SplitHostPort(s.addr)
			if want := strings.ReplaceAll(c.want, "PORT", p); want != "" {
				if err == nil || !strings.HasPrefix(err.Error(), want) {
					t.Fatalf("got  %v\nwant %s", err, want)
				}
				return
			}
			if err != nil || got != "fine" {
				t.Fatalf("%q, %v", got, err)
			}
			sni := c.host
			if net.ParseIP(sni) != nil {
				sni = ""
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			if !slices.Equal(s.sni, []string{sni}) {
				t.Errorf("SNI %q, want %q", s.sni, sni)
			}
			if c.o.PQC && s.state.CurveID != tls.X25519MLKEM768 {
				t.Errorf("group %v", s.state.CurveID)
			}
			if v := s.state.Version; v != tls.VersionTLS13 && !c.o.TLS12 {
				t.Errorf("version %#x", v)
			}
			if a := s.md.Get(":authority"); !slices.Equal(a, []string{c.o.Address}) {
				t.Errorf("authority %q", a)
			}
		})
	}
}

// TestRootsAreReread: each Dial trusts what the file says then; New warns of what is wrong, and waits.
func TestRootsAreReread(t *testing.T) {
	ca, other := pki.New(t), pki.New(t)
	s := serve(t, &tls.Config{Certificates: []tls.Certificate{ca.Issue(t, time.Hour, "127.0.0.1")}})
	path := filepath.Join(t.TempDir(), "root-cert.pem")
	var log bytes.Buffer
	c, err := New(Options{Address: s.addr, Roots: Roots{File: path}, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(log.String(), "control plane cannot be trusted yet") || !strings.Contains(log.String(), path) {
		t.Errorf("log: %s", log.String())
	}
	for _, step := range []struct {
		roots []byte
		want  string
	}{
		{ca.PEM(), ""},
		{other.PEM(), `(not trusted by ` + path + `)\""`},
		{[]byte("garbage"), "root certificates " + path + ": there is no certificate in PEM form in it"},
		{[]byte(" \n"), "root certificates " + path + ": the file is empty"},
		{[]byte("-----BEGIN CERTIFICATE-----\nbm9uZQ==\n-----END CERTIFICATE-----\n"), "root certificates " + path +
			": x509: malformed certificate"},
		{bytes.Repeat([]byte("#"), maxRoots+1), "root certificates " + path +
			": larger than 4194304 bytes: is this the right file?"},
		{ca.PEM(), ""},
	} {
		write(t, path, step.roots)
		if _, err := callOn(t, c); step.want == "" && err != nil || step.want != "" &&
			(err == nil || !strings.Contains(err.Error(), step.want)) {
			t.Errorf("got %v, want %q", err, step.want)
		}
	}
	if f := c.Files(); !slices.Equal(f, []string{path}) {
		t.Errorf("files %q", f)
	}
}

// TestUnreachable: what a call says when there is nobody; the end of a call's own time is its own error.
func TestUnreachable(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	_, err = call(t, Options{Address: addr})
	want := `status: Unavailable, message: "connection error: desc = \"transport: Error while dialing: dial tcp ` + addr +
		`: connect: connection refused\""`
	if err == nil || err.Error() != want || status.Code(err) != codes.Unavailable {
		t.Errorf("got  %v\nwant %s", err, want)
	}
	_, err = call(t, Options{Address: "no-such-host.invalid:15012"})
	if err == nil || !strings.Contains(err.Error(), "lookup no-such-host.invalid") ||
		strings.Count(err.Error(), "(hint: ") != 1 {
		t.Errorf("got %v", err)
	}
}

// TestSilentServer: one that accepts and says nothing does not hold a caller for ever.
func TestSilentServer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := New(Options{Address: l.Addr().String()})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := c.Dial()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	err = conn.Invoke(ctx, "/a/b", nil, nil)
	if status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("got %v", err)
	}
}

// TestKeepalive: the socket beneath a channel asks after the peer as ztunnel's does (spec/controlplane.md 2.1).
func TestKeepalive(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := dial(t.Context(), l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range []struct{ level, name, want int }{
		{syscall.SOL_SOCKET, syscall.SO_KEEPALIVE, 1},
		{syscall.IPPROTO_TCP, syscall.TCP_KEEPIDLE, 300},
		{syscall.IPPROTO_TCP, syscall.TCP_KEEPINTVL, 75},
		{syscall.IPPROTO_TCP, syscall.TCP_KEEPCNT, 9},
	} {
		var got int
		var gerr error
		if err := raw.Control(func(fd uintptr) {
			got, gerr = syscall.GetsockoptInt(int(fd), o.level, o.name)
		}); err != nil || gerr != nil || got != o.want {
			t.Errorf("option %d: %d, want %d (%v, %v)", o.name, got, o.want, err, gerr)
		}
	}
}

// TestLargestMessage: checklist 33's bound, at another size.
func TestLargestMessage(t *testing.T) {
	ca := pki.New(t)
	s := serve(t, &tls.Config{Certificates: []tls.Certificate{ca.Issue(t, time.Hour, "127.0.0.1")}})
	s.answer = []string{strings.Repeat("x", 5<<20)}
	for limit, want := range map[int]codes.Code{0: codes.ResourceExhausted, 5 << 20: codes.ResourceExhausted,
		6 << 20: codes.OK} {
		if _, err := call(t, Options{Address: s.addr, Roots: Roots{PEM: ca.PEM()}, MaxRecv: limit}); status.Code(
			err) != want {
			t.Errorf("limit %d: %v", limit, err)
		}
	}
}

// TestMetadata: checklist 14 and 34.
func TestMetadata(t *testing.T) {
	ca := pki.New(t)
	s := serve(t, &tls.Config{Certificates: []tls.Certificate{ca.Issue(t, time.Hour, "127.0.0.1")}})
	path := file(t, "istio-token", []byte("first\n"))
	o := Options{Address: s.addr, Roots: Roots{PEM: ca.PEM()}, ClusterID: "c1",
		Headers: [][2]string{{"FOO_BAR", "v"}, {"authorization", "mine"}, {"x", "1"}, {"X", "2"}}}
	see := func(o Options, auth, cluster string) {
		t.Helper()
		if _, err := call(t, o); err != nil {
			t.Fatal(err)
		}
		if s.saw("authorization") != auth || s.saw("clusterid") != cluster || s.saw("foo_bar") != "v" || s.saw("x") != "2" {
			t.Errorf("%v", s.md)
		}
	}
	see(o, "mine", "")
	o.Token.File = path
	see(o, "Bearer first", "c1")
	write(t, path, []byte("second \r\n\n"))
	see(o, "Bearer second", "c1")
	o.Token = Token{Literal: "third\n"}
	see(o, "Bearer third", "c1")

	// What the caller put there stays, once per call.
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	ctx := metadata.AppendToOutgoingContext(t.Context(), "mine", "kept")
	for range 2 {
		made, err := c.Context(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if md, _ := metadata.FromOutgoingContext(made); len(md.Get("authorization")) != 1 || len(md.Get("mine")) != 1 {
			t.Errorf("%v", md)
		}
	}
}

// TestTokenFile: what is wrong with a token is said when it is needed, without quoting it.
func TestTokenFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "istio-token")
	c, err := New(Options{Address: "localhost:1", Token: Token{File: path}})
	if err != nil {
		t.Fatal(err)
	}
	check := func(want string) {
		t.Helper()
		if _, err := c.Context(t.Context()); err == nil || err.Error() != want {
			t.Errorf("got  %v\nwant %s", err, want)
		}
	}
	check("token: open " + path + ": no such file or directory")
	for text, want := range map[string]string{
		"":    " is empty",
		" \n": " is empty",
		"secret\nsecret": ": byte 0x0a at position 6 cannot be in a header: it must be one line of " +
			"printable ASCII",
		"\xef\xbb\xbfsecret": ": byte 0xef at position 0 cannot be in a header: it must be one line of " +
			"printable ASCII",
		strings.Repeat("s", maxToken+1): ": larger than 65536 bytes: is this the right file?",
	} {
		write(t, path, []byte(text))
		check("token file " + path + want)
	}
}

// TestPipes: a file that is a pipe is an error and not a wait for its other end, which no shutdown would end.
func TestPipes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		o    Options
		want string
	}{
		{Options{Token: Token{File: path}}, "token " + path + ": not a regular file"},
		{Options{Roots: Roots{File: path}}, "control plane localhost:1: root certificates " + path + ": not a regular file"},
		{Options{ClientCert: path, ClientKey: path}, "control plane localhost:1: client certificate " + path +
			": not a regular file"},
	} {
		c.o.Address = "localhost:1"
		con, err := New(c.o)
		if err != nil {
			t.Fatal(err)
		}
		_, err = con.Context(t.Context())
		if err == nil {
			_, err = con.Dial()
		}
		if err == nil || err.Error() != c.want {
			t.Errorf("got  %v\nwant %s", err, c.want)
		}
	}
}

// TestRefusedOptions: every mistake is named at the start.
func TestRefusedOptions(t *testing.T) {
	for _, c := range []struct {
		o    Options
		want string
	}{
		{Options{}, "control plane address is empty"},
		{Options{Address: "http://istiod:15012"},
			`control plane address "http://istiod:15012": tokens and keys' certificates go over TLS only: use https://, or leave the scheme out`},
		{Options{Address: "tcp://istiod:15012"},
			`control plane address "tcp://istiod:15012": unknown scheme tcp: use https://, or leave the scheme out`},
		{Options{Address: "https://:15012"}, `control plane address "https://:15012": there is no host in it`},
		{Options{Address: "istiod:15012/v3"},
			`control plane address "istiod:15012/v3": it must be host and port alone, such as istiod.istio-system.svc:15012`},
		{Options{Address: "user@istiod:15012"},
			`control plane address "user@istiod:15012": it must be host and port alone, such as istiod.istio-system.svc:15012`},
		{Options{Address: "istiod:0"}, `control plane address "istiod:0": port 0 is not one of 1 to 65535`},
		{Options{Address: "istiod:65536"}, `control plane address "istiod:65536": port 65536 is not one of 1 to 65535`},
		{Options{Address: "istiod:grpc"}, `control plane address "istiod:grpc": invalid port ":grpc" after host`},
		{Options{Address: "a b"}, `control plane address "a b": invalid character " " in host name`},
		{Options{Address: "i", Roots: Roots{File: "x", System: true}},
			"root certificates: more than one of file, text and system are given"},
		{Options{Address: "i", Token: Token{File: "x", Literal: "y"}}, "token: both a file and a literal are given"},
		{Options{Address: "i", Token: Token{Literal: " "}}, "token is empty"},
		{Options{Address: "i", Token: Token{Literal: "t\x00n"}},
			"token: byte 0x00 at position 1 cannot be in a header: it must be one line of printable ASCII"},
		{Options{Address: "i", ClusterID: "c\n"}, `cluster id "c\n": byte 0x0a cannot be in a header`},
		{Options{Address: "i", ClientKey: "x"}, "client certificate and client key: one is given without the other"},
		{Options{Address: "i", MaxRecv: -1}, "largest message -1 bytes: cannot be negative"},
		{Options{Address: "i", Headers: [][2]string{{"", "v"}}}, "header: its name is empty"},
		{Options{Address: "i", Headers: [][2]string{{"A B", "v"}}},
			`header "A B": a name consists of letters, digits, -, _ and .`},
		{Options{Address: "i", Headers: [][2]string{{":path", "v"}}},
			`header ":path": a name consists of letters, digits, -, _ and .`},
		{Options{Address: "i", Headers: [][2]string{{"TE", "v"}}}, `header "TE": the name is HTTP's or gRPC's own`},
		{Options{Address: "i", Headers: [][2]string{{"grpc-timeout", "v"}}},
			`header "grpc-timeout": the name is HTTP's or gRPC's own`},
		{Options{Address: "i", Headers: [][2]string{{"x-bin", "v"}}},
			`header "x-bin": names that end in -bin are for binary values`},
		{Options{Address: "i", Headers: [][2]string{{"x", "é"}}}, `header "x": byte 0xc3 of its value cannot be in a header`},
	} {
		if _, err := New(c.o); err == nil || err.Error() != c.want {
			t.Errorf("%+v:\ngot  %v\nwant %s", c.o, err, c.want)
		}
	}
}

// TestAddress: checklist 4's form and others.
func TestAddress(t *testing.T) {
	for in, want := range map[string]string{
		"istiod.x.svc:15012":          "istiod.x.svc:15012",
		"https://istiod.x.svc:15012/": "istiod.x.svc:15012",
		"istiod.x.svc":                "istiod.x.svc:443",
		"127.0.0.1:1":                 "127.0.0.1:1",
		"[::1]:15012":                 "[::1]:15012",
		"HTTPS://[fd00::1]":           "[fd00::1]:443",
	} {
		if c, err := New(Options{Address: in}); err != nil || c.Address() != want {
			t.Errorf("%s: %v, %v", in, c, err)
		}
	}
}

// TestHint: the last line of spec/controlplane.md 2.5.
func TestHint(t *testing.T) {
	for message, want := range map[string]string{
		"authentication failure":                     " (hint: check the control plane logs for more information)",
		"dial: Temporary failure in name resolution": " (hint: is the DNS server reachable?)",
		"authentication failure (hint: a)":           "",
		"x":                                          "",
	} {
		if got := Hint(message); got != want {
			t.Errorf("%s: %q, want %q", message, got, want)
		}
	}
}
