package docs

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// firstPage is how many lines README.md may have: what is longer is not read.
const firstPage = 250

// TestReadme: README.md is a first page, and every path that it names exists. It is here and not among the end-to-end
// tests so that `scripts/check quick` says it within seconds.
func TestReadme(t *testing.T) {
	b, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(b), "\n"); n > firstPage {
		t.Errorf("README.md has %d lines; %d are enough for a first page", n, firstPage)
	}
	paths := regexp.MustCompile("`((?:cmd|tun|netstack|proxy|admin|test|scripts|\\.ci)/?[a-z0-9/._-]*)").
		FindAllStringSubmatch(string(b), -1)
	if len(paths) < 20 {
		t.Errorf("README.md names %d paths; the expression that finds them is wrong", len(paths))
	}
	for _, m := range paths {
		if _, err := os.Stat(filepath.Join(root, m[1])); err != nil {
			t.Errorf("README.md names %s: %v", m[1], err)
		}
	}
}
