package hbone

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// What guards the record layer: a foreign peer with the suite that crypto/tls does not choose, the changes of keys, the
// mode in which it must not be used, and how a refused handshake ends.

// TestKeysChange: the first key of every connection is short-lived, the others live as long as RFC 8446, 5.5, allows.
func TestKeysChange(t *testing.T) {
	if rekeyAfter > 1<<24 || firstRekey > 1000 {
		t.Error(rekeyAfter, firstRekey)
	}
	for suite, secret := range map[uint16]int{tls.TLS_AES_128_GCM_SHA256: 32, tls.TLS_AES_256_GCM_SHA384: 48} {
		seal, open := memoryRecords(t, suite, secret)
		buf := make([]byte, blockLarge)
		pass := func() {
			t.Helper()
			wire, err := seal.seal(nil, spare("x"))
			if err != nil {
				t.Fatal(err)
			}
			open.feed(wire)
			if n, err := open.fill(buf); err != nil || string(buf[:n]) != "x" || open.in.keys != seal.out.keys {
				t.Fatal(n, err, open.in.keys, seal.out.keys)
			}
		}
		for i := range firstRekey {
			if pass(); seal.out.keys != 0 {
				t.Fatal("new key after", i)
			}
		}
		if pass(); seal.out.keys != 1 {
			t.Fatal("no early change")
		}
		seal.out.seq, open.in.seq = rekeyAfter-1, rekeyAfter-1
		if pass(); seal.out.keys != 1 {
			t.Fatal("too early")
		}
		if pass(); seal.out.keys != 2 {
			t.Fatal("a key beyond its limit")
		}
	}
}

// TestKeyUpdateFlood: each KeyUpdate costs as much as ten records.
func TestKeyUpdateFlood(t *testing.T) {
	seal, open := memoryRecords(t, tls.TLS_AES_128_GCM_SHA256, 32)
	buf := make([]byte, blockLarge)
	for i := range 10 * keyUpdates {
		wire := seal.sealRecord(nil, spare("\x18\x00\x00\x01\x00"), typeHandshake)
		seal.out.update()
		open.feed(seal.sealRecord(wire, spare("x"), typeApplicationData))
		_, err := open.fill(buf)
		var alert tls.AlertError
		if errors.As(err, &alert) && uint8(alert) == alertUnexpectedMessage && i >= keyUpdates {
			return
		} else if err != nil {
			t.Fatal(i, err)
		}
	}
	t.Error("no end to it")
}

// TestTicketFromClient: only servers send tickets.
func TestTicketFromClient(t *testing.T) {
	seal, open := memoryRecords(t, tls.TLS_AES_128_GCM_SHA256, 32)
	open.client = false
	open.feed(seal.sealRecord(nil, spare("\x04\x00\x00\x01x"), typeHandshake))
	var alert tls.AlertError
	if _, err := open.fill(make([]byte, blockLarge)); !errors.As(err, &alert) || uint8(alert) != alertUnexpectedMessage {
		t.Error(err)
	}
}

// TestOpenSSL: both suites, in both roles, with changes of key by both sides. crypto/tls never chooses AES-256 with
// itself.
func TestOpenSSL(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Fatal("openssl (package openssl) is needed: ", err)
	}
	ccfg, scfg := testTLS(t)
	dir := t.TempDir()
	write := func(name string, blocks ...*pem.Block) string {
		var b bytes.Buffer
		for _, block := range blocks {
			pem.Encode(&b, block)
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	key, err := x509.MarshalPKCS8PrivateKey(ccfg.Certificates[0].PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	certFile := write("cert.pem", &pem.Block{Type: "CERTIFICATE", Bytes: ccfg.Certificates[0].Certificate[0]})
	keyFile := write("key.pem", &pem.Block{Type: "PRIVATE KEY", Bytes: key})
	for name, suite := range map[string]uint16{"TLS_AES_128_GCM_SHA256": tls.TLS_AES_128_GCM_SHA256,
		"TLS_AES_256_GCM_SHA384": tls.TLS_AES_256_GCM_SHA384} {
		ours := func(c net.Conn, state tls.ConnectionState, err error) *tlsConn {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
			if _, ok := c.(*tlsConn); !ok || state.CipherSuite != suite {
				t.Fatalf("%T %s", c, tls.CipherSuiteName(state.CipherSuite))
			}
			return c.(*tlsConn)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()

		t.Run(name+", we are the client", func(t *testing.T) {
			l := listen(t)
			port := l.Addr().(*net.TCPAddr).Port
			l.Close()
			cmd := exec.CommandContext(ctx, openssl, "s_server", "-accept", fmt.Sprint("127.0.0.1:", port), "-tls1_3",
				"-ciphersuites", name,
				"-cert", certFile, "-key", keyFile, "-rev", "-naccept", "1")
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() { cmd.Process.Kill(); cmd.Wait() }()
			var raw net.Conn
			eventually(t, func() bool {
				var err error
				raw, err = net.Dial("tcp", fmt.Sprint("127.0.0.1:", port))
				return err == nil
			})
			c := ours(Client(ctx, raw, ccfg, nil))
			defer c.Close()
			c.SetDeadline(time.Now().Add(patience))
			r := bufio.NewReader(c)
			for _, records := range []int{2 * firstRekey, 50} {
				want := ""
				for i := range records {
					piece := fmt.Sprintf("%d/abc;", i)
					io.WriteString(c, piece) // a record each, and all of them one line
					want += piece
				}
				io.WriteString(c, "\n")
				// It turns round what it has when it looks, a line or a part of one.
				got := ""
				for len(got) < len(want) {
					part, err := r.ReadString('\n')
					if err != nil {
						t.Fatalf("%q %v\n%s", got, err, out.String())
					}
					got = strings.TrimSuffix(part, "\n") + got
				}
				if got != string(reverse(want)) {
					t.Fatalf("%q, want %q reversed", got, want)
				}
				c.rec.rekeyAfter = 7 // the first time the key changed early, now it does often
			}
			if c.rec.out.keys < 3 {
				t.Error(c.rec.out.keys, "changes of our key")
			}
		})

		t.Run(name+", we are the server", func(t *testing.T) {
			l := listen(t)
			defer l.Close()
			cmd := exec.CommandContext(ctx, openssl, "s_client", "-connect", l.Addr().String(), "-tls1_3", "-ciphersuites", name,
				"-cert", certFile, "-key", keyFile)
			in, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			var out locked
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() { cmd.Process.Kill(); cmd.Wait() }()
			raw, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			c := ours(Server(ctx, raw, scfg, nil))
			defer c.Close()
			c.SetDeadline(time.Now().Add(patience))
			r := bufio.NewReader(c)
			talk := func(i int) {
				t.Helper()
				fmt.Fprintf(in, "line %d\n", i)
				if line, err := r.ReadString('\n'); err != nil || line != fmt.Sprintf("line %d\n", i) {
					t.Fatalf("%q %v\n%s", line, err, out.String())
				}
				for k := range 2 { // more records our way than theirs
					fmt.Fprintf(c, "answer %d.%d\n", i, k)
				}
				eventually(t, func() bool { return strings.Contains(out.String(), fmt.Sprintf("answer %d.1\n", i)) })
			}
			for i := range firstRekey {
				talk(i)
			}
			if c.rec.out.keys != 1 || c.rec.in.keys != 0 {
				t.Error(c.rec.out.keys, c.rec.in.keys)
			}
			for i, command := range []string{"K\n", "k\n", "K\n"} { // KeyUpdates of its own, of which K wants an answer
				io.WriteString(in, command)
				eventually(t, func() bool { return strings.Count(out.String(), "KEYUPDATE") == i+1 })
				talk(1000 + i)
			}
			if c.rec.in.keys != 3 || c.rec.out.keys != 3 {
				t.Error(c.rec.in.keys, "keys of theirs,", c.rec.out.keys, "of ours")
			}
		})
	}
}

// listen is a listener on loopback.
func listen(t testing.TB) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func reverse(s string) []byte {
	b := []byte(s)
	slices.Reverse(b)
	return b
}

// locked is a buffer for a command's output that is read while it grows.
type locked struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *locked) Write(p []byte) (int, error) { l.mu.Lock(); defer l.mu.Unlock(); return l.b.Write(p) }
func (l *locked) String() string              { l.mu.Lock(); defer l.mu.Unlock(); return l.b.String() }

// TestFIPS: in FIPS 140 mode the record layer stays crypto/tls's, which is the validated one. The mode is chosen at the
// start of a process, so this is another one.
func TestFIPS(t *testing.T) {
	if os.Getenv("ZTUN_TEST_FIPS_CHILD") != "" {
		a, b := tlsPair(t, false)
		for _, c := range []net.Conn{a, b} {
			if _, ok := c.(*tls.Conn); !ok {
				t.Errorf("%T", c)
			}
		}
		cc, _, reqs, stop := link(t, a, b, Config{})
		defer stop()
		c, s := pair(t, cc, reqs)
		want := payload(1 << 20)
		go func() { c.Write(want); c.CloseWrite() }()
		if got, err := io.ReadAll(s); err != nil || !bytes.Equal(got, want) {
			t.Error(len(got), err)
		}
		return
	}
	for mode, want := range map[string]string{"on": "PASS: TestFIPS", "off": "FAIL: TestFIPS"} { // off: it is ours
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestFIPS$", "-test.v", "-test.timeout=60s")
		cmd.Env = append(os.Environ(), "ZTUN_TEST_FIPS_CHILD=1", "GODEBUG=fips140="+mode)
		if out, _ := cmd.CombinedOutput(); !strings.Contains(string(out), want) {
			t.Errorf("fips140=%s: no %q in\n%s", mode, want, out)
		}
	}
}

// watched is a server's raw connection that writes down how it is ended.
type watched struct {
	net.Conn
	half func() error
	mu   sync.Mutex
	log  []string
	read int // bytes, after CloseWrite
}

func (w *watched) note(s string) { w.mu.Lock(); w.log = append(w.log, s); w.mu.Unlock() }

func (w *watched) CloseWrite() error { w.note("half"); return w.half() }
func (w *watched) Close() error      { w.note("close"); return w.Conn.Close() }
func (w *watched) SetReadDeadline(t time.Time) error {
	if time.Until(t) > 0 {
		w.note("deadline")
	}
	return w.Conn.SetReadDeadline(t)
}
func (w *watched) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	w.mu.Lock()
	defer w.mu.Unlock()
	if slices.Contains(w.log, "half") {
		w.read += n
		if err == io.EOF {
			w.log = append(w.log, "eof")
		}
	}
	return n, err
}

// TestRefusedHandshakeLingers: a client that sends on after its part of the handshake gets the alert all the same: our
// side ends first, what it sends is read (some of it, for some time), and then the socket is closed.
func TestRefusedHandshakeLingers(t *testing.T) {
	for name, client := range map[string]func(c *tls.Conn){
		"sends and ends": func(c *tls.Conn) {
			c.Write(make([]byte, 20000))
			c.NetConn().(*net.TCPConn).CloseWrite()
		},
		"says nothing": func(c *tls.Conn) {},
		"never stops": func(c *tls.Conn) {
			for {
				if _, err := c.Write(make([]byte, 8000)); err != nil {
					return
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := tcpPair(t)
			ccfg, scfg := testTLS(t)
			ccfg.Certificates = nil
			c := tls.Client(a, ccfg)
			defer c.Close()
			w := &watched{Conn: b, half: b.CloseWrite}
			refused := make(chan time.Duration, 1)
			go func() {
				if _, _, err := Server(context.Background(), w, scfg, nil); err == nil {
					t.Error("server took a client without certificate")
				}
				refused <- 0
			}()
			if err := c.Handshake(); err != nil {
				t.Fatal(err)
			}
			go client(c)
			select {
			case <-refused:
			case <-time.After(10 * time.Second):
				t.Fatal("it lingers on")
			}
			log := strings.Join(w.log, " ")
			i := strings.Index(log, "half deadline")
			if i < 0 || !strings.HasSuffix(log, "close") || strings.Contains(log[:i], "close") {
				t.Error(log)
			}
			switch name {
			case "sends and ends":
				if w.read < 20000 || !strings.Contains(log[i:], "eof close") {
					t.Error(w.read, log)
				}
			case "never stops":
				if w.read < 8000 || w.read > 64<<10 {
					t.Error(w.read, "bytes taken")
				}
			}
			if name != "never stops" {
				if _, err := c.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "certificate required") {
					t.Error(err)
				}
			}
		})
	}
}
