// Relaybench measures netstack as a relay: iperf3 in an application's namespace
// sends through a TUN to a Stack, which relays to a kernel socket on the
// loopback of the proxy's namespace, where the iperf3 server listens. Beside it,
// in the same rounds, runs iperf3 over a bare veth between the same namespaces.
//
//	go build -o /tmp/relaybench ./netstack/internal/relaybench && sudo /tmp/relaybench -t 3 -rounds 3
//
// It needs root, iproute2 and iperf3, and removes the namespaces it makes.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"runtime/pprof"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"

	"ztun/netstack"
	"ztun/tun"
	"ztun/tun/netns"
)

const (
	tunName = "ztun0"
	appIP   = "10.1.0.2"
	target  = "10.99.0.1" // on lo of the proxy's namespace, reached by the TUN
	vethApp = "10.98.0.1"
	vethSrv = "10.98.0.2"
)

var (
	seconds  = flag.Int("t", 3, "seconds per run")
	rounds   = flag.Int("rounds", 1, "rounds")
	streams  = flag.String("streams", "1,8", "numbers of parallel streams")
	mtu      = flag.Int("mtu", 1500, "MTU of TUN and veth")
	procs    = flag.Int("procs", 0, "GOMAXPROCS of the relay (0: all)")
	bufSize  = flag.Int("buf", netstack.MaxWrite, "buffer from kernel socket to stack")
	rcvBuf   = flag.Int("rcv", 0, "receive buffer of the stack")
	maxRcv   = flag.Int("maxrcv", 0, "largest receive buffer")
	sndBuf   = flag.Int("snd", 0, "send buffer of the stack")
	maxSnd   = flag.Int("maxsnd", 0, "largest send buffer")
	plain    = flag.Bool("plain", false, "no offload")
	bare     = flag.Bool("bare", true, "measure the bare veth too")
	dirs     = flag.String("dirs", "up,down", "directions: up (the application sends), down")
	profile  = flag.String("cpuprofile", "", "write the relay's CPU profile of each run, or with -idle its heap profile, to this prefix")
	idle     = flag.Int("idle", 0, "measure memory of this many idle connections instead")
	counters = flag.Bool("nstat", false, "print the TCP counters of the application's kernel")
	worker   = flag.Bool("worker", false, "internal: be the relay")
	appNS    = flag.String("ns", "", "internal: the application's namespace")
)

func main() {
	flag.Parse()
	log.SetFlags(0)
	if *worker {
		work()
		return
	}
	if os.Getuid() != 0 {
		log.Fatal("relaybench needs root")
	}
	if err := drive(); err != nil {
		log.Fatal(err)
	}
}

// drive makes the namespaces, starts the worker and runs iperf3.
func drive() error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	app, srv := fmt.Sprintf("rb%d-a", os.Getpid()), fmt.Sprintf("rb%d-p", os.Getpid())
	defer sh("ip netns del " + app)
	defer sh("ip netns del " + srv)
	for _, c := range []string{
		"ip netns add " + app,
		"ip netns add " + srv,
		"ip -n " + srv + " link set lo up",
		"ip -n " + app + " link set lo up",
		"ip -n " + srv + " addr add " + target + "/32 dev lo",
		fmt.Sprintf("ip -n %s link add v0 mtu %d type veth peer name v1 mtu %d netns %s", app, *mtu, *mtu, srv),
		"ip -n " + app + " addr add " + vethApp + "/24 dev v0",
		"ip -n " + srv + " addr add " + vethSrv + "/24 dev v1",
		"ip -n " + app + " link set v0 up",
		"ip -n " + srv + " link set v1 up",
	} {
		if err := sh(c); err != nil {
			return err
		}
	}
	server := exec.CommandContext(ctx, "ip", "netns", "exec", srv, "iperf3", "-s")
	server.Stderr = os.Stderr
	if err := server.Start(); err != nil {
		return err
	}
	defer func() { server.Process.Kill(); server.Wait() }()

	self, err := os.Executable()
	if err != nil {
		return err
	}
	args := append([]string{"netns", "exec", srv, self, "-worker", "-ns", app}, os.Args[1:]...)
	w := exec.CommandContext(ctx, "ip", args...)
	w.Stderr = os.Stderr
	in, err := w.StdinPipe()
	if err != nil {
		return err
	}
	pipe, err := w.StdoutPipe()
	if err != nil {
		return err
	}
	out := bufio.NewScanner(pipe)
	if err := w.Start(); err != nil {
		return err
	}
	defer func() { in.Close(); w.Wait() }()
	ask := func(q string) (string, error) {
		fmt.Fprintln(in, q)
		if !out.Scan() {
			return "", errors.New("the worker died")
		}
		return out.Text(), nil
	}
	if _, err := ask("ready"); err != nil {
		return err
	}
	for _, c := range []string{
		"ip -n " + app + " addr add " + appIP + "/32 dev " + tunName,
		"ip -n " + app + " link set " + tunName + " up",
		"ip -n " + app + " route add " + target + " dev " + tunName + " src " + appIP,
	} {
		if err := sh(c); err != nil {
			return err
		}
	}
	if *idle > 0 {
		return driveIdle(app, ask)
	}

	sum := map[string][]float64{}
	for r := range *rounds {
		for _, ns := range strings.Split(*streams, ",") {
			n, err := strconv.Atoi(ns)
			if err != nil {
				return err
			}
			for _, dir := range strings.Split(*dirs, ",") {
				key := fmt.Sprintf("%d stream(s) %-4s", n, dir)
				if *bare {
					g, used, err := iperf(ctx, server.Process.Pid, app, vethSrv, n, dir)
					if err != nil {
						return err
					}
					sum[key+" bare Gb/s"] = append(sum[key+" bare Gb/s"], g)
					sum[key+" bare all CPU-s/GB"] = append(sum[key+" bare all CPU-s/GB"], used/(g/8*float64(*seconds)))
				}
				if _, err := ask(fmt.Sprintf("begin %s-%d-%d", dir, n, r)); err != nil {
					return err
				}
				g, used, err := iperf(ctx, server.Process.Pid, app, target, n, dir)
				if err != nil {
					return err
				}
				st, err := ask("end")
				if err != nil {
					return err
				}
				cpu, _ := strconv.ParseFloat(strings.Fields(st)[0], 64)
				gb := g / 8 * float64(*seconds)
				sum[key+" ztun Gb/s"] = append(sum[key+" ztun Gb/s"], g)
				sum[key+" ztun relay CPU-s/GB"] = append(sum[key+" ztun relay CPU-s/GB"], cpu/gb)
				sum[key+" ztun all CPU-s/GB"] = append(sum[key+" ztun all CPU-s/GB"], (used+cpu)/gb)
				fmt.Printf("round %d  %s  %6.2f Gb/s  cpu %.2f s of %d  %s\n", r+1, key, g, cpu, *seconds, strings.Join(strings.Fields(st)[1:], " "))
			}
		}
	}
	if *counters {
		// What the application's kernel saw: drops and duplicates explain retransmissions.
		out, _ := exec.Command("ip", "netns", "exec", app, "nstat", "-z", "-s", "TcpExt*", "TcpRetransSegs", "TcpInSegs").Output()
		for _, l := range strings.Split(string(out), "\n") {
			if f := strings.Fields(l); len(f) > 1 && f[1] != "0" {
				fmt.Println(l)
			}
		}
	}
	var keys []string
	for k := range sum {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	for _, k := range keys {
		v := sum[k]
		sort.Float64s(v)
		fmt.Printf("%-44s median %6.2f   (%.2f - %.2f)\n", k, v[len(v)/2], v[0], v[len(v)-1])
	}
	return nil
}

// iperf returns Gb/s and the CPU seconds that client and server have used.
func iperf(ctx context.Context, server int, ns, to string, n int, dir string) (gbps, used float64, err error) {
	args := []string{"netns", "exec", ns, "iperf3", "-c", to, "-J", "-t", strconv.Itoa(*seconds), "-P", strconv.Itoa(n)}
	if dir == "down" {
		args = append(args, "-R")
	}
	var res struct {
		Error string
		End   struct {
			Received struct {
				Bps float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		}
	}
	var last error
	for range 5 { // the server may still be at the last test
		cpu0 := procCPU(server)
		cmd := exec.CommandContext(ctx, "ip", args...)
		b, err := cmd.Output()
		if jerr := json.Unmarshal(b, &res); jerr == nil && res.Error == "" && err == nil {
			ps := cmd.ProcessState
			return res.End.Received.Bps / 1e9, procCPU(server) - cpu0 + (ps.UserTime() + ps.SystemTime()).Seconds(), nil
		}
		last = fmt.Errorf("iperf3 %v: %v %s", args, err, res.Error)
		res.Error = ""
		select {
		case <-ctx.Done():
			return 0, 0, ctx.Err()
		case <-time.After(300 * time.Millisecond):
		}
	}
	return 0, 0, last
}

// procCPU is the CPU seconds of a process and its threads so far.
func procCPU(pid int) float64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	u, _ := strconv.Atoi(f[11])
	k, _ := strconv.Atoi(f[12])
	return float64(u+k) / 100 // USER_HZ
}

func sh(c string) error {
	f := strings.Fields(c)
	if out, err := exec.Command(f[0], f[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %v: %s", c, err, out)
	}
	return nil
}

// work is the relay; it runs in the proxy's namespace.
func work() {
	if *idle > 0 {
		runtime.MemProfileRate = 512
	}
	if *procs > 0 {
		runtime.GOMAXPROCS(*procs)
	}
	logger := slog.New(slog.NewTextHandler(os.Stderr, nil))
	ns, err := netns.Open(*appNS)
	if err != nil {
		log.Fatal(err)
	}
	dev, err := tun.Open(tun.Options{Name: tunName, NetNS: ns, MTU: *mtu, Plain: *plain})
	if err != nil {
		log.Fatal(err)
	}
	s, err := netstack.New(netstack.Config{
		Addrs: []netip.Addr{netip.MustParseAddr(appIP)}, App: dev, Logger: logger, OnFlow: relay,
		ReceiveBuffer: *rcvBuf, MaxReceiveBuffer: *maxRcv, SendBuffer: *sndBuf, MaxSendBuffer: *maxSnd,
	})
	if err != nil {
		log.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Run(context.Background()) }()

	var cpu0 time.Duration
	var st0 netstack.Stats
	var prof *os.File
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		f := strings.Fields(in.Text())
		switch f[0] {
		case "ready":
			fmt.Println("ready")
		case "begin":
			if *profile != "" {
				if prof, err = os.Create(*profile + "-" + f[1] + ".pprof"); err != nil {
					log.Fatal(err)
				}
				pprof.StartCPUProfile(prof)
			}
			cpu0, st0 = cpu(), s.Stats()
			fmt.Println("ok")
		case "end":
			st := s.Stats()
			used := cpu() - cpu0
			if prof != nil {
				pprof.StopCPUProfile()
				prof.Close()
				prof = nil
			}
			fmt.Printf("%.3f rx %d B/pkt, %d pkts, tx %d B/pkt, %d pkts, retr %d, timeouts %d, drop %d, rss %d KiB\n", used.Seconds(),
				per(st.App.RxBytes-st0.App.RxBytes, st.App.RxPackets-st0.App.RxPackets), st.App.RxPackets-st0.App.RxPackets,
				per(st.App.TxBytes-st0.App.TxBytes, st.App.TxPackets-st0.App.TxPackets), st.App.TxPackets-st0.App.TxPackets,
				st.Retransmits-st0.Retransmits, st.Timeouts-st0.Timeouts, st.App.TxDropped+st.SegmentQueueDropped-st0.App.TxDropped-st0.SegmentQueueDropped, rss())
		case "mem":
			runtime.GC()
			runtime.GC()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			if *profile != "" {
				if f, err := os.Create(*profile + "-mem.pprof"); err == nil {
					pprof.WriteHeapProfile(f)
					f.Close()
				}
			}
			fmt.Printf("%d rss KiB, heap %d KiB, stacks %d KiB, goroutines %d, conns %d\n", rss(), m.HeapInuse>>10, m.StackInuse>>10, runtime.NumGoroutine(), s.Stats().Conns)
		}
	}
	s.Close()
	<-done
}

func per(a, b uint64) uint64 {
	if b == 0 {
		return 0
	}
	return a / b
}

func cpu() time.Duration {
	var ru syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &ru)
	return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
}

func rss() int {
	b, _ := os.ReadFile("/proc/self/statm")
	n, _ := strconv.Atoi(strings.Fields(string(b))[1])
	return n * os.Getpagesize() >> 10
}

// relay dials before it accepts, then copies both ways.
func relay(f *netstack.Flow) {
	k, err := net.DialTimeout("tcp", f.Dst().String(), 5*time.Second)
	if err != nil {
		f.Refuse(netstack.Reset)
		return
	}
	defer k.Close()
	c, err := f.Accept()
	if err != nil {
		return
	}
	defer c.Close()
	tc := k.(*net.TCPConn)
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.WriteTo(tc)
		tc.CloseWrite()
	}()
	down(c, tc)
	c.CloseWrite()
	<-done
}

// down copies from the kernel socket, with a buffer only while there is data.
func down(c *netstack.Conn, tc *net.TCPConn) {
	rc, err := tc.SyscallConn()
	if err != nil {
		return
	}
	for {
		var b []byte
		var n int
		rerr := rc.Read(func(fd uintptr) bool {
			if b == nil {
				b = getBuf()
			}
			var err error
			n, err = syscall.Read(int(fd), b)
			if err == syscall.EAGAIN {
				putBuf(b)
				b = nil
				return false
			}
			return true
		})
		if rerr != nil || n <= 0 {
			if b != nil {
				putBuf(b)
			}
			return
		}
		_, err := c.Write(b[:n])
		putBuf(b)
		if err != nil {
			return
		}
	}
}
