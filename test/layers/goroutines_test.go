package layers

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/printer"
	"go/token"
	"path/filepath"
	"strings"
	"testing"
)

// dataPlane is where every goroutine and every timer starts through package rescue, so that a panic ends what it came
// from and not the daemon. Of cmd/ztun only what runs for pods: the rest is the admin side, whose end is the
// daemon's.
var dataPlane = []string{"proxy/*.go", "proxy/hbone/*.go", "proxy/dns/*.go", "netstack/*.go", "netstack/usersock/*.go",
	"cmd/ztun/pod*.go", "cmd/ztun/upstream.go", "cmd/attach/stack.go", "cmd/attach/isolated/*.go",
	"cmd/attach/rootless/*.go"}

// unguarded are those that do without: file and function, and why nothing can panic there.
var unguarded = map[string]string{
	"proxy/hbone/write.go: c.flushAlone":                 "made by Func, once per connection",
	"proxy/hbone/server.go: func() { c.handle(s, req) }": "calls Panics.Run: one closure for each request",
	"proxy/hbone/config.go: f":                           "the Go of those without workers, given one of these",
	"proxy/copy.go: s.copyToUpstream":                    "calls Panics.Run: no closures for each connection",
	"proxy/copy.go: s.copyToDownstream":                  "the same",
	"proxy/shortcut.go: c.endPass":                       "the same",
	"proxy/rest.go: s.copyToUpstream":                    "the same",
	"proxy/rest.go: s.copyToDownstream":                  "the same",
	"netstack/clock.go: t.fire":                          "calls Panics.Run: no closures for each timer",
	"netstack/flow.go: fl.patient":                       "the same, for each handshake",
	"netstack/wait.go: h.wake": "a look at a pointer and a send that does not " +
		"block",
	"proxy/dns/forward.go: func() { conn.SetDeadline(time.Unix(1, 0)) }": "one call of the standard library's or " +
		"netstack's",
}

// TestGoroutinesAreGuarded finds `go` statements, WaitGroup.Go and AfterFunc whose function is not one that rescue's
// Func has made.
func TestGoroutinesAreGuarded(t *testing.T) {
	seen := 0
	for _, pattern := range dataPlane {
		files, err := filepath.Glob("../../" + pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: no files: %v", pattern, err)
		}
		for _, name := range files {
			if strings.HasSuffix(name, "_test.go") {
				continue
			}
			found, bad := startsOf(t, name, nil)
			seen += found
			for _, b := range bad {
				t.Errorf("%s is started past rescue: a panic in it would end the daemon with all its pods", b)
			}
		}
	}
	if seen < 30 {
		t.Errorf("only %d starts of goroutines were found: this test looks at the wrong places", seen)
	}
}

// TestUnguardedIsFound: the test above would see it.
func TestUnguardedIsFound(t *testing.T) {
	const src = `package p
func f() {
	go g()
	go p.Func("x", g, nil)()
	wg.Go(func() { g() })
	wg.Go(p.Func("x", g, nil))
	time.AfterFunc(d, g)
	context.AfterFunc(ctx, p.Func("x", g, nil))
}`
	found, bad := startsOf(t, "x.go", src)
	if found != 6 || len(bad) != 3 {
		t.Errorf("found %d starts, past rescue: %q", found, bad)
	}
}

// startsOf counts what starts goroutines in a file (or in src), and names what does so unguarded.
func startsOf(t *testing.T, name string, src any) (found int, bad []string) {
	t.Helper()
	fset := token.NewFileSet()
	file, err := parser.ParseFile(fset, name, src, 0)
	if err != nil {
		t.Fatal(err)
	}
	guarded := func(e ast.Expr) bool {
		c, ok := e.(*ast.CallExpr)
		if !ok {
			return false
		}
		s, ok := c.Fun.(*ast.SelectorExpr)
		return ok && s.Sel.Name == "Func"
	}
	check := func(at token.Pos, f ast.Expr) {
		found++
		if guarded(f) {
			return
		}
		var b bytes.Buffer
		if err := printer.Fprint(&b, fset, f); err != nil {
			t.Fatal(err)
		}
		short := strings.TrimPrefix(filepath.ToSlash(name), "../../")
		if _, ok := unguarded[short+": "+b.String()]; ok {
			return
		}
		if _, ok := unguarded[short+": "]; ok {
			return
		}
		bad = append(bad, fset.Position(at).String()+": "+b.String())
	}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.GoStmt:
			check(n.Pos(), n.Call.Fun)
		case *ast.CallExpr:
			s, ok := n.Fun.(*ast.SelectorExpr)
			if ok && (s.Sel.Name == "Go" && len(n.Args) == 1 || s.Sel.Name == "AfterFunc" && len(n.Args) == 2) {
				check(n.Pos(), n.Args[len(n.Args)-1])
			}
		}
		return true
	})
	return found, bad
}
