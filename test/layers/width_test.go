package layers

import (
	"bytes"
	"go/scanner"
	"go/token"
	"os"
	"os/exec"
	"strings"
	"testing"
	"unicode/utf8"
)

// width is the most characters of a line of Go, a tab taken for one.
const width = 120

// tooWide returns the lines (from 1) of a Go file that are wider than width. A line is excused by one literal that
// cannot be broken: without its longest string it would fit. So are the lines of a string of several lines, and a
// directive to a tool.
func tooWide(src []byte) []int {
	fset := token.NewFileSet()
	f := fset.AddFile("", fset.Base(), len(src))
	var s scanner.Scanner
	s.Init(f, src, nil, scanner.ScanComments)
	longest, excused := map[int]int{}, map[int]bool{}
	for {
		pos, tok, lit := s.Scan()
		if tok == token.EOF {
			break
		}
		first := f.Line(pos)
		switch {
		case tok == token.STRING && strings.Contains(lit, "\n"):
			for i := range strings.Count(lit, "\n") + 1 {
				excused[first+i] = true
			}
		case tok == token.STRING:
			longest[first] = max(longest[first], utf8.RuneCountInString(lit))
		case tok == token.COMMENT && strings.HasPrefix(lit, "//go:"):
			excused[first] = true
		}
	}
	var wide []int
	for i, l := range bytes.Split(src, []byte("\n")) {
		n := utf8.RuneCount(l)
		if n > width && !excused[i+1] && n-longest[i+1] > width {
			wide = append(wide, i+1)
		}
	}
	return wide
}

// TestWidth: every line of Go that is written by hand fits in a window of width columns.
func TestWidth(t *testing.T) {
	out, err := exec.Command("git", "-C", "../..", "ls-files", "-co", "--exclude-standard", "*.go").Output()
	if err != nil {
		t.Fatal(err)
	}
	files := strings.Fields(string(out))
	if len(files) < 100 {
		t.Fatalf("only %d files", len(files))
	}
	for _, name := range files {
		src, err := os.ReadFile("../../" + name)
		if os.IsNotExist(err) {
			continue // deleted, not yet in the index
		}
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(src, []byte("\n// Code generated ")) || bytes.HasPrefix(src, []byte("// Code generated ")) {
			continue
		}
		for _, l := range tooWide(src) {
			t.Errorf("%s:%d is wider than %d columns", name, l, width)
		}
	}
}

func TestTooWide(t *testing.T) {
	a := func(n int) string { return strings.Repeat("a", n) }
	for _, tc := range []struct {
		name, line string
		want       bool
	}{
		{"fits", "// " + a(117), false},
		{"comment", "// " + a(118), true},
		{"runes", "// " + strings.Repeat("é", 117), false},
		{"tab", "\t" + a(119), false},
		{"names", "\t" + a(60) + " + " + a(60), true},
		{"one literal", "\tf(\"" + a(130) + "\")", false},
		{"raw literal", "\tf(`" + a(130) + "`)", false},
		{"two literals", "\tf(\"" + a(90) + "\", \"" + a(90) + "\", " + a(40) + ")", true},
		{"directive", "//go:generate " + a(130), false},
		{"within a string", "\tf(`\n" + a(130) + "\n`)", false},
	} {
		if got := len(tooWide([]byte("package x\n\n"+tc.line+"\n"))) > 0; got != tc.want {
			t.Errorf("%s: %v", tc.name, got)
		}
	}
}
