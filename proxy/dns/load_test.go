package dns

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// One client asks for a second, 10,000 times, for names whose upstream is dead;
// another one's questions, for our names and by a nameserver that works, are
// answered meanwhile, each within a time that shows that it did not queue behind
// them: those wait for a minute.
func TestLoadOthersUnharmed(t *testing.T) {
	dead := netip.MustParseAddrPort("10.0.0.66:53")
	m := NewMetrics()
	up := &upstream{answer: func(p string, dst netip.AddrPort, raw []byte) [][]byte {
		if dst == dead {
			return nil
		}
		return echo(p, dst, raw)
	}}
	// Two pods: a Server each, as in the daemon, with the node's metrics.
	noisy := start(t, Config{Metrics: m, Upstream: up, Timeout: time.Minute, MaxForwards: 128})
	quiet := start(t, Config{Metrics: m, Upstream: up, Timeout: time.Minute}) // judged below, not by the default of 5 s

	const least = 10000
	total := 0
	var enough atomic.Bool
	var answered [3]int // by what came: nothing, SERVFAIL, other
	var mu sync.Mutex
	flood := make(chan struct{})
	places := make(chan struct{}, 1024) // netstack's Config.MaxDNS
	turnedAway := 0
	var wg sync.WaitGroup
	raws := [][]byte{mustPack(ask("A elsewhere.test")), mustPack(ask("A cart")),
		mustPack(ask("A " + strings.Repeat("a.", 100) + "svc.cluster.local")),
		[]byte("garbage\xff\xff\xff\xff\xff\xff\xff\xff\xff")}
	go func() {
		defer close(flood)
		begin := time.Now()
		for i := 0; i < least || !enough.Load(); i++ {
			total++
			if ahead := time.Duration(i)*100*time.Microsecond - time.Since(begin); ahead > time.Millisecond {
				time.Sleep(ahead)
			}
			select {
			case places <- struct{}{}:
			default:
				turnedAway++
				continue
			}
			wg.Go(func() {
				defer func() { <-places }()
				w := what(noisy.Query(raws[i%len(raws)], dead))
				mu.Lock()
				defer mu.Unlock()
				switch w {
				case "nothing":
					answered[0]++
				case "SERVFAIL":
					answered[1]++
				default:
					answered[2]++
				}
			})
		}
	}()

	var took []time.Duration
	for i := 0; ; i++ {
		select {
		case <-flood:
			ended, end := context.WithCancel(context.Background())
			end()
			noisy.Shutdown(ended) // what waits for the dead upstream
			wg.Wait()
			worst := slices.Max(took)
			t.Logf("%d questions beside the flood, the slowest in %v; flood: %v, turned away %d", len(took), worst, answered,
				turnedAway)
			// Far above what a busy machine needs, far below the flood's own wait.
			if worst > 20*time.Second {
				t.Errorf("a quiet client waited for %v", worst)
			}
			if taken := total - turnedAway; answered[2] < taken/4 { // a slow machine turns more away
				t.Errorf("of the noisy client's own questions for our names and garbage, half of %d, only %d were answered", taken,
					answered[2])
			}
			if n := m.dropped[dropForwards].Load(); n == 0 {
				t.Error("the bound of forwarded queries was never met")
			}
			return
		default:
		}
		s := []*Server{quiet, noisy}[i%2] // another client of the same pod is well, too
		begin := time.Now()
		name := "cart"
		if s == quiet && i%4 == 0 {
			name = "elsewhere.test"
		}
		if got := render(udp(t, s, ask("A "+name), kubeDNS)); !strings.HasPrefix(got, "NOERROR") {
			t.Fatalf("%s: %s", name, got)
		}
		took = append(took, time.Since(begin))
		enough.Store(len(took) >= 20)
		time.Sleep(10 * time.Millisecond)
	}
}

// What a question costs, the longest names included.
func BenchmarkAnswer(b *testing.B) {
	things := vectors()
	for i := range 10000 {
		things = append(things, service(fmt.Sprintf("s%d.green.svc.cluster.local", i), "green", "n1/10.96.0.20"))
	}
	view := build(things...)
	for _, name := range []string{"cart", "s77.green.svc.cluster.local", "api.acme.test.blue.svc.cluster.local",
		strings.Repeat("a.", 100) + "svc.cluster.local"} {
		q, o := ask("A "+name), Options{}
		b.Run(name[:min(len(name), 40)], func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				Answer(view, blueClient, &o, q)
			}
		})
	}
}
