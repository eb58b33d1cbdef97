package interop

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"ztun/test/interop/rig"
)

// outcome is one run of curl.
type outcome struct {
	exit    int
	length  int64
	hash    string // of standard output
	stdout  []byte // its first 64 KiB
	verbose string
}

// head keeps the first bytes of what is written.
type head struct {
	hash  io.Writer
	n     int64
	first []byte
}

func (h *head) Write(p []byte) (int, error) {
	h.n += int64(len(p))
	if room := 64<<10 - len(h.first); room > 0 {
		h.first = append(h.first, p[:min(room, len(p))]...)
	}
	return h.hash.Write(p)
}

// proxyArgs is how curl is told to send CONNECT over HTTP/2 with a client certificate. curl can check a server only
// against a host name, and the certificates of a mesh have none: --proxy-insecure.
func proxyArgs(mesh string, pem rig.PEM) []string {
	args := []string{"--silent", "--show-error", "--verbose", "--max-time", fmt.Sprint(int(limit.Seconds())),
		"--noproxy", "",
		"--proxytunnel", "--proxy-http2", "--proxy", "https://" + mesh, "--proxy-insecure"}
	if pem.Cert != "" {
		args = append(args, "--proxy-cert", pem.Cert, "--proxy-key", pem.Key)
	}
	return args
}

// run runs cmd, curl or what starts it, to its end.
func run(t testing.TB, cmd *exec.Cmd) outcome {
	t.Helper()
	sum := sha256.New()
	out := &head{hash: sum}
	var stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = out, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Errorf("curl: %v", err)
	}
	return outcome{cmd.ProcessState.ExitCode(), out.n, hex.EncodeToString(sum.Sum(nil)), out.first, stderr.String()}
}

// runCurl runs curl through the served pod.
func runCurl(t testing.TB, r *rig.Rig, pem rig.PEM, stdin io.Reader, args ...string) outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	cmd := command(ctx, append(append([]string{curl(t)}, proxyArgs(r.Mesh(), pem)...), args...)...)
	cmd.Stdin = stdin
	return run(t, cmd)
}

// succeeded checks that the request came through an HTTP/2 tunnel.
func (o outcome) succeeded(t testing.TB) {
	t.Helper()
	if o.exit != 0 {
		t.Fatalf("curl: exit code %d\n%s", o.exit, tail(o.verbose))
	}
	for _, want := range []string{"CONNECT tunnel: HTTP/2 negotiated", "CONNECT tunnel established, response 200",
		"TLSv1.3"} {
		if !strings.Contains(o.verbose, want) {
			t.Errorf("curl did not report %q:\n%s", want, tail(o.verbose))
		}
	}
}

func tail(s string) string { return s[max(0, len(s)-4000):] }

// web is an HTTP application: /bulk?n=N&seed=S sends, /sink answers with length and hash of what it gets, /echo sends
// it back.
func web(t testing.TB, ln net.Listener, cfg *tls.Config) netip.AddrPort {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("/bulk", func(w http.ResponseWriter, req *http.Request) {
		var n int64
		var seed uint64
		fmt.Sscan(req.FormValue("n"), &n)
		fmt.Sscan(req.FormValue("seed"), &seed)
		w.Header().Set("Content-Length", fmt.Sprint(n))
		io.Copy(w, rig.Bulk(n, seed))
	})
	mux.HandleFunc("/sink", func(w http.ResponseWriter, req *http.Request) {
		h := sha256.New()
		n, err := io.Copy(h, req.Body)
		fmt.Fprintf(w, "%d %x %v", n, h.Sum(nil), err)
	})
	mux.HandleFunc("/echo", func(w http.ResponseWriter, req *http.Request) {
		http.NewResponseController(w).EnableFullDuplex()
		io.Copy(w, req.Body)
	})
	srv := &http.Server{Handler: mux, TLSConfig: cfg}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if cfg != nil {
			srv.ServeTLS(ln, "", "")
		} else {
			srv.Serve(ln)
		}
	}()
	t.Cleanup(func() {
		srv.Close()
		<-done
	})
	a := ln.Addr().(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// webAt is web at an address of the rig.
func webAt(t testing.TB, ip netip.Addr, cfg *tls.Config) netip.AddrPort {
	t.Helper()
	ln, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: ip.AsSlice()})
	must(t, err)
	return web(t, ln, cfg)
}

func bulkURL(app netip.AddrPort, n int64, seed uint64) string {
	return fmt.Sprintf("http://%v/bulk?n=%d&seed=%d", app, n, seed)
}

func TestCurl(t *testing.T) {
	r := rig.New(t)
	pem := rig.WritePEM(t, r.Identity("client"))
	app := webAt(t, r.Served, nil)

	t.Run("download", func(t *testing.T) {
		o := runCurl(t, r, pem, nil, bulkURL(app, bulk, 1))
		o.succeeded(t)
		if o.length != bulk || o.hash != rig.BulkHash(bulk, 1) {
			t.Errorf("%d bytes arrived, SHA-256 %s", o.length, o.hash)
		}
	})
	t.Run("upload", func(t *testing.T) {
		o := runCurl(t, r, pem, rig.Bulk(bulk, 2), "--upload-file", "-", fmt.Sprintf("http://%v/sink", app))
		o.succeeded(t)
		if want := fmt.Sprintf("%d %s <nil>", bulk, rig.BulkHash(bulk, 2)); string(o.stdout) != want {
			t.Errorf("application got %q, want %q", o.stdout, want)
		}
	})
	t.Run("both ways", func(t *testing.T) {
		o := runCurl(t, r, pem, rig.Bulk(bulk, 3), "--upload-file", "-", fmt.Sprintf("http://%v/echo", app))
		o.succeeded(t)
		if o.length != bulk || o.hash != rig.BulkHash(bulk, 3) {
			t.Errorf("%d bytes arrived, SHA-256 %s", o.length, o.hash)
		}
	})
	t.Run("slow reader", func(t *testing.T) {
		o := runCurl(t, r, pem, nil, "--limit-rate", "8M", bulkURL(app, 12*rig.MiB, 4))
		o.succeeded(t)
		if o.hash != rig.BulkHash(12*rig.MiB, 4) {
			t.Errorf("%d bytes arrived, SHA-256 %s", o.length, o.hash)
		}
	})
	t.Run("tunnel is kept", func(t *testing.T) {
		before := r.Accepted()
		o := runCurl(t, r, pem, nil, bulkURL(app, 1000, 5), bulkURL(app, 1000, 6))
		o.succeeded(t)
		if n := r.Accepted() - before; n != 1 || o.length != 2000 {
			t.Errorf("%d bytes over %d tunnels, want 2000 over 1", o.length, n)
		}
	})
	t.Run("parallel", func(t *testing.T) {
		const n, size = 40, 256 << 10
		args := []string{"--parallel", "--parallel-immediate", "--parallel-max", fmt.Sprint(n)}
		for i := range n {
			args = append(args, bulkURL(app, size, uint64(i)))
		}
		o := runCurl(t, r, pem, nil, args...)
		o.succeeded(t)
		if o.length != n*size {
			t.Errorf("%d bytes arrived, want %d", o.length, n*size)
		}
	})
	t.Run("TLS and HTTP/2 inside", func(t *testing.T) {
		cfg := &tls.Config{Certificates: []tls.Certificate{r.Identity("web").TLS}}
		inner := webAt(t, r.Served, cfg)
		o := runCurl(t, r, pem, nil, "--insecure", "--http2", "--write-out", "%{stderr}version %{http_version}\n",
			fmt.Sprintf("https://%v/bulk?n=%d&seed=7", inner, large))
		o.succeeded(t)
		if o.hash != rig.BulkHash(large, 7) {
			t.Errorf("%d bytes arrived, SHA-256 %s", o.length, o.hash)
		}
		if !strings.Contains(o.verbose, "version 2\n") {
			t.Errorf("inner protocol is not HTTP/2:\n%s", tail(o.verbose))
		}
	})
}

func TestCurlIsRefused(t *testing.T) {
	r := rig.New(t)
	pem := rig.WritePEM(t, r.Identity("client"))
	ln, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: r.Served.AsSlice()})
	must(t, err)
	closed := ln.Addr().(*net.TCPAddr).AddrPort()
	ln.Close()
	for _, c := range []struct {
		name string
		dst  netip.AddrPort
		want int
	}{
		{"by policy", at(r.Served, rig.DeniedPort), 401},
		{"nothing listens", closed, 503},
		{"another pod's address", at(r.Client, 80), 400},
		{"ztun's own port", at(r.Served, rig.Port), 503},
	} {
		t.Run(c.name, func(t *testing.T) {
			// curl keeps the status of an HTTP/2 proxy's answer to itself: only its trace has it.
			o := runCurl(t, r, pem, nil, "--trace-config", "h2-proxy", fmt.Sprintf("http://%v/", c.dst))
			if want := fmt.Sprintf("got http status: %d\n", c.want); o.exit != 56 || !strings.Contains(o.verbose, want) {
				t.Errorf("exit code %d, want 56; trace lacks %q\n%s", o.exit, want, tail(o.verbose))
			}
		})
	}
}

func TestCurlCertificates(t *testing.T) {
	r := rig.New(t)
	app := webAt(t, r.Served, nil)
	good := rig.WritePEM(t, r.Identity("client"))
	stranger := rig.WritePEM(t, rig.Issue(t, rig.NewCA(t, "cluster.local"), rig.ID("client")))
	stranger.Roots = good.Roots
	for name, pem := range map[string]rig.PEM{"none": {Roots: good.Roots}, "of another CA": stranger} {
		t.Run(name, func(t *testing.T) {
			o := runCurl(t, r, pem, nil, bulkURL(app, 10, 1))
			if o.exit == 0 || o.length != 0 {
				t.Errorf("served: exit code %d, %d bytes", o.exit, o.length)
			}
		})
	}
	t.Run("HTTP/1.1 is not spoken", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		var args []string
		for _, a := range proxyArgs(r.Mesh(), good) {
			if a != "--proxy-http2" {
				args = append(args, a)
			}
		}
		o := run(t, command(ctx, append(append([]string{curl(t)}, args...), bulkURL(app, 10, 1))...))
		if o.exit == 0 || o.length != 0 {
			t.Errorf("served: exit code %d, %d bytes\n%s", o.exit, o.length, tail(o.verbose))
		}
	})
	if o := runCurl(t, r, good, nil, bulkURL(app, 10, 1)); o.length != 10 {
		t.Errorf("with a good certificate: exit code %d, %d bytes\n%s", o.exit, o.length, tail(o.verbose))
	}
}

func TestCurlIsKilled(t *testing.T) {
	r := rig.New(t)
	end := make(chan error, 1)
	app := r.App(r.Served, func(c *net.TCPConn) {
		_, err := io.Copy(c, rig.Bulk(1<<40, 1))
		end <- err
	})
	ctx, kill := context.WithCancel(t.Context())
	cmd := command(ctx, append(append([]string{curl(t)}, proxyArgs(r.Mesh(), rig.WritePEM(t, r.Identity("client")))...),
		"--http0.9", fmt.Sprintf("http://%v/", app))...)
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	_, err = io.CopyN(io.Discard, stdout, rig.MiB)
	must(t, err)
	kill()
	cmd.Wait()
	select {
	case err := <-end:
		if err == nil {
			t.Error("application finished what never ends")
		}
	case <-time.After(rig.Wait):
		t.Error("application was not told")
	}
}

func TestCurlLosesThePod(t *testing.T) {
	r := rig.New(t)
	started := make(chan struct{})
	app := r.App(r.Served, func(c *net.TCPConn) {
		// only an orderly end of the tunnel makes this complete
		io.WriteString(c, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
		io.Copy(c, rig.Bulk(rig.MiB, 1))
		close(started)
		io.Copy(io.Discard, c)
	})
	done := make(chan outcome, 1)
	go func() {
		done <- runCurl(t, r, rig.WritePEM(t, r.Identity("client")), nil, fmt.Sprintf("http://%v/", app))
	}()
	<-started
	r.Cut()
	if o := <-done; o.exit == 0 {
		t.Errorf("curl takes %d bytes of a lost tunnel for complete\n%s", o.length, tail(o.verbose))
	}
}
