package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"ztun/proxy/fair"
	"ztun/proxy/hbone"
	"ztun/proxy/identity"
)

// reachesB opens a tunnel and a stream to b's application from src.
func (w *world) reachesB(src string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	cc := w.peerOfB(src)
	defer cc.Close()
	s, _, err := cc.Open(ctx, &hbone.Request{Authority: "10.91.2.2:9000"})
	if err == nil {
		s.Close()
	}
	return err
}

// wantClosed waits for c to be closed by its peer.
func wantClosed(t *testing.T, what string, c net.Conn) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s is still open: %v", what, err)
	}
}

// TestStuckHandshakes: connections that begin a handshake and wait take all places of one source, and keep nobody
// else waiting. Who was bounded is counted, and said once for all of them.
func TestStuckHandshakes(t *testing.T) {
	var log bytes.Buffer
	report := fair.NewReport(slog.New(slog.NewTextHandler(&log, nil)))
	w := newWorldWith(t, func(_ *world, i int, o *Options) {
		o.Config.MaxMeshHandshake = 8
		if i == 1 {
			o.Report = report
		}
	})
	w.listen(appB, echo)
	var stuck []net.Conn
	for i := range 40 {
		c, err := w.dialB(netip.AddrPortFrom(netip.MustParseAddr("192.0.2.66"), uint16(2000+i)))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.Write([]byte{0x16})
		stuck = append(stuck, c)
	}
	eventually(t, "all places are taken", func() bool {
		return w.proxies[1].bounds.handshakes.Held(netip.MustParseAddr("192.0.2.66")) >= 8
	})
	for i := range 4 {
		if err := w.reachesB(fmt.Sprintf("192.0.2.9:%d", 4000+i)); err != nil {
			t.Errorf("another source beside a stuck one: %v", err)
		}
	}
	wantClosed(t, "the oldest stuck handshake", stuck[0])
	if n := w.proxies[1].bounds.handshakes.Used(); n > 8 {
		t.Errorf("%d handshakes under way", n)
	}
	// Those that came too many, not the end of their patience (handshakeTimeout), made room.
	eventually(t, "32 evictions are counted", func() (ok bool) {
		var evicted uint64
		for _, c := range report.Counts() {
			evicted += c.Evicted
		}
		return evicted >= 32 && w.proxies[1].Stats().Overloaded >= 32
	})
	for _, c := range stuck {
		c.Close()
	}
	w.stop()
	if n := strings.Count(log.String(), "level=WARN"); n < 1 || n > 2 || !strings.Contains(log.String(), "192.0.2.66") {
		t.Errorf("%d lines of the bound:\n%s", n, log.String())
	}
}

// TestTunnelsWithoutStreams: tunnels of a member of the mesh that carry nothing are bounded per source; one that
// carries something is not among them.
func TestTunnelsWithoutStreams(t *testing.T) {
	w := newWorld(t)
	w.proxies[1].bounds.newcomers = fair.NewLedger(fair.LedgerOptions[netip.Addr]{Limit: 6, PerSource: 4})
	w.listen(appB, echo)
	busy := w.peerOfB("192.0.2.66:1999")
	s, _, err := busy.Open(context.Background(), &hbone.Request{Authority: "10.91.2.2:9000"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var idle []*hbone.ClientConn
	for i := range 6 {
		idle = append(idle, w.peerOfB(fmt.Sprintf("192.0.2.66:%d", 2000+i)))
	}
	for i, want := range []bool{true, true, false, false} {
		select {
		case <-idle[i].Done():
		case <-time.After(map[bool]time.Duration{true: 10 * time.Second, false: 50 * time.Millisecond}[want]):
			if want {
				t.Errorf("tunnel %d without a stream is still open: more than 4 of one source", i)
			}
			continue
		}
		if !want {
			t.Errorf("tunnel %d is closed", i)
		}
	}
	roundTrip(t, s)
	if err := w.reachesB("192.0.2.9:4000"); err != nil {
		t.Errorf("another source: %v", err)
	}
	roundTrip(t, s)
}

// TestRequestsAreBounded: CONNECTs that await their answer, of a peer that asks for more and more of them, leave
// places for others'.
func TestRequestsAreBounded(t *testing.T) {
	w := newWorld(t)
	w.proxies[1].bounds.requests = fair.NewLedger(fair.LedgerOptions[netip.Addr]{Limit: 4})
	// an application that never answers
	w.dialApp = func(ctx context.Context) (Conn, error) { <-ctx.Done(); return nil, ctx.Err() }
	cc := w.peerOfB("192.0.2.66:1999")
	answers := make(chan int, 20)
	ctx, cancel := context.WithCancel(context.Background())
	for range 5 {
		go func() {
			_, resp, _ := cc.Open(ctx, &hbone.Request{Authority: "10.91.2.2:9000"})
			if resp == nil {
				resp = &hbone.Response{}
			}
			answers <- resp.Status
		}()
	}
	select {
	case status := <-answers:
		if status != 503 {
			t.Errorf("the oldest request was answered %d", status)
		}
	case <-time.After(10 * time.Second):
		t.Error("none of five requests has lost its place of four")
	}
	if n := w.proxies[1].bounds.requests.Used(); n != 4 {
		t.Errorf("%d requests await their answer", n)
	}
	cancel()
	for range 4 {
		<-answers
	}
}

// TestRefusalsInTheLog: what a source is refused costs a bounded number of lines; what was left out is said, and
// others' lines are written.
func TestRefusalsInTheLog(t *testing.T) {
	const tries = 400
	w := newWorldWith(t, func(_ *world, _ int, o *Options) { o.Config.PolicyInfoLogging = true })
	w.know.publish(loadView(t, func(s string) string {
		return strings.Replace(s, "destinationPorts: [7777]", "destinationPorts: [7777, 9000]", 1)
	}))
	denied, early := w.peerOfB("192.0.2.66:2000"), w.peerOfB("192.0.2.77:2000")
	for range tries {
		if _, resp, _ := denied.Open(t.Context(), &hbone.Request{Authority: "10.91.2.2:9000"}); resp == nil ||
			resp.Status != 401 {
			t.Fatalf("answered %+v", resp)
		}
		if _, resp, _ := early.Open(t.Context(), &hbone.Request{Authority: "10.9.9.9:9000"}); resp == nil ||
			resp.Status != 400 {
			t.Fatalf("answered %+v", resp)
		}
		w.connect(w.proxies[1].ServePassthrough, "192.0.2.88:2000", "10.91.2.2:9000")
	}
	other := w.peerOfB("192.0.2.9:4000")
	other.Open(t.Context(), &hbone.Request{Authority: "10.91.2.2:9000"})
	w.settle()
	w.stop()
	lines := strings.Join(w.lines(1), "\n")
	for _, source := range []string{"192.0.2.66", "192.0.2.77", "192.0.2.88"} {
		if n := strings.Count(lines, "src.addr="+source); n < 10 || n > 100 {
			t.Errorf("%d lines of %d refusals of %s", n, tries, source)
		}
	}
	if !strings.Contains(lines, "src.addr=192.0.2.9:4000") {
		t.Error("the refusal of a source that has a budget left is not in the log")
	}
	if !strings.Contains(lines, "log lines left out") {
		t.Error("nothing is said of the lines that were left out")
	}
}

// TestLabelsOfTheRefused: what a peer says of itself reaches no label before policy has let it in, is bounded in
// length, and in all.
func TestLabelsOfTheRefused(t *testing.T) {
	long := strings.Repeat("x", 20_000)
	w := newWorld(t)
	w.listen(appB, echo)
	deny := func(s string) string {
		return strings.Replace(s, "destinationPorts: [7777]", "destinationPorts: [7777, 9000]", 1)
	}
	w.know.publish(loadView(t, deny))
	const strange = "192.0.2.66:2000" // of no workload that b knows: only baggage tells more than the certificate
	cc := w.peerOfB(strange)
	for i := range 50 {
		cc.Open(t.Context(),
			&hbone.Request{Authority: "10.91.2.2:9000", Baggage: fmt.Sprintf("k8s.deployment.name=evil%d,k8s.namespace.name=%s",
				i, long)})
	}
	for key := range gather(t, w.metrics[1]) {
		if strings.Contains(key, "evil") || len(key) > 4000 {
			t.Fatalf("a peer that policy refuses has written a label: %.300s", key)
		}
	}
	if n := len(w.metrics[1].series); n > 2 {
		t.Errorf("%d series of one refused peer", n)
	}

	w.know.publish(loadView(t, nil))
	const tries = 300
	for i := range tries {
		s, _, err := cc.Open(t.Context(),
			&hbone.Request{Authority: "10.91.2.2:9000", Baggage: fmt.Sprintf("k8s.deployment.name=good%d,k8s.namespace.name=%s",
				i, long)})
		if err != nil {
			t.Fatal(err)
		}
		s.Close()
	}
	w.settle()
	held, named := 0, 0
	for l := range w.metrics[1].series {
		for i := range l {
			held += len(l[i])
			if len(l[i]) > maxLabel {
				t.Fatalf("a label of %d bytes", len(l[i]))
			}
		}
		if strings.HasPrefix(l[lSourceWorkload], "good") {
			named++
		}
	}
	if held > 2*maxClaims || named == 0 || named > 2*maxClaims/seriesCost {
		t.Errorf("%d bytes of labels, %d series under names that one peer has made up", held, named)
	}
	if n := w.metrics[1].disclaimed.Load(); n == 0 {
		t.Error("what a peer claimed too much was not counted")
	}
	var opened float64
	for key, value := range gather(t, w.metrics[1]) {
		if strings.HasPrefix(key, "istio_tcp_connections_opened_total") &&
			strings.Contains(key, `connection_security_policy="mutual_tls"`) {
			var n float64
			fmt.Sscan(value, &n)
			opened += n
		}
	}
	if opened != tries+50 {
		t.Errorf("%v connections counted of %d", opened, tries+50)
	}
	// Claims go with their series.
	w.metrics[1].start = time.Now().Add(-time.Hour)
	for _, s := range w.metrics[1].series {
		s.last.Store(0)
	}
	w.metrics[1].Expire(nil)
	if n := len(w.metrics[1].claims); n != 0 {
		t.Errorf("%d peers are still charged for series that have expired", n)
	}
}

// TestClip: labels are valid UTF-8 of a bounded length.
func TestClip(t *testing.T) {
	in := labelInput{derived: &derived{baggage: hbone.Baggage{Workload: strings.Repeat("é", 300), Namespace: "a\xffb"},
		hasID: true,
		id:    identity.ID{TrustDomain: strings.Repeat("t", 2000), Namespace: "n", ServiceAccount: "s"}}}
	l := makeLabels(in)
	if got := l[lSourceWorkload]; len(got) > maxClaimed+1 || !strings.HasPrefix(got, "éé") ||
		strings.ToValidUTF8(got, "!") != got {
		t.Errorf("%d bytes: %q", len(got), got)
	}
	if l[lSourceNamespace] != "a?b" || len(l[lSourcePrincipal]) > maxLabel {
		t.Errorf("%q, a principal of %d bytes", l[lSourceNamespace], len(l[lSourcePrincipal]))
	}
}
