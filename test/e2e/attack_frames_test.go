package e2e

import (
	"context"
	"maps"
	"slices"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"ztun/test/lab"
)

// TestAttackFrames: mesh members send frames that serve nothing, as fast as they can, over tunnels to the bystander's
// server: of each kind, on streams that are over and on the connection, and requests that are refused whose answers
// they do not read. Each is cut off for it, and counted.
func TestAttackFrames(t *testing.T) {
	m := newMesh(t, meshOptions{})
	authority := lab.HostPort(m.c.V4(), 9)
	kinds := map[string]func(fr *http2.Framer) error{
		"WINDOW_UPDATE":        func(fr *http2.Framer) error { return fr.WriteWindowUpdate(0, 1) },
		"WINDOW_UPDATE, late":  func(fr *http2.Framer) error { return fr.WriteWindowUpdate(1, 1) },
		"RST_STREAM, late":     func(fr *http2.Framer) error { return fr.WriteRSTStream(1, http2.ErrCodeCancel) },
		"DATA, late":           func(fr *http2.Framer) error { return fr.WriteData(1, false, []byte("x")) },
		"DATA that is padding": func(fr *http2.Framer) error { return fr.WriteDataPadded(3, false, nil, make([]byte, 3)) },
		"PING":                 func(fr *http2.Framer) error { return fr.WritePing(false, [8]byte{1}) },
		"SETTINGS":             func(fr *http2.Framer) error { return fr.WriteSettings() },
		"PRIORITY": func(fr *http2.Framer) error {
			return fr.WritePriority(3, http2.PriorityParam{StreamDep: 5})
		},
		"GOAWAY":                  func(fr *http2.Framer) error { return fr.WriteGoAway(0, http2.ErrCodeNo, nil) },
		"a kind that nobody uses": func(fr *http2.Framer) error { return fr.WriteRawFrame(99, 0, 0, nil) },
	}
	sent, cut := map[string]int{}, map[string]int{}
	names := slices.Sorted(maps.Keys(kinds))
	m.attack(attackOptions{Name: "useless frames", Attack: func(ctx context.Context) {
		paced(ctx, 10, func(i int) bool {
			kind := names[i%len(names)]
			h, err := m.member(m.h1.NS, mesh15008(m.c), "spiffe://cluster.local/ns/default/sa/a")
			if err != nil {
				return true // too many are refused, too
			}
			defer h.close()
			_ = h.connect(1, authority)
			_ = h.reset(1)
			_ = h.connect(3, lab.HostPort(m.c.V4(), 9000))
			sent[kind] += h.flood(ctx, kinds[kind])
			if h.calmed() {
				cut[kind]++
			}
			return true
		})
	}})
	for kind := range kinds {
		if cut[kind] == 0 {
			t.Errorf("%s: %d sent, and nobody was told to calm down", kind, sent[kind])
		}
	}
	t.Logf("sent: %v; connections ended for it: %v", sent, cut)
	metrics, err := m.N2.Daemon.Metrics(m.ctx)
	must(t, err)
	if n := metrics.Sum("ztun_tunnel_calmed_total"); n < float64(len(kinds)) {
		t.Errorf("%v connections counted", n)
	}
}

// TestAttackUnread: members ask for what is refused and read no answer.
func TestAttackUnread(t *testing.T) {
	m := newMesh(t, meshOptions{})
	tunnels, asked := 0, 0
	m.attack(attackOptions{Name: "unread answers", Attack: func(ctx context.Context) {
		paced(ctx, 5, func(int) bool {
			c, err := m.h1.NS.Dial(m.ctx, "tcp", mesh15008(m.c).String())
			if err != nil {
				return true
			}
			h, err := dialH2(t, c, loadCA(t, m.Path("ca")).client(t, "spiffe://cluster.local/ns/default/sa/a"))
			if err != nil {
				return true
			}
			defer h.conn.Close()
			tunnels++
			// Nobody runs h: the socket's buffers fill up, then the server's queue.
			h.conn.SetDeadline(time.Now().Add(3 * time.Second))
			for id := uint32(1); id < 1<<20 && ctx.Err() == nil; id += 2 {
				if h.connect(id, "no.such.service:1") != nil {
					break // cut off, or nobody reads any more
				}
				asked++
			}
			return true
		})
	}})
	t.Logf("%d tunnels, %d requests", tunnels, asked)
	if tunnels < 2 || asked < 1000 {
		t.Errorf("%d tunnels and %d requests are no attack", tunnels, asked)
	}
}
