package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestMutate: of a small package, what its test looks at is noticed, what it does not look at survives, and the source
// stays as it is.
func TestMutate(t *testing.T) {
	dir := t.TempDir()
	const code = `package p

func watched(a, b int) bool { return a < b }

func unwatched(a, b int) bool { return a > b }

func hangs(n int) (sum int) {
	for n > 0 {
		n--
		sum++
	}
	return sum
}
`
	for name, text := range map[string]string{
		"go.mod": "module p\n\ngo 1.21\n",
		"p.go":   code,
		"p_test.go": `package p

import "testing"

func Test(t *testing.T) {
	if watched(1, 1) || !watched(1, 2) || hangs(3) != 3 || hangs(1) != 1 || hangs(0) != 0 {
		t.Fail()
	}
	_ = unwatched(1, 1)
}
`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("GOFLAGS", "-mod=mod")
	var out bytes.Buffer
	survivors, err := run(t.Context(), options{packages: []string{"."}, n: 100, seed: 1, timeout: 2 * time.Second,
		parallel: 1, dir: dir, out: &out})
	if err != nil {
		t.Fatal(err)
	}
	if survivors != 1 || !strings.Contains(out.String(), "p.go:5: > -> >=") {
		t.Errorf("%d survivors:\n%s", survivors, out.String())
	}
	if got, err := os.ReadFile(filepath.Join(dir, "p.go")); err != nil || string(got) != code {
		t.Error("the source was touched", err)
	}
}
