package main

import (
	"bytes"
	"context"
	"encoding/json"
	"iter"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"ztun/admin"
)

// fakePods is a PodManager for the commands that list.
type fakePods struct {
	mu   sync.Mutex
	pods []admin.PodStatus
}

func (f *fakePods) Add(context.Context, admin.PodSpec) error     { return admin.ErrPodUnavailable }
func (f *fakePods) Delete(context.Context, string, string) error { return admin.ErrPodUnavailable }
func (f *fakePods) DeleteUID(context.Context, string) error      { return admin.ErrPodUnavailable }
func (f *fakePods) List() []admin.PodStatus {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.pods
}

func (f *fakePods) set(pods ...admin.PodStatus) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pods = pods
}

// fakeDaemon serves a control socket and returns its path.
func fakeDaemon(t *testing.T, o admin.PodSocketOptions) string {
	t.Helper()
	o.Path = filepath.Join(t.TempDir(), "ztun.sock")
	s, err := admin.NewPodSocket(o)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { s.Serve() })
	t.Cleanup(func() { s.Close(); wg.Wait() })
	return o.Path
}

func pastFlow(at time.Time, more func(*admin.Connection)) admin.Connection {
	c := admin.Connection{
		Pod: "default/a", Direction: "outbound", Protocol: "HBONE", State: "ended", Start: at,
		End: at.Add(1500 * time.Millisecond), Outcome: "success", Flag: "-",
		Source: admin.Side{Address: netip.MustParseAddrPort("10.1.0.2:4000"), Workload: "a", Namespace: "default",
			Identity: "spiffe://cluster.local/ns/default/sa/a"},
		Destination: admin.Side{Address: netip.MustParseAddrPort("10.2.0.2:15008"), Workload: "c", Namespace: "default",
			Identity: "spiffe://cluster.local/ns/default/sa/c"},
		Called: netip.MustParseAddrPort("10.96.0.1:80"), Service: "c.default.svc.cluster.local",
		Authority: "10.2.0.2:8080", Sent: 1234, Received: 5 << 20,
	}
	if more != nil {
		more(&c)
	}
	return c
}

func of(all ...admin.Connection) iter.Seq[admin.Connection] {
	return func(yield func(admin.Connection) bool) {
		for _, c := range all {
			if !yield(c) {
				return
			}
		}
	}
}

// TestConnectionCommands compares what `ztun connections` and `ztun flows` show, in each format.
func TestConnectionCommands(t *testing.T) {
	at := time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)
	denied := pastFlow(at.Add(time.Second), func(c *admin.Connection) {
		c.Direction, c.Protocol, c.Outcome, c.Flag, c.Sent, c.Received = "passthrough", "TCP", "denied", "DENY", 0, 0
		c.Source = admin.Side{Address: netip.MustParseAddrPort("192.0.2.9:4000")}
		c.Destination = admin.Side{Address: netip.MustParseAddrPort("10.1.0.2:8080"), Workload: "a", Namespace: "default"}
		c.Called, c.Service, c.Authority = netip.AddrPort{}, "", ""
		c.Reason = "policy \x1b[31mred\x1b[0m"
	})
	live := pastFlow(time.Now().Add(-3*time.Hour-2*time.Minute-time.Second), func(c *admin.Connection) {
		c.State, c.End, c.Outcome, c.Flag = "open", time.Time{}, "", ""
		c.Tunnel = admin.Tunnel{Local: netip.MustParseAddrPort("10.1.0.2:33001"),
			Remote: netip.MustParseAddrPort("10.2.0.2:15008")}
	})
	socket := fakeDaemon(t, admin.PodSocketOptions{Pods: &fakePods{}, Connections: admin.ConnectionSource{Live: of(live),
		Ended: of(pastFlow(at, nil), denied)}})
	local := strings.NewReplacer("12:00:01.500", at.Add(1500*time.Millisecond).Local().Format("15:04:05.000"),
		"12:00:02.500", at.Add(2500*time.Millisecond).Local().Format("15:04:05.000"))
	for _, c := range []struct{ args, want string }{
		{"connections", `
POD        DIRECTION  PROTOCOL  STATE  SOURCE         DESTINATION   FROM       TO         SENT   RECEIVED  AGE   TUNNEL
default/a  outbound   HBONE     open   10.1.0.2:4000  10.96.0.1:80  default/a  default/c  1.2Ki  5.0Mi     3h2m  10.1.0.2:33001-10.2.0.2:15008
`},
		{"flows", `
END           POD        DIRECTION    PROTOCOL  SOURCE          DESTINATION    FROM       TO           SENT   RECEIVED  TOOK  OUTCOME  REASON
12:00:01.500  default/a  outbound     HBONE     10.1.0.2:4000   10.96.0.1:80   default/a  default/c    1.2Ki  5.0Mi     1.5s  success  -
12:00:02.500  default/a  passthrough  TCP       192.0.2.9:4000  10.1.0.2:8080  -          (default/a)  0      0         1.5s  denied   policy ?[31mred?[0m
`},
		{"flows --outcome denied -o wide", `
END           POD        DIRECTION    PROTOCOL  SOURCE          DESTINATION    FROM  TO           SENT  RECEIVED  TOOK  OUTCOME  REASON               TUNNEL  SERVICE  ENDPOINT       AUTHORITY  SOURCE-IDENTITY  DESTINATION-IDENTITY  FLAG
12:00:02.500  default/a  passthrough  TCP       192.0.2.9:4000  10.1.0.2:8080  -     (default/a)  0     0         1.5s  denied   policy ?[31mred?[0m  -       -        10.1.0.2:8080  -          -                -                     DENY
`},
		{"flows --peer default/c -o yaml", `
connections:
  - pod: default/a
    direction: outbound
    protocol: HBONE
    state: ended
    source:
      address: 10.1.0.2:4000
      workload: a
      namespace: default
      identity: spiffe://cluster.local/ns/default/sa/a
    destination:
      address: 10.2.0.2:15008
      workload: c
      namespace: default
      identity: spiffe://cluster.local/ns/default/sa/c
    called: 10.96.0.1:80
    service: c.default.svc.cluster.local
    authority: 10.2.0.2:8080
    bytesSent: 1234
    bytesReceived: 5242880
    start: "2026-11-28T12:00:00Z"
    end: "2026-11-28T12:00:01.5Z"
    outcome: success
    flag: '-'
total: 1
`},
	} {
		got, err := run(t, append(strings.Fields(c.args), "--socket", socket)...)
		if err != nil || trimmed(got) != trimmed(local.Replace(c.want)) {
			t.Errorf("%s: %v\n%s\nwant:%s", c.args, err, got, c.want)
		}
	}
	got, err := run(t, "connections", "-o", "json", "--socket", socket)
	var l admin.Connections
	if err != nil || json.Unmarshal([]byte(got), &l) != nil || l.Total != 1 || l.Connections[0].Tunnel != live.Tunnel ||
		l.Connections[0].Sent != 1234 {
		t.Errorf("connections -o json: %v\n%s", err, got)
	}
	for args, want := range map[string]string{
		"connections -o xml":          "choose table, wide, json or yaml",
		"connections --sort size":     "choose age, bytes, peer, pod, received, sent",
		"flows --outcome fine":        "choose success, denied, failed, cut, bad",
		"connections --limit 9999999": "between 1 and 5000",
		"connections a":               "takes no argument",
	} {
		if out, err := run(t, append(strings.Fields(args), "--socket", socket)...); err == nil ||
			!strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v %s, want %q", args, err, out, want)
		}
	}
}

// trimmed is text whose lines end with no blanks.
func trimmed(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	for i := range lines {
		lines[i] = strings.TrimRight(lines[i], " ")
	}
	return strings.Join(lines, "\n")
}

// TestWatch: what is followed is shown once, then what changes of it, and what goes.
func TestWatch(t *testing.T) {
	pods := &fakePods{}
	pod := func(name string, inbound int) admin.PodStatus {
		return admin.PodStatus{PodSpec: admin.PodSpec{Name: name, Namespace: "default"}, State: "Up",
			Connections: admin.PodConnections{Inbound: inbound}}
	}
	rounds := [][]admin.PodStatus{{pod("a", 0), pod("b", 0)}, {pod("a", 0), pod("b", 0)}, {pod("a", 7), pod("b", 0)},
		{pod("b", 0)}}
	ctx, cancel := context.WithCancel(t.Context())
	round := 0
	var out bytes.Buffer
	w := watching[admin.PodStatus]{
		out: &out, o: &output{outputTable}, columns: podColumns[:3], every: time.Millisecond,
		fetch: func(context.Context) ([]admin.PodStatus, error) {
			if round == len(rounds) {
				cancel()
				return nil, context.Canceled
			}
			pods.set(rounds[round]...)
			round++
			return pods.List(), nil
		},
		key:  func(p admin.PodStatus) string { return p.Name },
		text: func(p admin.PodStatus) string { return p.State + string(rune('0'+p.Connections.Inbound)) },
		gone: func(p admin.PodStatus) admin.PodStatus { p.State = "Gone"; return p },
	}
	if err := w.run(ctx, true, nil); err != nil {
		t.Fatal(err)
	}
	want :=
		"NAMESPACE  NAME  STATE\ndefault    a     Up\ndefault    b     Up\ndefault    a     Up\ndefault    a     Gone\n"
	if out.String() != want {
		t.Errorf("shown:\n%swant:\n%s", out.String(), want)
	}
}
