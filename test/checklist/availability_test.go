package checklist

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestAvailability: every test, file and metric that docs/availability.md names exists.
func TestAvailability(t *testing.T) {
	root := filepath.Join("..", "..")
	read := func(path string) string {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(root, filepath.FromSlash(path)))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	text := read("docs/availability.md")
	known := map[string]map[string]bool{}
	for _, name := range testName.FindAllStringSubmatch(text, -1) {
		dir := name[1]
		if known[dir] == nil {
			known[dir] = functions(t, filepath.Join(root, filepath.FromSlash(dir)))
		}
		if !known[dir][name[2]] {
			t.Errorf("there is no %s", name[0])
		}
	}
	for _, path := range regexp.MustCompile("`((?:[a-z0-9_]+/)+[a-z0-9_.]+)`").FindAllStringSubmatch(text, -1) {
		if _, err := os.Stat(filepath.Join(root, path[1])); err != nil {
			t.Error(err)
		}
	}
	metrics := read("docs/metrics.md")
	for _, m := range regexp.MustCompile(`ztun_[a-z_]+`).FindAllString(text, -1) {
		if !strings.Contains(metrics, "`"+strings.TrimSuffix(m, "_total")+"`") {
			t.Errorf("docs/metrics.md has no %s", m)
		}
	}
}
