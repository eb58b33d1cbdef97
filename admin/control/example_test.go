package control

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// The example that Init writes is published as it is, and with every optional line in it.
func TestExampleLoads(t *testing.T) {
	dir := t.TempDir()
	check(t, Init(dir, "example.org"))
	path := filepath.Join(dir, meshDir, "example.yaml")
	b, err := os.ReadFile(path)
	check(t, err)
	text := string(b)
	if strings.Contains(text, "@") || !strings.Contains(text, "!Exact example.org/ns/shop/sa/front") ||
		strings.Contains(text, "cluster.local/ns") {
		t.Errorf("the trust domain is not in its place:\n%s", text)
	}
	load := func(what string, workloads, services, policies int) SnapshotStatus {
		t.Helper()
		st, err := Check(dir, "")
		check(t, err)
		if st.ErrorCount != 0 || st.WarningCount != 0 || st.Workloads != workloads || st.Services != services ||
			st.Policies != policies {
			t.Errorf("%s: %+v", what, st)
		}
		return st
	}
	load("as it is", 3, 1, 2)
	optional := regexp.MustCompile(`(?m)^( *)# (- )*([a-z][A-Za-z]+): `)
	lines := optional.FindAllString(text, -1)
	if len(lines) < 10 {
		t.Errorf("only %d optional lines", len(lines))
	}
	all := regexp.MustCompile(`(?m)^( *)# ((?:- )*[a-z][A-Za-z]+: )`).ReplaceAllString(text, "$1$2")
	check(t, os.WriteFile(path, []byte(all), 0o644))
	load("with all optional lines", 3, 1, 2)
	// A slip of the pen is named, with what was meant.
	check(t, os.WriteFile(path, []byte(strings.Replace(text, "  serviceAccount: front", "  serviceAcount: front", 1)),
		0o644))
	st, err := Check(dir, "")
	check(t, err)
	if st.ErrorCount != 1 ||
		!strings.Contains(st.Errors[0].String(),
			`example.yaml:15: workloads[0].serviceAcount: unknown key; did you mean "serviceAccount"?`) {
		t.Errorf("%+v", st.Errors)
	}
}
