package isolation

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"ztun/admin"
	"ztun/admin/xds"
	"ztun/proxy/state"
)

// Sizes of the mesh. The issue's own is 100,000 and 10,000; half of that is as telling and takes half the time of a
// shared machine.
const (
	workloads = 50_000
	services  = 5_000
)

func TestMain(m *testing.M) {
	if os.Getenv("ISOLATION_CHILD") != "" {
		if err := child(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// addresses is what the child tells: where it listens.
type addresses struct{ Echo, Admin, Stats, Ready string }

// child is a process as cmd/ztun is one, as far as the admin side goes, with an echo server in place of the data
// plane. It ends with its standard input.
func child() error {
	runtime.GOMAXPROCS(1)
	debug.SetGCPercent(50) // as cmd/ztun
	loop := admin.NewLoop(admin.LoopOptions{})
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { _ = loop.Run(ctx) })
	builder := state.NewBuilder("")
	fill(builder)
	if err := loop.Do(ctx, func() { loop.Publish(builder.Build()) }); err != nil {
		return err
	}
	section := func(write func(io.Writer, *state.View) error) admin.Section {
		return func(_ context.Context, e *admin.Encoder) error {
			return e.Raw(func(w io.Writer) error { return write(w, loop.View()) })
		}
	}
	a, err := admin.NewAdmin(admin.AdminOptions{Logger: slog.Default(), Dump: func() map[string]admin.Section {
		return map[string]admin.Section{"services": section(xds.WriteServices), "workloads": section(xds.WriteWorkloads)}
	}})
	if err != nil {
		return err
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(admin.ProcessCollector(), admin.GoCollector(),
		admin.SelfCollector(admin.SelfSources{Loop: loop}))
	s, err := admin.NewStats(admin.StatsOptions{Registry: registry})
	if err != nil {
		return err
	}
	r, err := admin.NewReadiness(admin.ReadinessOptions{Ready: admin.NewReady(nil)})
	if err != nil {
		return err
	}
	for _, x := range []*admin.Server{a, s, r} {
		wg.Go(func() { _ = x.Serve() })
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	go echo(l)
	local := func(x *admin.Server) string { return fmt.Sprintf("127.0.0.1:%d", x.Addrs()[0].Port()) }
	if err := json.NewEncoder(os.Stdout).Encode(addresses{l.Addr().String(), local(a), local(s), local(r)}); err != nil {
		return err
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
	cancel()
	for _, x := range []*admin.Server{a, s, r} {
		x.Close()
	}
	wg.Wait()
	return nil
}

func echo(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			_, _ = io.Copy(c, onlyReader{c})
		}()
	}
}

// onlyReader hides ReadFrom, so that the bytes pass through the process as they do in a proxy.
type onlyReader struct{ io.Reader }

func fill(b *state.Builder) {
	for i := range services {
		ns := fmt.Sprintf("ns-%d", i%100)
		b.InsertService(&state.Service{Name: fmt.Sprintf("svc-%d", i), Namespace: ns,
			Hostname: fmt.Sprintf("svc-%d.%s.svc.cluster.local", i, ns),
			VIPs:     []state.NetworkAddress{{Addr: netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)})}},
			Ports:    state.PortMap{{Service: 80, Target: 8080}}})
	}
	for i := range workloads {
		ns, svc := fmt.Sprintf("ns-%d", i%services%100), i%services
		b.InsertWorkload(&state.Workload{
			UID: fmt.Sprintf("Kubernetes//Pod/%s/pod-%06d", ns, i), Name: fmt.Sprintf("pod-%06d", i), Namespace: ns,
			TrustDomain:    "cluster.local",
			ServiceAccount: "default", Node: fmt.Sprintf("node-%d", i%500), ClusterID: "Kubernetes", Capacity: 1,
			Protocol:  state.HBONE,
			Addresses: []netip.Addr{netip.AddrFrom4([4]byte{11, byte(i >> 16), byte(i >> 8), byte(i)})},
			Services: []state.WorkloadService{
				{Service: state.ServiceKey{Namespace: ns, Hostname: fmt.Sprintf("svc-%d.%s.svc.cluster.local", svc, ns)},
					Ports: state.PortMap{{Service: 80, Target: 8080}}}},
		})
	}
}

// start starts the child and returns where it listens and its process id.
func start(t *testing.T) (addresses, int) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "ISOLATION_CHILD=1")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	var a addresses
	if err := json.NewDecoder(bufio.NewReader(out)).Decode(&a); err != nil {
		t.Fatal(err)
	}
	return a, cmd.Process.Pid
}

// latencies of 1 KiB echoes, one every 2 ms, until stop is closed.
func latencies(t *testing.T, addr string, stop <-chan struct{}) []time.Duration {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Error(err)
		return nil
	}
	defer c.Close()
	var all []time.Duration
	buf := make([]byte, 1024)
	for {
		select {
		case <-stop:
			return all
		case <-time.After(2 * time.Millisecond):
		}
		_ = c.SetDeadline(time.Now().Add(30 * time.Second))
		began := time.Now()
		if _, err := c.Write(buf); err != nil {
			t.Error(err)
			return all
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			t.Error(err)
			return all
		}
		all = append(all, time.Since(began))
	}
}

// during measures echoes while f runs.
func during(t *testing.T, addr string, f func()) []time.Duration {
	stop := make(chan struct{})
	got := make(chan []time.Duration, 1)
	go func() { got <- latencies(t, addr, stop) }()
	f()
	close(stop)
	l := <-got
	slices.Sort(l)
	return l
}

func quantile(l []time.Duration, q float64) time.Duration {
	return l[min(len(l)-1, int(q*float64(len(l))))]
}

func get(t *testing.T, url string) int64 {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 2 * time.Minute}
	resp, err := client.Get(url)
	if err != nil {
		t.Error(err)
		return 0
	}
	defer resp.Body.Close()
	n, err := io.Copy(io.Discard, resp.Body)
	if err != nil || resp.StatusCode != 200 {
		t.Errorf("%s: %s, %v", url, resp.Status, err)
	}
	return n
}

// rss of a process in bytes.
func rss(t *testing.T, pid int) int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Error(err)
	}
	for l := range strings.Lines(string(b)) {
		var kb int64
		if n, _ := fmt.Sscanf(l, "VmRSS: %d kB", &kb); n == 1 {
			return kb << 10
		}
	}
	return 0
}

// TestDumpDisturbsNobody: while dumps and scrapes follow one another, echoes on an established connection, readiness
// and metrics are answered at once, and memory does not grow. Without the pauses of the dumper the median of the
// echoes is 10 ms and more; when a dump holds things up as ztunnel's does, seconds.
func TestDumpDisturbsNobody(t *testing.T) {
	at, pid := start(t)
	get(t, "http://"+at.Admin+"/config_dump") // what the first one costs once
	calm := during(t, at.Echo, func() { time.Sleep(time.Second) })
	before, most := rss(t, pid), int64(0)
	var size int64
	var asked []time.Duration
	storm := during(t, at.Echo, func() {
		over := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				select {
				case <-over:
					return
				case <-time.After(50 * time.Millisecond):
				}
				for _, url := range []string{"http://" + at.Ready + "/healthz/ready", "http://" + at.Stats + "/metrics"} {
					began := time.Now()
					get(t, url)
					asked = append(asked, time.Since(began))
				}
				most = max(most, rss(t, pid))
			}
		})
		for range 2 {
			began := time.Now()
			size = get(t, "http://"+at.Admin+"/config_dump")
			if took := time.Since(began); took > time.Minute {
				t.Errorf("a dump took %v", took)
			}
		}
		close(over)
		wg.Wait()
	})
	if t.Failed() {
		return
	}
	slices.Sort(asked)
	t.Logf("echo p50 %v, p99 %v calm; %v, %v beside dumps of %d MiB; questions p50 %v, max %v; memory grew by %d KiB",
		quantile(calm, 0.5), quantile(calm, 0.99), quantile(storm, 0.5), quantile(storm, 0.99), size>>20,
		quantile(asked, 0.5), asked[len(asked)-1], (most-before)>>10)
	if size < 500*workloads {
		t.Errorf("a dump of %d bytes", size)
	}
	if m := quantile(storm, 0.5); m > 5*time.Millisecond && m > 5*quantile(calm, 0.5) {
		t.Errorf("beside dumps the median echo took %v, else %v", m, quantile(calm, 0.5))
	}
	if m := quantile(asked, 0.5); m > 250*time.Millisecond {
		t.Errorf("beside dumps readiness and metrics took %v", m)
	}
	if most-before > 64<<20 {
		t.Errorf("a dump made resident memory grow by %d MiB", (most-before)>>20)
	}
}
