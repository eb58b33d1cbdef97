package docs

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	// `name` (`dir/file.go` ...) and `name` in `dir/file.go`, as docs/ARCHITECTURE.md says where something is.
	declared = regexp.MustCompile("`([A-Za-z_.]+)`(?:, `[A-Za-z_.]+`)* (?:in |\\()`([a-z][a-zA-Z0-9_./-]*\\.go)`")
	named    = regexp.MustCompile("`((?:admin|cmd|netstack|proxy|scripts|test|tun)/[a-zA-Z0-9_./-]+)`")
)

// What the page on the inside says is in a file is declared there, and the files and folders that it names exist: a
// newcomer who follows it arrives.
func TestArchitecture(t *testing.T) {
	b, err := os.ReadFile(filepath.Join(root, "docs/ARCHITECTURE.md"))
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for n, line := range strings.Split(string(b), "\n") {
		for _, m := range named.FindAllStringSubmatch(line, -1) {
			if _, err := os.Stat(filepath.Join(root, m[1])); err != nil {
				t.Errorf("line %d: %v", n+1, err)
			}
		}
		for _, m := range declared.FindAllStringSubmatch(line, -1) {
			source, err := os.ReadFile(filepath.Join(root, m[2]))
			if err != nil {
				t.Errorf("line %d: %v", n+1, err)
				continue
			}
			found++
			name := regexp.QuoteMeta(m[1][strings.LastIndex(m[1], ".")+1:])
			// A function, a method, a type, a variable, or a field.
			there := regexp.MustCompile(`(?m)^(?:func (?:\([^)]*\) )?|type |var |const |\t)` + name + `\b`)
			if !there.Match(source) {
				t.Errorf("line %d: %s does not declare %s", n+1, m[2], m[1])
			}
		}
	}
	if found < 30 {
		t.Errorf("%d places of the page are recognised", found)
	}
}
