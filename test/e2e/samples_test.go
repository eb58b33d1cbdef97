package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"regexp"
	"sort"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2/hpack"

	"ztun/test/lab"
	"ztun/test/load"
)

// The samples of docs/samples were taken from a real ztunnel (docs/samples/README.md); these tests hold ztun against
// them.

// sample is one of them. A workload of a file that names no trust domain has none in ztunnel; here it has that of the
// node, as every workload of a control plane has (docs/migrating-from-ztunnel.md).
func sample(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile("../../docs/samples/" + name)
	must(t, err)
	return strings.ReplaceAll(string(b), "spiffe:///ns/", "spiffe://cluster.local/ns/")
}

// sampleWorld is the world in which the samples were taken, as far as isolated pods can be: pod a on n1, pod b on n2
// with a web server on 9000 and something on 7777, the plain workload on n2 itself, which also serves 9000, and
// nobody at 10.91.2.99.
func sampleWorld(t *testing.T, env map[string]string) (w *lab.World, ctx context.Context, a, b *lab.Pod) {
	t.Helper()
	needTool(t, "python3")
	needTool(t, "curl")
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	t.Cleanup(cancel)
	w = lab.ForTest(t, lab.Options{Bin: bins.ztun})
	must(t, w.WriteWorldBytes([]byte(sample(t, "workloads.yaml"))))
	var err error
	a, err = w.AddPod(w.N1, lab.Pod{Name: "a", IPs: []netip.Addr{netip.MustParseAddr("10.91.1.2")}})
	must(t, err)
	b, err = w.AddPod(w.N2, lab.Pod{Name: "b", IPs: []netip.Addr{netip.MustParseAddr("10.91.2.2")}})
	must(t, err)
	env = maps.Clone(env)
	if env == nil {
		env = map[string]string{}
	}
	env["ZTUN_SEND_REASON"] = "false" // ztunnel says nothing to the peer, so its lines have no reason
	for _, n := range w.Nodes() {
		_, err := w.StartDaemon(ctx, n, lab.DaemonOptions{Env: env})
		must(t, err)
	}
	m := &mesh{World: w, t: t, ctx: ctx}
	for _, p := range []*lab.Pod{a, b} {
		must(t, w.Attach(ctx, p))
	}
	www := w.Path("www")
	must(t, os.Mkdir(www, 0o755))
	must(t, os.WriteFile(www+"/index.html", []byte(strings.Repeat("hello\n", 100)), 0o644))
	for _, ns := range []*lab.NS{b.NS, w.N2.NS} {
		m.background(ns, "Serving HTTP", "python3", "-u", "-m", "http.server", "9000", "--directory", www)
	}
	m.background(b.NS, "listening", bins.ztload, "serve", "-listen", ":7777")
	return w, ctx, a, b
}

// field is one key and value of an access line, in order.
type field struct{ key, value string }

// accessLine is what the samples and our logs have in common: everything but the time.
type accessLine struct {
	level, message string
	fields         []field
}

// String is the line with accidents taken out: source ports, byte counts (none or some), times.
func (l accessLine) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s", l.level, l.message)
	for _, f := range l.fields {
		v := f.value
		switch f.key {
		case "src.addr":
			v = regexp.MustCompile(`:\d+("?)$`).ReplaceAllString(v, ":PORT$1")
		case "bytes_sent", "bytes_recv":
			if n, err := strconv.Atoi(v); err == nil && n > 0 {
				v = "SOME"
			}
		case "duration":
			v = regexp.MustCompile(`^"\d+ms"$`).ReplaceAllString(v, "TIME")
		}
		fmt.Fprintf(&b, " %s=%s", f.key, v)
	}
	return b.String()
}

var plainField = regexp.MustCompile(`([a-z_.]+)=("(?:[^"\\]|\\.)*"|[^ ]*)`)

// parseAccess reads the access lines of a log, text or JSON. Values keep their quotes, so that a number and a string
// differ.
func parseAccess(t testing.TB, log string) []accessLine {
	t.Helper()
	var out []accessLine
	sc := bufio.NewScanner(strings.NewReader(log))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		line := sc.Text()
		if strings.HasPrefix(line, "{") {
			if l, ok := parseJSONLine(t, line); ok {
				out = append(out, l)
			}
			continue
		}
		col := strings.Split(line, "\t")
		if len(col) != 5 || col[2] != "access" {
			continue
		}
		if _, err := time.Parse("2006-01-02T15:04:05.000000Z", col[0]); err != nil {
			t.Errorf("time %q: %v", col[0], err)
		}
		l := accessLine{level: col[1], message: col[3]}
		for _, m := range plainField.FindAllStringSubmatch(col[4], -1) {
			l.fields = append(l.fields, field{m[1], m[2]})
		}
		out = append(out, l)
	}
	return out
}

func parseJSONLine(t testing.TB, line string) (accessLine, bool) {
	t.Helper()
	dec := json.NewDecoder(strings.NewReader(line))
	dec.UseNumber()
	var l accessLine
	var order []string
	scope := ""
	if _, err := dec.Token(); err != nil {
		t.Errorf("%v: %s", err, line)
		return l, false
	}
	for dec.More() {
		k, err := dec.Token()
		var v json.RawMessage
		if err == nil {
			err = dec.Decode(&v)
		}
		if err != nil {
			t.Errorf("%v: %s", err, line)
			return l, false
		}
		key := k.(string)
		order = append(order, key)
		switch key {
		case "level":
			l.level = string(v)
		case "time":
			if _, err := time.Parse(`"2006-01-02T15:04:05.000000Z"`, string(v)); err != nil {
				t.Errorf("time %s: %v", v, err)
			}
		case "scope":
			scope = string(v)
		case "message":
			l.message = string(v)
		default:
			l.fields = append(l.fields, field{key, string(v)})
		}
	}
	if scope != `"access"` {
		return l, false
	}
	if got := strings.Join(order[:min(4, len(order))], " "); got != "level time scope message" {
		t.Errorf("keys begin with %s", got)
	}
	return l, true
}

// driveStep is one connection of drive.txt.
type driveStep struct {
	n       int
	name    string
	inA     bool // from pod a, else from node n2 itself
	url     string
	socks   bool // through 127.0.0.1:15080
	success bool
	logA    bool // the source's log has a line
	logB    bool // the destination's log has a line
}

var driveSteps = []driveStep{
	{n: 1, name: "pod to pod, HBONE", inA: true, url: "http://10.91.2.2:9000/", success: true, logA: true, logB: true},
	{n: 2, name: "service VIP", inA: true, url: "http://10.96.0.10/", success: true, logA: true, logB: true},
	{n: 3, name: "service VIP, port with nobody listening", inA: true, url: "http://10.96.0.10:81/", success: false,
		logA: true, logB: true},
	{n: 4, name: "service VIP, unknown port", inA: true, url: "http://10.96.0.10:82/", success: false, logA: true,
		logB: false},
	{n: 5, name: "service without endpoints", inA: true, url: "http://10.96.0.12/", success: false, logA: true,
		logB: false},
	{n: 6, name: "plaintext workload", inA: true, url: "http://10.91.0.2:9000/", success: true, logA: true, logB: false},
	{n: 7, name: "service of a plaintext workload", inA: true, url: "http://10.96.0.11/", success: true, logA: true,
		logB: false},
	{n: 8, name: "pod port with nobody listening", inA: true, url: "http://10.91.2.2:9998/", success: false, logA: true,
		logB: true},
	{n: 9, name: "denied by policy", inA: true, url: "http://10.91.2.2:7777/", success: false, logA: true, logB: true},
	{n: 10, name: "unknown destination on a closed port (node n1)", inA: true, url: "http://10.91.1.1:9000/",
		success: false, logA: true, logB: false},
	{n: 11, name: "mesh pod that does not exist on the wire", inA: true, url: "http://10.91.2.99:9000/", success: false,
		logA: true, logB: false},
	{n: 12, name: "inbound plaintext from outside the mesh", inA: false, url: "http://10.91.2.2:9000/", success: true,
		logA: false, logB: true},
	{n: 13, name: "inbound plaintext, denied port", inA: false, url: "http://10.91.2.2:7777/", success: false, logA: false,
		logB: true},
	{n: 14, name: "direct call to 15008 of a pod from a pod", inA: true, url: "http://10.91.2.2:15008/", success: false,
		logA: true, logB: true},
	{n: 15, name: "SOCKS5 by hostname", inA: true, url: "http://b.default.svc.cluster.local/", socks: true, success: true,
		logA: true, logB: true},
	{n: 16, name: "SOCKS5 by address", inA: true, url: "http://10.91.2.2:9000/", socks: true, success: true, logA: true,
		logB: true},
	{n: 17, name: "own address (hairpin)", inA: true, url: "http://10.91.1.2:9000/", success: false, logA: false,
		logB: false},
}

// TestDriveSamples repeats the connections of drive.txt and compares what the client sees, the access logs of both
// nodes line by line, and the traffic metrics series by series with ztunnel's. Where ztunnel accepts and then resets,
// truthful connect refuses: that is the only difference allowed to the client.
func TestDriveSamples(t *testing.T) {
	for _, format := range []string{"plain", "json"} {
		t.Run(format, func(t *testing.T) {
			w, ctx, a, b := sampleWorld(t, map[string]string{"LOG_FORMAT": format, "UNSTABLE_ENABLE_SOCKS5": "true"})
			_ = b
			wantA, wantB := parseAccess(t, sample(t, "access-a."+format+".log")),
				parseAccess(t, sample(t, "access-b."+format+".log"))
			drive := sample(t, "drive.txt")
			lines := func(n *lab.Node) []accessLine { return parseAccess(t, n.Daemon.Log()) }
			var na, nb int
			for _, s := range driveSteps {
				if !strings.Contains(drive, fmt.Sprintf("## %d %s\n", s.n, s.name)) {
					t.Fatalf("drive.txt has no case %d %s", s.n, s.name)
				}
				ns := w.N2.NS
				args := []string{"curl", "-sS", "-o", "/dev/null", "-m", "30", "-w", "%{http_code}"}
				if s.socks {
					args = append(args, "--socks5-hostname", "127.0.0.1:15080")
				}
				if s.inA {
					ns = a.NS
				} else {
					args = append(args, "--interface", "10.91.2.1")
				}
				out, err := w.Run(ctx, ns, append(args, s.url)...)
				switch {
				case s.success && (err != nil || out != "200"):
					t.Errorf("case %d %s: %q %v", s.n, s.name, out, err)
				case !s.success && lab.ExitCode(err) != 7: // curl: failed to connect. 56 would be ztunnel's "accepted, then reset"
					t.Errorf("case %d %s: %q, exit code %d, want 7 (could not connect): %v", s.n, s.name, out, lab.ExitCode(err), err)
				}
				if s.logA {
					na++
				}
				if s.logB {
					nb++
				}
				// In the log before the next connection, so that order can be compared.
				deadline := time.Now().Add(15 * time.Second)
				for (len(lines(w.N1)) < na || len(lines(w.N2)) < nb) && time.Now().Before(deadline) {
					time.Sleep(20 * time.Millisecond)
				}
			}
			compareLines(t, "access log of node n1", lines(w.N1), wantA)
			compareLines(t, "access log of node n2", lines(w.N2), wantB)
			if format == "plain" {
				compareTraffic(t, ctx, w.N1.Daemon, sample(t, "metrics-a.txt"))
				compareTraffic(t, ctx, w.N2.Daemon, sample(t, "metrics-b.txt"))
			}
		})
	}
}

func compareLines(t *testing.T, what string, got, want []accessLine) {
	t.Helper()
	for i := range max(len(got), len(want)) {
		var g, w string
		if i < len(got) {
			g = got[i].String()
		}
		if i < len(want) {
			w = want[i].String()
		}
		if g != w {
			t.Errorf("%s, line %d:\n got %s\nwant %s", what, i+1, g, w)
		}
	}
}

// compareTraffic compares the istio_tcp_* series of a daemon with a sample: names, labels and their order, and the
// counts of connections; of bytes only whether there were any.
func compareTraffic(t *testing.T, ctx context.Context, d *lab.Daemon, text string) {
	t.Helper()
	want, err := lab.ParseMetrics(text)
	must(t, err)
	pick := func(m *lab.Metrics) map[string]float64 {
		out := map[string]float64{}
		for _, s := range m.Series {
			if strings.HasPrefix(s.Name, "istio_tcp_") && s.Name != "istio_tcp_sockets_open" {
				out[s.String()] = s.Value
			}
		}
		return out
	}
	expected := pick(want)
	var faults []string
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		m, err := d.Metrics(ctx)
		must(t, err)
		got := pick(m)
		faults = nil
		for name, w := range expected {
			g, ok := got[name]
			bytes := strings.Contains(name, "_bytes_total")
			switch {
			case !ok:
				faults = append(faults, "missing: "+name)
			case bytes && (g > 0) != (w > 0) || !bytes && g != w:
				faults = append(faults, fmt.Sprintf("%v, want %v: %s", g, w, name))
			}
		}
		for name, g := range got {
			if _, ok := expected[name]; !ok {
				faults = append(faults, fmt.Sprintf("unexpected (%v): %s", g, name))
			}
		}
		for name, typ := range want.Types {
			if (strings.HasPrefix(name, "istio_tcp_") || name == "istio_build") && m.Types[name] != typ &&
				!(m.Types[name] == "" && typ == "gauge") {
				faults = append(faults, fmt.Sprintf("TYPE %s is %q, want %q", name, m.Types[name], typ))
			}
		}
		if len(faults) == 0 || time.Now().After(deadline) {
			break
		}
	}
	sort.Strings(faults)
	if len(faults) > 0 {
		t.Errorf("metrics of %s:\n%s", d.Node.Name, strings.Join(faults, "\n"))
	}
}

// answer is a session of inbound-answers.txt.
type answer struct {
	title   string
	streams []uint32
	fields  map[uint32][]hpack.HeaderField
	frames  map[uint32][]string // as h2Client writes them down
	tls     string              // the line about the handshake
	end     string              // how the connection ended
}

var headerField = regexp.MustCompile(`header field "((?:[^"\\]|\\.)*)" = "((?:[^"\\]|\\.)*)"`)

func parseAnswers(t *testing.T, text string) []answer {
	t.Helper()
	var out []answer
	var cur *answer
	var stream uint32
	add := func(s string) {
		fs := cur.frames[stream]
		fs[len(fs)-1] += s
	}
	for _, line := range strings.Split(text, "\n") {
		switch {
		case strings.HasPrefix(line, "## "):
			out = append(out, answer{title: line[3:], fields: map[uint32][]hpack.HeaderField{}, frames: map[uint32][]string{}})
			cur = &out[len(out)-1]
		case strings.HasPrefix(line, "tls "):
			cur.tls = line
		case strings.HasPrefix(line, "handshake: "):
			cur.end = strings.TrimPrefix(line, "handshake: ")
		case strings.HasPrefix(line, ">> stream "):
			var id uint32
			_, err := fmt.Sscanf(line, ">> stream %d", &id)
			must(t, err)
			cur.streams = append(cur.streams, id)
			for _, m := range headerField.FindAllStringSubmatch(line, -1) {
				v, err := strconv.Unquote(`"` + m[2] + `"`)
				must(t, err)
				cur.fields[id] = append(cur.fields[id], hpack.HeaderField{Name: m[1], Value: v})
			}
		case strings.HasPrefix(line, "<< end: "):
			cur.end = line[8:]
		case strings.HasPrefix(line, "<< [FrameHeader "):
			stream = 0
			if i := strings.Index(line, "stream="); i >= 0 {
				_, err := fmt.Sscanf(line[i:], "stream=%d", &stream)
				must(t, err)
			}
			typ := strings.Fields(line)[2]
			if strings.Contains(line, "flags=ACK") {
				typ += " ACK"
			}
			if strings.Contains(line, "END_STREAM") {
				typ += " END_STREAM"
			}
			cur.frames[stream] = append(cur.frames[stream], strings.TrimSuffix(typ, "]"))
		case strings.HasPrefix(line, "      ["):
			k, v, _ := strings.Cut(strings.Trim(line, " []"), " = ")
			add(" " + k + "=" + v)
		case strings.HasPrefix(line, "      + "):
			add(" +" + line[8:])
		case strings.HasPrefix(line, "      "):
			k, v, ok := strings.Cut(strings.TrimSpace(line), " = ")
			if ok {
				add(" " + k + "=" + v)
			} else {
				add(" " + strings.TrimSpace(line))
			}
		}
	}
	return out
}

// otherAlert is where our TLS alert may differ from ztunnel's: crypto/tls has one alert (bad_certificate) for every
// refusal by the program itself, rustls says certificate_unknown. Both end the connection before any HTTP/2.
var otherAlert = map[string]string{
	"other trust domain":       "remote error: tls: bad certificate",
	"SAN that is no SPIFFE id": "remote error: tls: bad certificate",
}

// TestInboundAnswers repeats every session of inbound-answers.txt against the running daemon: the same statuses,
// stream resets, SETTINGS and TLS refusals.
func TestInboundAnswers(t *testing.T) {
	w, ctx, _, _ := sampleWorld(t, nil)
	ca := loadCA(t, w.Path("ca"))
	const good = "spiffe://cluster.local/ns/default/sa/a"
	for _, s := range parseAnswers(t, sample(t, "inbound-answers.txt")) {
		t.Run(strings.ReplaceAll(s.title, " ", "-"), func(t *testing.T) {
			conf := ca.client(t, good)
			switch s.title {
			case "no client certificate":
				conf = ca.client(t, "")
			case "other trust domain":
				conf = ca.client(t, "spiffe://other.domain/ns/default/sa/a")
			case "SAN that is no SPIFFE id":
				conf = ca.client(t, "https://example.com/a")
			case "TLS 1.2":
				conf.MinVersion, conf.MaxVersion = 0x0303, 0x0303
			case "no ALPN":
				conf.NextProtos = nil
			case "ALPN http/1.1":
				conf.NextProtos = []string{"http/1.1"}
			}
			c, err := w.N1.NS.Dial(ctx, "tcp", "10.91.2.2:15008")
			must(t, err)
			h, err := dialH2(t, c, conf)
			if s.tls == "" {
				if err == nil {
					t.Fatal("the handshake succeeded")
				}
				if err.Error() != s.end {
					t.Errorf("handshake: %q, want %q", err, s.end)
				}
				return
			}
			must(t, err)
			go h.run()
			defer h.close()
			cs := h.conn.ConnectionState()
			if got := fmt.Sprintf("tls %x TLS_AES_128_GCM_SHA256 %v alpn=%q peer %v", cs.Version, cs.CurveID,
				cs.NegotiatedProtocol, cs.PeerCertificates[0].URIs); got != s.tls {
				t.Errorf("handshake:\n got %s\nwant %s", got, s.tls)
			}
			refusal := !strings.HasSuffix(s.end, "i/o timeout")
			for _, id := range s.streams {
				if err := h.headers(id, s.fields[id]...); err != nil && !refusal {
					t.Fatal(err)
				}
			}
			want := map[uint32]string{}
			for id, frames := range s.frames {
				want[id] = strings.Join(frames, " | ")
			}
			var faults []string
			for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
				faults = nil
				for id := range want {
					frames, _ := h.of(id)
					got := strings.Join(frames, " | ")
					if id == 0 { // the order of the three frames of the connection is an accident of the sample's run
						sort.Strings(frames)
						ws := append([]string(nil), s.frames[0]...)
						sort.Strings(ws)
						got, want[0] = strings.Join(frames, " | "), strings.Join(ws, " | ")
					}
					if got != want[id] {
						faults = append(faults, fmt.Sprintf("stream %d:\n got %s\nwant %s", id, got, want[id]))
					}
				}
				_, end := h.of(0)
				if refusal && (end == nil || end.Error() != s.end && end.Error() != otherAlert[s.title]) {
					faults = append(faults, fmt.Sprintf("the connection ended with %v, want %s", end, s.end))
				}
				if !refusal && end != nil {
					faults = append(faults, fmt.Sprintf("the connection ended with %v, want it open", end))
				}
				if len(faults) == 0 || time.Now().After(deadline) {
					break
				}
			}
			for _, f := range faults {
				t.Error(f)
			}
		})
	}
}

// TestAdminSamples repeats the requests of admin-http.txt: the same statuses, content types, lengths and bodies, but
// for a line of help where ztunnel's 404 has none.
func TestAdminSamples(t *testing.T) {
	w, ctx, _, _ := sampleWorld(t, nil)
	for _, block := range strings.Split(sample(t, "admin-http.txt"), "### ")[1:] {
		head, rest, _ := strings.Cut(block, "\n")
		t.Run(strings.ReplaceAll(head, " ", "-"), func(t *testing.T) {
			port := lab.AdminPort
			f := strings.Fields(head)
			if n, err := strconv.Atoi(f[0]); err == nil {
				port, f = n, f[1:]
			}
			resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(strings.ReplaceAll(rest, "\n", "\r\n"))), nil)
			must(t, err)
			req, err := http.NewRequestWithContext(ctx, f[0], fmt.Sprintf("http://127.0.0.1:%d%s", port, f[1]), nil)
			must(t, err)
			got, err := w.N1.NS.HTTP(10 * time.Second).Do(req)
			must(t, err)
			defer got.Body.Close()
			var body bytes.Buffer
			_, err = body.ReadFrom(got.Body)
			must(t, err)
			_, want, _ := strings.Cut(rest, "\n\n")
			want = strings.TrimSuffix(want, "\n")
			if resp.StatusCode == 404 && want == "" {
				if h := got.Header.Get("Content-Type"); got.StatusCode != 404 || h != "text/plain" ||
					!strings.HasPrefix(body.String(), `no path "`) {
					t.Errorf("%d %q %q, want 404 and help", got.StatusCode, h, &body)
				}
				return
			}
			if got.StatusCode != resp.StatusCode || got.Header.Get("Content-Type") != resp.Header.Get("Content-Type") {
				t.Errorf("%d %q, want %d %q", got.StatusCode, got.Header.Get("Content-Type"), resp.StatusCode,
					resp.Header.Get("Content-Type"))
			}
			if strings.Contains(want, "(then a usage text)") {
				want, _, _ = strings.Cut(want, " (then")
				if !strings.HasPrefix(body.String(), want) {
					t.Errorf("body %q, want it to begin with %q", &body, want)
				}
				return
			}
			if strings.TrimSuffix(body.String(), "\n") != strings.TrimSuffix(want, "\n") {
				t.Errorf("body %q, want %q", &body, want)
			}
		})
	}
	// And nothing was harmed.
	if r := load.DialOnce(ctx, load.Target{Addr: fmt.Sprintf("127.0.0.1:%d", lab.ReadyPort), Dial: w.N1.NS.Dial}); !r.OK {
		t.Errorf("%+v", r)
	}
}
