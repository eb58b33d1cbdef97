package e2e

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"ztun/test/lab"
)

// TestConfigurationTable: the table of docs/configuration.md is the one that the program prints.
func TestConfigurationTable(t *testing.T) {
	root, err := lab.Root()
	must(t, err)
	b, err := os.ReadFile(filepath.Join(root, "docs", "configuration.md"))
	must(t, err)
	page := string(b)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	help, err := exec.CommandContext(ctx, bins.ztun, "proxy", "--help").Output()
	must(t, err)
	squeeze := func(s string) string { return strings.Join(strings.Fields(s), " ") }
	want := map[string]string{}
	for _, l := range strings.Split(string(help), "\n") {
		if m := regexp.MustCompile(`^  ([A-Z][A-Z0-9_]+)\s+(.*)$`).FindStringSubmatch(l); m != nil {
			want[m[1]] = squeeze(m[2])
		}
	}
	if len(want) < 20 {
		t.Fatalf("`ztun proxy --help` prints %d variables", len(want))
	}
	got := map[string]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([A-Z][A-Z0-9_]+)` \\| (.*) \\|$").FindAllStringSubmatch(page, -1) {
		def, help, _ := strings.Cut(m[2], "|")
		got[m[1]] = squeeze(strings.Trim(strings.TrimSpace(def), "`") + " " + help)
	}
	for name, w := range want {
		if got[name] != w {
			t.Errorf("docs/configuration.md says of %s %q, the program %q", name, got[name], w)
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("docs/configuration.md has %s, the program does not", name)
		}
	}
}
