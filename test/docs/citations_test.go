// Package docs holds the tests of the documents: what a comment or a page refers to is there.
package docs

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const root = "../.."

// A citation of a specification: "spec dataplane 8.6", "spec/controlplane.md 2.5", or "spec 10.2" where the package
// goes without saying.
var (
	specCitation   = regexp.MustCompile(`\bspec(?:[/ ](dataplane|controlplane)(?:\.md)?)?,? (?:section )?(\d+(?:\.\d+)*)(?:-(\d+))?\b`)
	designCitation = regexp.MustCompile(`\bdesign(?:\.md)? section (\d+)(?:, lesson (\d+))?`)
	sampleCitation = regexp.MustCompile(`\bsamples/([a-z_{},-]+\.(?:txt|log|json|yaml|md))`)
	listCitation   = regexp.MustCompile(`\bchecklist (\d+)`)
)

// longestList is how many assertions the longer of the two checklists has (docs/spec/dataplane.md, appendix D;
// test/checklist has both).
const longestList = 153

// home is the specification that is meant where none is named, by directory; the longest prefix counts.
var home = map[string]string{
	"": "dataplane", "admin": "controlplane", "cmd": "controlplane", "proxy/dns": "controlplane",
	"proxy/state": "controlplane",
	"admin/ca":    "dataplane", "test": "controlplane",
}

// places are the numbers of a document that can be cited: its headings, and the items of its numbered lists as
// SECTION.ITEM.
func places(t *testing.T, path string) map[string]bool {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, path))
	if err != nil {
		t.Fatal(err)
	}
	heading := regexp.MustCompile(`^#+ (\d+(?:\.\d+)*)\.? `)
	item := regexp.MustCompile(`(?:^|[.;)] )(\d+)\. `)
	out, section := map[string]bool{}, ""
	for line := range strings.Lines(string(b)) {
		if m := heading.FindStringSubmatch(line); m != nil {
			section = m[1]
			out[section] = true
			continue
		}
		for _, m := range item.FindAllStringSubmatch(line, -1) {
			out[section+"."+m[1]] = true
		}
	}
	return out
}

// sources are the files whose citations are looked at.
func sources(t *testing.T) []string {
	t.Helper()
	out, err := exec.Command("git", "-C", root, "ls-files", "*.go", "*.md", "scripts", ".ci").Output()
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(strings.Fields(string(out)), func(f string) bool {
		return strings.HasPrefix(f, "docs/spec/") || strings.HasPrefix(f, "docs/samples/") ||
			strings.HasSuffix(f, ".pb.go") || strings.HasPrefix(f, "test/docs/")
	})
}

// TestCitations: whoever follows a comment finds the place, in this repository.
func TestCitations(t *testing.T) {
	spec := map[string]map[string]bool{"dataplane": places(t, "docs/spec/dataplane.md"),
		"controlplane": places(t, "docs/spec/controlplane.md")}
	design := places(t, "docs/design.md")
	n := 0
	for _, file := range sources(t) {
		b, err := os.ReadFile(filepath.Join(root, file))
		if os.IsNotExist(err) {
			continue // removed, not committed yet
		}
		if err != nil {
			t.Fatal(err)
		}
		for i, line := range strings.Split(string(b), "\n") {
			at := fmt.Sprintf("%s:%d", file, i+1)
			for _, m := range specCitation.FindAllStringSubmatch(line, -1) {
				n++
				of := m[1]
				if of == "" {
					of = homeOf(file)
				}
				if number := m[2]; !spec[of][number] {
					t.Errorf("%s: %q is not in docs/spec/%s.md", at, m[0], of)
				} else if m[3] != "" && !spec[of][number+"."+m[3]] {
					t.Errorf("%s: %q: no item %s there", at, m[0], m[3])
				}
			}
			for _, m := range designCitation.FindAllStringSubmatch(line, -1) {
				n++
				if !design[m[1]] || m[2] != "" && !design[m[1]+"."+m[2]] {
					t.Errorf("%s: %q is not in docs/design.md", at, m[0])
				}
			}
			for _, m := range listCitation.FindAllStringSubmatch(line, -1) {
				n++
				if number, _ := strconv.Atoi(m[1]); number < 1 || number > longestList {
					t.Errorf("%s: %q is in neither list", at, m[0])
				}
			}
			for _, m := range sampleCitation.FindAllStringSubmatch(line, -1) {
				n++
				if files, _ := filepath.Glob(filepath.Join(root, "docs/samples", m[1])); len(files) == 0 &&
					!strings.Contains(m[1], "{") {
					t.Errorf("%s: %q is not in docs/samples", at, m[0])
				}
			}
			if strings.Contains(line, "shared/spec") || strings.Contains(line, "shared/design") ||
				strings.Contains(line, "shared/samples") || strings.Contains(line, "shared/istio") {
				t.Errorf("%s: refers to a place outside of the repository: %s", at, strings.TrimSpace(line))
			}
		}
	}
	if n < 200 {
		t.Errorf("only %d citations were found", n)
	}
	t.Logf("%d citations", n)
}

func homeOf(file string) string {
	best := ""
	for dir := range home {
		if (dir == "" || strings.HasPrefix(file, dir+"/")) && len(dir) > len(best) {
			best = dir
		}
	}
	return home[best]
}
