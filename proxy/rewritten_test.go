package proxy

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"ztun/proxy/hbone"
)

// TestRewrittenSource: a tunnel whose source address belongs to another workload, or is a link's (istio-cni's SNAT),
// is found out; the log says so, once in a while, and policies do not go by the address, neither to allow nor to let
// pass.
func TestRewrittenSource(t *testing.T) {
	var log bytes.Buffer
	w := newWorldWith(t, func(_ *world, i int, o *Options) {
		if i == 1 {
			o.Log = slog.New(slog.NewTextHandler(&log, nil))
		}
	})
	w.listen(appB, echo)
	status := func(src string) int {
		t.Helper()
		s, resp, _ := w.peerOfB(src).Open(t.Context(), &hbone.Request{Authority: "10.91.2.2:9000"})
		if s != nil {
			s.Close()
		}
		if resp == nil {
			return 0
		}
		return resp.Status
	}
	const own, others, snat, unknown = "10.91.1.2:4000", "10.91.0.2:4000", "169.254.7.127:4000", "192.0.2.9:4000"
	for _, tt := range []struct {
		name, policy string
		want         map[string]int
	}{
		{"no policy about addresses", "destinationPorts: [7777]", map[string]int{own: 200, others: 200, snat: 200,
			unknown: 200}},
		{"deny an address that it does not show", "sourceIps: [10.1.1.1/32]", map[string]int{own: 200, others: 401, snat: 401,
			unknown: 200}},
		{"deny all but the address that it shows", "notSourceIps: [10.91.0.2/32, 10.91.1.2/32]",
			map[string]int{own: 200, others: 401, snat: 401, unknown: 401}},
	} {
		w.know.publish(loadView(t, func(s string) string {
			return strings.Replace(s, "destinationPorts: [7777]", tt.policy, 1)
		}))
		for src, want := range tt.want {
			if got := status(src); got != want {
				t.Errorf("%s: from %s: %d, want %d", tt.name, src, got, want)
			}
		}
	}
	w.know.publish(loadView(t, func(s string) string {
		return strings.Replace(s, "notDestinationPorts: [1]", "sourceIps: [10.91.0.2/32, 169.254.7.127/32, 10.91.1.2/32]", 1)
	}))
	for src, want := range map[string]int{own: 200, others: 401, snat: 401, unknown: 401} {
		if got := status(src); got != want {
			t.Errorf("allowed by address: from %s: %d, want %d", src, got, want)
		}
	}
	w.settle()
	n := w.proxies[1].Stats().SourceRewritten
	w.stop()
	if n != 8 {
		t.Errorf("%d requests counted, want 8", n)
	}
	text := log.String()
	if !strings.Contains(text, "is not its peer's") || !strings.Contains(text, "169.254.7.127") ||
		!strings.Contains(text, "Pod/default/plain") || strings.Contains(text, "10.91.1.2:") {
		t.Errorf("log:\n%s", text)
	}
}
