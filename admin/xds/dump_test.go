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
	_ = state.View{}
}
