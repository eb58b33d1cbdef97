// Command ztrelay is the shortest way through ztun's lower half: a TUN in a pod's namespace, one netstack stack on
// it, and for each of the pod's connections a kernel socket in the namespace where ztrelay itself runs.
//
//	ztrelay -netns /var/run/netns/pod -name ztun0 -mtu 1500 -addr 10.92.1.2,fd92:1::2 [-http 127.0.0.1:15000]
//
// It prints {"ready":true} when the device exists and ends with SIGTERM or SIGINT. Addresses and routes are the
// caller's business. It is started by test/bench, whose relay suite shows with it what tun and netstack cost without
// policy, HTTP/2 and TLS; it is no part of the product and never will be.
//
// Decisions (2026-11-23): the copy loops are the plain ones that the two ends offer (Conn.WriteTo up, one buffer of a
// super-packet down), so that the figure stays that of tun and netstack.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"ztun/netstack"
	"ztun/proxy/refusal"
	"ztun/tun"
	"ztun/tun/netns"
)

func main() {
	// As the daemon does while the machine has no processor to spare (cmd/ztun/procs.go).
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "ztrelay:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) (err error) {
	fs := flag.NewFlagSet("ztrelay", flag.ContinueOnError)
	ref := fs.String("netns", "", "namespace of the pod: path, name or pid")
	name := fs.String("name", "ztun0", "name of the device")
	mtu := fs.Int("mtu", 1500, "of the device")
	addrs := fs.String("addr", "", "addresses of the pod, separated by commas")
	addr := fs.String("http", "", "serve /debug/pprof/profile and /metrics on this address")
	if err := fs.Parse(args); err != nil {
		return err
	}
	var ips []netip.Addr
	for s := range strings.SplitSeq(*addrs, ",") {
		ip, err := netip.ParseAddr(s)
		if err != nil {
			return err
		}
		ips = append(ips, ip)
	}
	ns, err := netns.Open(*ref)
	if err != nil {
		return err
	}
	defer ns.Close()
	dev, err := tun.Open(tun.Options{Name: *name, NetNS: ns, MTU: *mtu})
	if err != nil {
		return err
	}
	s, err := netstack.New(netstack.Config{Addrs: ips, MTU: *mtu, App: dev, OnFlow: func(f *netstack.Flow) {
		relay(ctx, f)
	}})
	if err != nil {
		return errors.Join(err, dev.Close())
	}
	if *addr != "" {
		l, err := net.Listen("tcp", *addr)
		if err != nil {
			return errors.Join(err, s.Close(), dev.Close())
		}
		defer l.Close() // ends Serve
		mux := http.NewServeMux()
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/metrics", func(w http.ResponseWriter, _ *http.Request) { metrics(w, s.Stats()) })
		go func() { _ = http.Serve(l, mux) }()
	}
	fmt.Println(`{"ready":true}`)
	err = s.Run(ctx)
	return errors.Join(err, s.Close())
}

// metrics writes the counters that tell why a figure is bad, under the daemon's names.
func metrics(w io.Writer, st netstack.Stats) {
	for _, m := range []struct {
		name string
		v    uint64
	}{
		{"ztun_stack_retransmits_total", st.Retransmits}, {"ztun_stack_timeouts_total", st.Timeouts},
		{"ztun_stack_segment_queue_dropped_total", st.SegmentQueueDropped},
		{"ztun_device_tx_dropped_total", st.App.TxDropped}, {"ztun_device_tx_errors_total", st.App.TxErrors},
		{"ztun_device_rx_malformed_total", st.App.RxMalformed}, {"ztun_device_rx_bad_checksum_total", st.App.RxBadChecksum},
	} {
		fmt.Fprintf(w, "%s %d\n", m.name, m.v)
	}
}

// relay answers the pod's SYN once the kernel's connection stands, then copies both ways.
func relay(ctx context.Context, f *netstack.Flow) {
	var d net.Dialer
	k, err := d.DialContext(ctx, "tcp", f.Dst().String())
	if err != nil {
		f.Refuse(refusal.Reset)
		return
	}
	kernel := k.(*net.TCPConn)
	defer kernel.Close()
	app, err := f.Accept()
	if err != nil {
		return
	}
	defer app.Close()
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := app.WriteTo(kernel); err != nil {
			app.Reset()
		}
		kernel.CloseWrite()
	})
	// One super-packet at a time; onlyWriter hides nothing but says that there is no better way in.
	if _, err := io.CopyBuffer(onlyWriter{app}, onlyReader{kernel}, make([]byte, netstack.MaxWrite)); err != nil {
		app.Reset()
	}
	app.CloseWrite()
	wg.Wait()
}

// onlyReader and onlyWriter keep io.CopyBuffer from looking for a shortcut (the kernel socket's WriteTo would take a
// 32 KiB buffer of its own).
type onlyReader struct{ io.Reader }

type onlyWriter struct{ io.Writer }
