package xds

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ztun/proxy/state"
)

func sample(t *testing.T) *Local {
	t.Helper()
	data, err := os.ReadFile("testdata/workloads.yaml")
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
	data, err := os.ReadFile("testdata/config_dump-a.json")
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
		Service: state.ServiceKey{Namespace: "shop", Hostname: "not-there.svc"}, Ports: state.PortMap{{Service: 1, Target: 2}},
	})
	l.Workloads = append(l.Workloads, &staged)
	v := l.View("")
	var b bytes.Buffer
	b.WriteString("{\n")
	for i, m := range []struct {
		name  string
		write func(io.Writer, *state.View) error
	}{{"policies", WritePolicies}, {"services", WriteServices}, {"stagedServices", WriteStaged}, {"workloads", WriteWorkloads}} {
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
		"{\n    \"policies\": [],\n    \"services\": [],\n    \"workloads\": []\n  }": func(w io.Writer) error { return WriteStatic(w, nil) },
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

func TestDumpToAClosedConnection(t *testing.T) {
	l := sample(t)
	for n := range 20 {
		if err := WriteStatic(&failing{n}, l); err != io.ErrClosedPipe {
			t.Errorf("after %d writes: %v", n, err)
		}
	}
	if err := WriteWorkloads(&failing{}, l.View("")); err != io.ErrClosedPipe {
		t.Errorf("%v", err)
	}
}
