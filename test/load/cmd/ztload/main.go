// ztload makes traffic with ordinary sockets and prints what became of it as one JSON object.
//
//	ztload serve   -listen :9000 [-byte :9001]
//	ztload dial    -to 10.91.2.2:9000 [-timeout 30s]
//	ztload whoami  -to 10.91.2.2:9000
//	ztload xfer    -to 10.91.2.2:9000 -up 1073741824 -down 1073741824
//	ztload half    -to 10.91.2.2:9000 -n 1000 -size 65536
//	ztload random  -to 10.91.2.2:9000 -n 2000 -seed 1
//	ztload rate    -to 10.91.2.2:9001 -par 16 -t 5s
//	ztload echo    -to 10.91.2.2:9000 -conns 8 -rate 500 -size 1024 -t 5s
//	ztload bulk    -to 10.91.2.2:9000 -streams 8 -dir up -t 5s
//	ztload bystander -to 10.91.2.2:9000 -byte 10.91.2.2:9001 -rate 100 -size 1024 -t 5s
//	ztload idle    -to 10.91.2.2:9000 -n 5000      (prints {"open":n}, holds until its input ends)
//
// Exit code: 0 when all went well, 1 when the result says otherwise, 2 for a wrong command line.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"ztun/test/load"
)

func main() {
	if len(os.Args) < 2 {
		usage("a command is missing")
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	os.Exit(run(ctx, os.Args[1], os.Args[2:]))
}

func usage(why string) {
	fmt.Fprintln(os.Stderr, "ztload:", why,
		"(serve, dial, whoami, xfer, half, random, rate, echo, bulk, bystander, idle; -h shows the flags of each)")
	os.Exit(2)
}

// keepNiceness stands for none that was asked for.
const keepNiceness = 100

func run(ctx context.Context, verb string, args []string) int {
	fs := flag.NewFlagSet("ztload "+verb, flag.ExitOnError)
	var (
		to     = fs.String("to", "", "address and port to connect to")
		listen = fs.String("listen", ":9000", "serve: addresses of the many-purpose server, separated by commas")
		byteL  = fs.String("byte", "",
			"serve: addresses of the one-byte server, separated by commas; bystander: the one to connect to")
		verbose = fs.Bool("v", false, "serve: log failed connections to standard error")
		timeout = fs.Duration("timeout", 5*time.Minute, "end everything after this time")
		up      = fs.Int64("up", 1<<30, "xfer: bytes to send")
		down    = fs.Int64("down", 1<<30, "xfer: bytes to receive")
		seed    = fs.Int64("seed", 1, "xfer, random: seed of the payload and of the plans")
		n       = fs.Int("n", 1000, "half, random, idle: number of connections")
		par     = fs.Int("par", 1<<20, "half, rate: how many at once")
		size    = fs.Int64("size", 64<<10, "half: largest request; echo, bystander: request size")
		conns   = fs.Int("conns", 8, "echo: connections")
		rate    = fs.Float64("rate", 500, "echo: requests per second, all connections together; bystander: of each kind")
		streams = fs.Int("streams", 1, "bulk: streams")
		dir     = fs.String("dir", "up", "bulk: up, down or both")
		d       = fs.Duration("t", 5*time.Second, "rate, echo, bulk, bystander: how long")
		nice    = fs.Int("nice", keepNiceness, "bystander: niceness of the process, -20 to 19 (default: that of its starter)")
	)
	_ = fs.Parse(args) // ExitOnError
	if fs.NArg() > 0 {
		usage("unexpected argument " + fs.Arg(0))
	}
	if verb == "serve" {
		return serve(ctx, *listen, *byteL, *verbose)
	}
	if *to == "" {
		usage(verb + " needs -to")
	}
	ctx, cancel := context.WithTimeout(ctx, *timeout)
	defer cancel()
	if *nice != keepNiceness {
		if err := load.SetNiceness(*nice); err != nil {
			return show(map[string]string{"error": err.Error()}, false)
		}
	}
	t := load.Target{Addr: *to}
	switch verb {
	case "dial":
		r := load.DialOnce(ctx, t)
		return show(r, r.OK)
	case "whoami":
		r, err := load.WhoAmI(ctx, t)
		if err != nil {
			return show(map[string]string{"error": err.Error()}, false)
		}
		return show(r, true)
	case "xfer":
		r := load.Transfer(ctx, t, *up, *down, *seed)
		return show(r, r.OK)
	case "half":
		r := load.HalfClose(ctx, t, *n, *par, *size)
		return show(r, r.Failed == 0)
	case "random":
		r := load.Random(ctx, t, *n, *seed)
		return show(r, r.OK)
	case "rate":
		if *par > 4096 {
			*par = 16
		}
		r := load.ConnectRate(ctx, t, *par, *d)
		return show(r, r.Failed == 0 && r.OK > 0)
	case "echo":
		r := load.OpenLoop(ctx, t, *conns, *rate, int(*size), *d)
		return show(r, len(r.Errors) == 0 && r.Lost == 0)
	case "bulk":
		if *dir != "up" && *dir != "down" && *dir != "both" {
			usage("-dir is up, down or both")
		}
		r := load.Bulk(ctx, t, *streams, *dir, *d)
		return show(r, r.Failed == 0)
	case "bystander":
		if *byteL == "" {
			usage("bystander needs -byte")
		}
		r := load.Bystander(ctx, load.Target{Addr: *byteL}, t, *rate, int(*size), *d)
		return show(r, r.Failed == 0)
	case "idle":
		ic, err := load.Idle(ctx, t, *n)
		if err != nil {
			return show(map[string]any{"open": 0, "error": err.Error()}, false)
		}
		defer ic.Close()
		show(map[string]int{"open": ic.Len()}, true)
		done := make(chan struct{})
		go func() { _, _ = io.Copy(io.Discard, os.Stdin); close(done) }() // ends with the process at the latest
		select {
		case <-done:
		case <-ctx.Done():
		}
		if err := ic.Check(); err != nil {
			return show(map[string]any{"open": ic.Len(), "error": err.Error()}, false)
		}
		return show(map[string]any{"open": ic.Len(), "alive": true}, true)
	}
	usage("unknown command " + verb)
	return 2
}

func show(v any, ok bool) int {
	b, err := json.Marshal(v)
	if err != nil {
		fmt.Fprintln(os.Stderr, "ztload:", err)
		return 1
	}
	fmt.Println(string(b))
	if ok {
		return 0
	}
	return 1
}

func serve(ctx context.Context, listen, bytes string, verbose bool) int {
	s := &load.Server{}
	if verbose {
		s.Log = func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }
	}
	var wg sync.WaitGroup
	code := 0
	var mu sync.Mutex
	start := func(addrs string, f func(context.Context, net.Listener) error) bool {
		for _, a := range strings.Split(addrs, ",") {
			if a == "" {
				continue
			}
			l, err := net.Listen("tcp", a)
			if err != nil {
				fmt.Fprintln(os.Stderr, "ztload:", err)
				return false
			}
			wg.Go(func() {
				if err := f(ctx, l); err != nil {
					fmt.Fprintln(os.Stderr, "ztload:", err)
					mu.Lock()
					code = 1
					mu.Unlock()
				}
			})
		}
		return true
	}
	if !start(listen, s.Serve) || !start(bytes, load.ByteServer) {
		return 1
	}
	fmt.Println(`{"listening":true}`)
	wg.Wait()
	return code
}
