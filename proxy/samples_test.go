package proxy

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"ztun/proxy/refusal"
)

// volatile are the parts of a line that differ from run to run.
var volatile = []struct {
	re   *regexp.Regexp
	with string
}{
	{regexp.MustCompile(`^\S+`), "TIME"},
	{regexp.MustCompile(`src\.addr=([0-9.]+):\d+`), "src.addr=$1:PORT"},
	{regexp.MustCompile(`duration="\d+ms"`), `duration="Nms"`},
	{regexp.MustCompile(`bytes_(sent|recv)=1837`), "bytes_$1=REPLY"},
}

func stable(line string) string {
	for _, v := range volatile {
		line = v.re.ReplaceAllString(line, v.with)
	}
	return line
}

func sampleLines(t *testing.T, file string) []string {
	t.Helper()
	data, err := os.ReadFile("../docs/samples/" + file)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, l := range strings.Split(strings.TrimSpace(string(data)), "\n") {
		out = append(out, stable(l))
	}
	return out
}

// TestDriveSamples sends the connections of samples/drive.txt through both proxies (without the last, which stays in
// the pod's kernel) and compares access lines and metrics with those of a real ztunnel, field by field and in order.
// Times, ports and durations are not compared.
func TestDriveSamples(t *testing.T) {
	w := newWorldWith(t, func(_ *world, _ int, o *Options) {
		o.Config.SOCKS5 = true
		o.Names = func(_ context.Context, host string) ([]netip.Addr, error) {
			if host != "b.default.svc.cluster.local" {
				t.Error(host)
			}
			return []netip.Addr{netip.MustParseAddr("fd00::10"), netip.MustParseAddr("10.96.0.10")}, nil
		}
	})
	reply := strings.Repeat("x", 1837)
	pod, plain := netip.MustParseAddrPort("10.91.2.2:9000"), netip.MustParseAddrPort("10.91.0.2:9000")

	get := func(serve func(Flow), src, dst string, n int, ap netip.AddrPort) {
		t.Helper()
		w.listen(ap, answer(n, reply))
		app, _, done, err := w.connect(serve, src, dst)
		if err != nil {
			t.Fatalf("%s: %v", dst, err)
		}
		app.Write(bytes.Repeat([]byte("q"), n))
		got, err := io.ReadAll(app)
		app.Close()
		if err != nil || string(got) != reply {
			t.Fatalf("%s: %d bytes, %v", dst, len(got), err)
		}
		<-done
	}
	refused := func(serve func(Flow), src, dst string, want refusal.Way) {
		t.Helper()
		_, r, _, err := w.connect(serve, src, dst)
		if err != errRefused || r != want {
			t.Fatalf("%s: %v, refusal %d; want it refused by %d", dst, err, r, want)
		}
	}
	out := w.proxies[0].ServeOutbound
	in := w.proxies[1].ServePassthrough
	const a = "10.91.1.2:20410"
	get(out, a, "10.91.2.2:9000", 78, pod)
	get(out, a, "10.96.0.10:80", 74, pod)
	refused(out, a, "10.96.0.10:81", refusal.Reset)
	refused(out, a, "10.96.0.10:82", refusal.Reset)
	refused(out, a, "10.96.0.12:80", refusal.Reset)
	get(out, a, "10.91.0.2:9000", 78, plain)
	get(out, a, "10.96.0.11:80", 74, plain)
	refused(out, a, "10.91.2.2:9998", refusal.Reset)
	refused(out, a, "10.91.2.2:7777", refusal.Reset)
	refused(out, a, "10.91.1.1:9000", refusal.Reset)
	refused(out, a, "10.91.2.99:9000", refusal.HostUnreachable)
	get(in, "10.91.2.1:23380", "10.91.2.2:9000", 78, pod)
	refused(in, "10.91.2.1:27694", "10.91.2.2:7777", refusal.Reset)
	refused(out, a, "10.91.2.2:15008", refusal.Reset)
	for _, s := range []struct {
		request string
		n       int
	}{{"\x05\x01\x00\x03\x1bb.default.svc.cluster.local\x00\x50", 91}, {"\x05\x01\x00\x01\x0a\x5b\x02\x02\x23\x28", 78}} {
		w.listen(pod, answer(s.n, reply))
		app, done := w.socks(s.request, "\x05\x00\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00")
		app.Write(bytes.Repeat([]byte("q"), s.n))
		if got, err := io.ReadAll(app); err != nil || string(got) != reply {
			t.Fatalf("SOCKS5: %d bytes, %v", len(got), err)
		}
		app.Close()
		<-done
	}

	w.settle()
	w.mu.Lock()
	got := w.clients[pod]
	w.mu.Unlock()
	if got != addrA {
		t.Errorf("the application saw %v as its last client", got)
	}
	w.stop()
	for i, file := range []string{"access-a.plain.log", "access-b.plain.log"} {
		var got []string
		for _, l := range w.lines(i) {
			got = append(got, stable(l))
		}
		want := sampleLines(t, file)
		slices.Sort(got) // completions of different connections may overtake each other
		slices.Sort(want)
		for _, l := range want {
			if !slices.Contains(got, l) {
				t.Errorf("%s: missing\n%s", file, l)
			}
		}
		for _, l := range got {
			if !slices.Contains(want, l) {
				t.Errorf("%s: not in the sample\n%s", file, l)
			}
		}
	}
	for i, file := range []string{"metrics-a.txt", "metrics-b.txt"} {
		compareMetrics(t, w.metrics[i], file)
	}
}

// compareMetrics checks that every series of ours stands in the sample with the same labels in the same
// order and the same value, and that we have every series of the sample.
func compareMetrics(t *testing.T, m *Metrics, file string) {
	t.Helper()
	data, err := os.ReadFile("../docs/samples/" + file)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{}
	for _, l := range strings.Split(string(data), "\n") {
		if strings.HasPrefix(l, "istio_tcp_") && !strings.HasPrefix(l, "istio_tcp_sockets") {
			i := strings.LastIndex(l, " ")
			want[l[:i]] = l[i+1:]
		}
	}
	got := gather(t, m)
	for k, v := range want {
		g, ok := got[k]
		if !ok {
			t.Errorf("%s: missing %s", file, k)
		} else if g != v {
			t.Errorf("%s: %s is %s, want %s", file, k, g, v)
		}
	}
	for k := range got {
		if _, ok := want[k]; !ok {
			t.Errorf("%s: not in the sample: %s", file, k)
		}
	}
}

// gather renders every counter as the exposition does, labels in their own order.
func gather(t *testing.T, m *Metrics) map[string]string {
	t.Helper()
	got := map[string]string{}
	ch := make(chan prometheus.Metric, 1000)
	m.Collect(ch)
	close(ch)
	for x := range ch {
		var d dto.Metric
		if err := x.Write(&d); err != nil {
			t.Fatal(err)
		}
		if d.Counter == nil || len(d.Label) != nLabels {
			continue
		}
		name := regexp.MustCompile(`fqName: "([^"]+)"`).FindStringSubmatch(x.Desc().String())[1]
		var ls []string
		for _, l := range d.Label {
			ls = append(ls, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
		}
		got[name+"{"+strings.Join(ls, ",")+"}"] = fmt.Sprint(d.Counter.GetValue())
	}
	return got
}
