package hbone

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"math/big"
	"net"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"
)

// testTLS is a pair of configurations that trust each other.
func testTLS(t testing.TB) (client, server *tls.Config) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, DNSNames: []string{"test"},
		NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: time.Now().Add(1000 * time.Hour), IsCA: true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, _ := x509.ParseCertificate(der)
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	cert := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
	client = &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: pool, ServerName: "test",
		NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13}
	server = &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: pool,
		ClientAuth: tls.RequireAndVerifyClientCert, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13}
	return client, server
}

// tlsPair does the handshake with our helpers, or with crypto/tls alone.
func tlsPair(t testing.TB, bare bool) (client, server net.Conn) {
	t.Helper()
	a, b := tcpPair(t)
	if bare {
		ccfg, scfg := testTLS(t)
		client, server = tls.Client(a, ccfg), tls.Server(b, scfg)
		done := make(chan error, 1)
		go func() { done <- server.(*tls.Conn).Handshake() }()
		if err := client.(*tls.Conn).Handshake(); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		return client, server
	}
	return tlsOver(t, a, b)
}

// tlsOver does the handshake with our helpers on a connection that there is.
func tlsOver(t testing.TB, a, b net.Conn) (client, server net.Conn) {
	t.Helper()
	ccfg, scfg := testTLS(t)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		var err error
		server, _, err = Server(ctx, b, scfg, nil)
		done <- err
	}()
	client, _, err := Client(ctx, a, ccfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	return client, server
}

// source yields n bytes at no cost; sink counts.
type source struct{ left int64 }

func (s *source) Read(p []byte) (int, error) {
	if s.left <= 0 {
		return 0, io.EOF
	}
	n := min(int64(len(p)), s.left)
	s.left -= n
	return int(n), nil
}

type sink struct{ n atomic.Int64 }

func (s *sink) Write(p []byte) (int, error) { s.n.Add(int64(len(p))); return len(p), nil }

// cpu is the processor time that this process has used.
func cpu() time.Duration {
	var ru syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &ru)
	return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
}

func report(b *testing.B, bytes int64, start time.Time, used time.Duration) {
	gb := float64(bytes) / 1e9
	b.ReportMetric(gb*1000/time.Since(start).Seconds(), "MB/s")
	b.ReportMetric((cpu()-used).Seconds()/gb, "CPUs/GB")
	b.ReportMetric(0, "ns/op")
}

const benchBytes = 64 << 20 // per iteration

func BenchmarkMuxBare(b *testing.B) {
	client, server := tlsPair(b, true)
	defer client.Close()
	defer server.Close()
	total := int64(b.N) * benchBytes
	start, used := time.Now(), cpu()
	go func() {
		buf := make([]byte, 64<<10)
		for left := total; left > 0; left -= int64(len(buf)) {
			if _, err := client.Write(buf); err != nil {
				b.Error(err)
				return
			}
		}
	}()
	buf := make([]byte, 64<<10)
	for left := total; left > 0; {
		n, err := server.Read(buf)
		if err != nil {
			b.Fatal(err)
		}
		left -= int64(n)
	}
	report(b, total, start, used)
}

func BenchmarkMux(b *testing.B) {
	for _, bare := range []bool{true, false} {
		for _, dir := range []string{"up", "down"} {
			for _, n := range []int{1, 64} {
				name := fmt.Sprintf("tls=%v/%s/%d", map[bool]string{true: "crypto", false: "own"}[bare], dir, n)
				b.Run(name, func(b *testing.B) { benchMux(b, bare, dir == "down", n) })
			}
		}
	}
}

func benchMux(b *testing.B, bare, down bool, streams int) {
	x, y := tlsPair(b, bare)
	cc, _, reqs, stop := link(b, x, y, Config{})
	defer stop()
	var from, to []*Stream
	for range streams {
		f, t := pair(b, cc, reqs)
		if down {
			f, t = t, f
		}
		from, to = append(from, f), append(to, t)
	}
	total := int64(b.N) * benchBytes / int64(streams)
	b.ResetTimer()
	start, used := time.Now(), cpu()
	var wg sync.WaitGroup
	for i := range streams {
		wg.Go(func() {
			if _, err := from[i].ReadFrom(&source{total}); err != nil {
				b.Error(err)
			}
			from[i].CloseWrite()
		})
		wg.Go(func() {
			if n, err := to[i].WriteTo(&sink{}); err != nil || n != total {
				b.Error(n, err)
			}
			to[i].CloseWrite()
		})
	}
	wg.Wait()
	report(b, total*int64(streams), start, used)
}

// BenchmarkMuxLatency echoes 1 KiB at 500/s beside bulk streams on the same tunnel.
func BenchmarkMuxLatency(b *testing.B) {
	for _, bulk := range []int{0, 8} {
		b.Run(fmt.Sprintf("bulk=%d", bulk), func(b *testing.B) { benchLatency(b, bulk) })
	}
}

func benchLatency(b *testing.B, bulk int) {
	x, y := tlsPair(b, false)
	cc, _, reqs, stop := link(b, x, y, Config{})
	var wg sync.WaitGroup
	var moved sink
	start := time.Now()
	for range bulk {
		f, t := pair(b, cc, reqs)
		wg.Go(func() { f.ReadFrom(&source{1 << 60}) })
		wg.Go(func() { t.WriteTo(&moved) })
	}
	f, t := pair(b, cc, reqs)
	wg.Go(func() { t.WriteTo(t); t.CloseWrite() })
	buf := make([]byte, 1024)
	var times []time.Duration
	for i := 0; i < max(b.N, 500) && i < 2000; i++ {
		time.Sleep(2 * time.Millisecond)
		at := time.Now()
		if _, err := f.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(f, buf); err != nil {
			b.Fatal(err)
		}
		times = append(times, time.Since(at))
	}
	took := time.Since(start)
	stop()
	wg.Wait()
	slices.Sort(times)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(times[len(times)/2].Microseconds()), "p50-us")
	b.ReportMetric(float64(times[len(times)*99/100].Microseconds()), "p99-us")
	b.ReportMetric(float64(moved.n.Load())/1e6/took.Seconds(), "bulk-MB/s")
}

// BenchmarkMuxIdle is what an idle tunnel with one stream holds on the heap, both ends together, peers' certificates
// included; and the size of one end of a stream.
func BenchmarkMuxIdle(b *testing.B) {
	shared := new(Buffers)
	heap := func() float64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&m)
		return float64(m.HeapAlloc)
	}
	const n = 50
	var stops []func()
	open := func() {
		x, y := tlsPair(b, false)
		cc, _, reqs, stop := link(b, x, y, Config{Buffers: shared})
		stops = append(stops, stop)
		f, t := pair(b, cc, reqs)
		f.Write([]byte("x"))
		io.ReadFull(t, make([]byte, 1))
	}
	open() // what all share
	h0 := heap()
	for range n {
		open()
	}
	h1 := heap()
	b.ReportMetric(0, "ns/op")
	b.ReportMetric((h1-h0)/n, "B/conn")
	b.ReportMetric(float64(unsafe.Sizeof(Stream{})), "B/stream-end")
	for _, stop := range stops {
		stop()
	}
}
