package xds

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ztun/proxy/state"
)

func sample(t *testing.T) *Local {
	t.Helper()
	data, err := os.ReadFile("../../docs/samples/workloads.yaml")
	if err != nil {
		t.Fatal(err)
	}
	l, err := ParseLocal(data)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// The sections of a real ztunnel's dump of the same world, byte for byte.
func TestDumpAgainstZtunnel(t *testing.T) {
	data, err := os.ReadFile("../../docs/samples/config_dump-a.json")
	if err != nil {
		t.Fatal(err)
	}
	var want map[string]json.RawMessage
	if err := json.Unmarshal(data, &want); err != nil {
		t.Fatal(err)
	}
	l := sample(t)
	v := l.View("n1")
	for name, write := range map[string]func(io.Writer) error{
		"workloads":      func(w io.Writer) error { return WriteWorkloads(w, v) },
		"services":       func(w io.Writer) error { return WriteServices(w, v) },
		"policies":       func(w io.Writer) error { return WritePolicies(w, v) },
		"stagedServices": func(w io.Writer) error { return WriteStaged(w, v) },
		"staticConfig":   func(w io.Writer) error { return WriteStatic(w, l) },
	} {
		var got bytes.Buffer
		if err := write(&got); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want[name]), got.String()); diff != "" {
			t.Errorf("%s (-ztunnel +ztun):\n%s", name, diff)
		}
	}
}

// What the sample world has none of: workloads that list their services,
// staged endpoints, gateways, ranges, balancing.
func TestDumpFull(t *testing.T) {
	data, err := os.ReadFile("testdata/full.yaml")
	if err != nil {
		t.Fatal(err)
	}
	l := parse(t, string(data))
	staged := *l.Workloads[0]
	staged.UID, staged.Unlisted = "a-listed", false
	staged.Services = append(staged.Services, state.WorkloadService{
		Service: state.ServiceKey{Namespace: "shop", Hostname: "not-there.svc"},
		Ports:   state.PortMap{{Service: 1, Target: 2}},
	})
	l.Workloads = append(l.Workloads, &staged)
	v := l.View("")
	var b bytes.Buffer
	b.WriteString("{\n")
	for i, m := range []struct {
		name  string
		write func(io.Writer, *state.View) error
	}{{"policies", WritePolicies}, {"services", WriteServices}, {"stagedServices", WriteStaged},
		{"workloads", WriteWorkloads}} {
		if i > 0 {
			b.WriteString(",\n")
		}
		b.WriteString("  \"" + m.name + "\": ")
		if err := m.write(&b, v); err != nil {
			t.Fatal(err)
		}
	}
	b.WriteString("\n}\n")
	if !json.Valid(b.Bytes()) {
		t.Error("not JSON")
	}
	golden(t, "testdata/full.dump.json", b.Bytes())
}

func TestDumpEmpty(t *testing.T) {
	for want, write := range map[string]func(io.Writer) error{
		"[]": func(w io.Writer) error { return WriteWorkloads(w, nil) },
		"{}": func(w io.Writer) error { return WriteStaged(w, nil) },
		"{\n    \"policies\": [],\n    \"services\": [],\n    \"workloads\": []\n  }": func(w io.Writer) error {
			return WriteStatic(w, nil)
		},
	} {
		var b bytes.Buffer
		if err := write(&b); err != nil || b.String() != want {
			t.Errorf("%v\n%s\nwant\n%s", err, b.String(), want)
		}
	}
}

// failing fails from the n-th write on.
type failing struct{ n int }

func (f *failing) Write(b []byte) (int, error) {
	if f.n--; f.n < 0 {
		return 0, io.ErrClosedPipe
	}
	return len(b), nil
}

// many is a mesh of n workloads and n/10 services with ten endpoints each.
func many(n int) *Local {
	l := &Local{}
	for i := range n / 10 {
		l.Services = append(l.Services, &state.Service{
			Name: fmt.Sprintf("svc-%d", i), Namespace: fmt.Sprintf("ns-%d", i%100),
			Hostname: fmt.Sprintf("svc-%d.ns-%d.svc.cluster.local", i, i%100),
			VIPs:     []state.NetworkAddress{{Addr: netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)})}},
			Ports:    state.PortMap{{Service: 80, Target: 8080}, {Service: 443, Target: 8443}},
		})
	}
	for i := range n {
		s := l.Services[(i/10)%len(l.Services)]
		l.Workloads = append(l.Workloads, &state.Workload{
			UID: fmt.Sprintf("Kubernetes//Pod/%s/pod-%06d", s.Namespace, i), Name: fmt.Sprintf("pod-%06d", i),
			Namespace:   s.Namespace,
			TrustDomain: "cluster.local", ServiceAccount: "default", WorkloadName: s.Name, WorkloadType: "deployment",
			CanonicalName:     s.Name,
			CanonicalRevision: "latest", Node: fmt.Sprintf("node-%d", i%500), ClusterID: "Kubernetes", Capacity: 1,
			Protocol:  state.HBONE,
			Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})},
			Services:  []state.WorkloadService{{Service: s.Key(), Ports: s.Ports}},
		})
	}
	return l
}

// TestDumpToAClosedConnection: the error of the connection comes back, from wherever it strikes, and ends the work.
func TestDumpToAClosedConnection(t *testing.T) {
	l := many(2000)
	v := l.View("")
	for n := range 20 {
		for name, write := range map[string]func(io.Writer) error{
			"static":    func(w io.Writer) error { return WriteStatic(w, l) },
			"workloads": func(w io.Writer) error { return WriteWorkloads(w, v) },
			"services":  func(w io.Writer) error { return WriteServices(w, v) },
		} {
			f := &failing{n: n}
			if err := write(f); err != io.ErrClosedPipe {
				t.Errorf("%s after %d writes: %v", name, n, err)
			}
			if f.n != -1 {
				t.Errorf("%s went on for %d writes after the first that failed", name, -1-f.n)
			}
		}
	}
}

// TestDumpIsJSON: what is written with indentation is what encoding/json makes of the same.
func TestDumpIsJSON(t *testing.T) {
	v := many(500).View("")
	var got, want bytes.Buffer
	if err := WriteWorkloads(&got, v); err != nil {
		t.Fatal(err)
	}
	if err := json.Indent(&want, got.Bytes(), "  ", "  "); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want.String(), got.String()); diff != "" {
		t.Error(diff)
	}
	var l []map[string]any
	if err := json.Unmarshal(got.Bytes(), &l); err != nil || len(l) != 500 {
		t.Fatal(len(l), err)
	}
}

func TestDumpEscapes(t *testing.T) {
	for in, want := range map[string]string{
		"": `""`, "plain": `"plain"`, "a\"b\\c": `"a\"b\\c"`, "<&>/": `"<&>/"`,
		"\n\r\t\b\f\x01\x1f\x7f": `"\n\r\t\b\f\u0001\u001f\u007f"`,
		"grün \u2028 \U0001F600": "\"grün \\u2028 \U0001F600\"", "\xffa\xc3": "\"\uFFFDa\uFFFD\"",
	} {
		j := newJSONWriter(nil, 0)
		j.text(in)
		if string(j.b) != want {
			t.Errorf("%q: %s, want %s", in, j.b, want)
		}
		var back string
		if err := json.Unmarshal(j.b, &back); err != nil || back != strings.ToValidUTF8(in, "\uFFFD") {
			t.Errorf("%q: %q %v", in, back, err)
		}
	}
}

func TestDumpPortOrder(t *testing.T) {
	j := newJSONWriter(nil, 0)
	j.ports(state.PortMap{{Service: 8, Target: 1}, {Service: 80, Target: 2}, {Service: 443, Target: 3},
		{Service: 9, Target: 4}, {Service: 800, Target: 5},
		{Service: 65535, Target: 6}, {Service: 10, Target: 7}, {Service: 1, Target: 8}, {Service: 100, Target: 9},
		{Service: 11, Target: 10}})
	var b bytes.Buffer
	if err := json.Compact(&b, j.b); err != nil {
		t.Fatal(err)
	}
	if want := `{"1":8,"10":7,"100":9,"11":10,"443":3,"65535":6,"8":1,"80":2,"800":5,"9":4}`; b.String() != want {
		t.Errorf("%s", &b)
	}
}

// TestDumpAllocations: a dump makes no garbage per entry, or the collector would run at the connections' expense.
func TestDumpAllocations(t *testing.T) {
	const n = 5000
	v := many(n).View("")
	for name, write := range map[string]func(io.Writer, *state.View) error{"workloads": WriteWorkloads,
		"services": WriteServices} {
		if got := testing.AllocsPerRun(5, func() { write(io.Discard, v) }); got > 50 {
			t.Errorf("%s: %v allocations for %d entries", name, got, n)
		}
	}
}

// TestStatic: the file is shown as it is now, and is not read again while it looks as it did.
func TestStatic(t *testing.T) {
	f := &File{Path: filepath.Join(t.TempDir(), "world.yaml")}
	put := func(text string) {
		t.Helper()
		if err := os.WriteFile(f.Path+".new", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(f.Path+".new", f.Path); err != nil {
			t.Fatal(err)
		}
	}
	s := NewStatic(f)
	policies := func() (names []string) {
		t.Helper()
		var b bytes.Buffer
		if err := s.Write(&b); err != nil {
			t.Fatal(err)
		}
		var got struct{ Policies []struct{ Name string } }
		if err := json.Unmarshal(b.Bytes(), &got); err != nil {
			t.Fatal(err)
		}
		for _, p := range got.Policies {
			names = append(names, p.Name)
		}
		return names
	}
	file := func(name string) string {
		return "policies:\n- {name: " + name + ", namespace: x, scope: Global, action: Allow, rules: [], dryRun: false}\n"
	}
	if got := policies(); got != nil {
		t.Errorf("without a file: %v", got)
	}
	put(file("one"))
	if got := policies(); !slices.Equal(got, []string{"one"}) {
		t.Errorf("read at the moment of the dump: %v", got)
	}
	l, err := f.Load()
	if err != nil {
		t.Fatal(err)
	}
	l.Policies[0].Name = "kept" // to tell it from what a second reading would give
	s.Keep(l)
	if got := policies(); !slices.Equal(got, []string{"kept"}) {
		t.Errorf("the file was read again: %v", got)
	}
	put(file("two") + "# more\n")
	if got := policies(); !slices.Equal(got, []string{"two"}) {
		t.Errorf("after a change: %v", got)
	}
	put("policies: [")
	if got := policies(); got != nil {
		t.Errorf("of a broken file: %v", got)
	}
	s.Keep(nil)
	if got := policies(); got != nil {
		t.Errorf("of a file known to be broken: %v", got)
	}
	if err := os.Remove(f.Path); err != nil {
		t.Fatal(err)
	}
	if got := policies(); got != nil {
		t.Errorf("of a file that has gone: %v", got)
	}
	inline := NewStatic(&File{Inline: file("inline")})
	s = inline
	if got := policies(); !slices.Equal(got, []string{"inline"}) {
		t.Errorf("inline: %v", got)
	}
	inline.Keep(l)
	if got := policies(); !slices.Equal(got, []string{"kept"}) {
		t.Errorf("inline, read again: %v", got)
	}
}

func BenchmarkDump(b *testing.B) {
	v := many(100_000).View("")
	for _, m := range []struct {
		name  string
		write func(io.Writer, *state.View) error
	}{{"workloads", WriteWorkloads}, {"services", WriteServices}} {
		b.Run(m.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				var c counter
				m.write(&c, v)
				b.SetBytes(int64(c))
			}
		})
	}
	b.Run("sorting", func(b *testing.B) {
		for b.Loop() {
			v.Workloads()
		}
	})
}

type counter int64

func (c *counter) Write(b []byte) (int, error) { *c += counter(len(b)); return len(b), nil }
