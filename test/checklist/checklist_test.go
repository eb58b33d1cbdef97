package checklist

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// row is one assertion.
type row struct {
	number    int
	assertion string
	proof     string
}

// sections are the headings of checklist.md, with the number of assertions of each.
var sections = map[string]int{"Control plane": 100, "Data plane": 153}

var testName = regexp.MustCompile(`((?:[a-z0-9]+/)*[a-z0-9]+)\.((?:Test|Fuzz)[A-Z]\w*)`)

// excuses begin the proof of an assertion that is not met as it stands.
var excuses = []string{"later: ", "differs: ", "NOT MET: "}

// readTables reads checklist.md: the rows by heading.
func readTables(t *testing.T, text string) map[string][]row {
	t.Helper()
	tables := map[string][]row{}
	heading := ""
	for i, line := range strings.Split(text, "\n") {
		if h, ok := strings.CutPrefix(line, "## "); ok {
			heading = h
		}
		cells, ok := strings.CutPrefix(line, "| ")
		if !ok || strings.HasPrefix(line, "| # |") {
			continue
		}
		f := strings.Split(strings.TrimSuffix(cells, " |"), " | ")
		n, err := strconv.Atoi(f[0])
		if err != nil || len(f) != 3 || f[1] == "" || f[2] == "" {
			t.Errorf("line %d: want a number, an assertion and a proof: %s", i+1, line)
			continue
		}
		tables[heading] = append(tables[heading], row{n, f[1], f[2]})
	}
	return tables
}

// functions are the test functions of a directory.
func functions(t *testing.T, dir string) map[string]bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for _, file := range files {
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Errorf("%v", err)
			continue
		}
		for _, d := range f.Decls {
			if d, ok := d.(*ast.FuncDecl); ok && d.Recv == nil {
				found[d.Name.Name] = true
			}
		}
	}
	return found
}

// TestTables: every number of both checklists is there exactly once, in order; what is proved names a test, and every
// test that is named exists.
func TestTables(t *testing.T) {
	text, err := os.ReadFile("checklist.md")
	if err != nil {
		t.Fatal(err)
	}
	tables := readTables(t, string(text))
	if len(tables) != len(sections) {
		t.Errorf("%d tables, want %d", len(tables), len(sections))
	}
	known := map[string]map[string]bool{}
	for heading, want := range sections {
		rows := tables[heading]
		if len(rows) != want {
			t.Errorf("%s: %d rows, want %d", heading, len(rows), want)
		}
		for i, r := range rows {
			if r.number != i+1 {
				t.Fatalf("%s: row %d where %d should stand", heading, r.number, i+1)
			}
			tests := testName.FindAllStringSubmatch(r.proof, -1)
			for _, name := range tests {
				dir := name[1]
				if known[dir] == nil {
					known[dir] = functions(t, filepath.Join("..", "..", filepath.FromSlash(dir)))
				}
				if !known[dir][name[2]] {
					t.Errorf("%s %d: there is no %s", heading, r.number, name[0])
				}
			}
			if excused(r.proof) == "" && (len(tests) == 0 || !strings.HasPrefix(r.proof, tests[0][0])) {
				t.Errorf("%s %d: neither a test nor one of %q: %s", heading, r.number, excuses, r.proof)
			}
		}
	}
}

func excused(proof string) string {
	for _, e := range excuses {
		if strings.HasPrefix(proof, e) {
			return e
		}
	}
	return ""
}
