// Command mutate changes the code of packages in small ways, one at a time, runs the package's own tests against each
// change, and reports which ones no test noticed. Such a survivor is a line that nothing would miss, or a test that is
// missing; whoever reads the list decides.
//
//	go run ./test/mutate -n 100 ./proxy/hbone ./proxy/route ./proxy/rbac ./netstack ./admin/xds ./tun/steer
//
// Mutants are drawn at random, the same ones for the same seed and code, in equal numbers from each package: an
// operator turned round, a number one higher, a condition always true or always false, a call or an assignment left
// out. What does not compile is drawn again. The source is never touched (go test -overlay). It is no part of
// scripts/check: it takes as long as all tests of a package once per survivor. Exit status 1: there are survivors.
package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

func main() {
	o := options{out: os.Stdout}
	flag.IntVar(&o.n, "n", 100, "how many `mutants`")
	flag.Uint64Var(&o.seed, "seed", 1, "which ones")
	flag.DurationVar(&o.timeout, "timeout", time.Minute, "for the tests of one mutant; running into it counts as noticed")
	flag.IntVar(&o.parallel, "j", 1, "mutants at a time")
	flag.StringVar(&o.skip, "skip", "", "tests to leave out, as go test -skip has it")
	flag.Parse()
	o.packages = flag.Args()
	if len(o.packages) == 0 || o.n < 1 || o.parallel < 1 {
		flag.Usage()
		os.Exit(2)
	}
	// Whatever else runs on this machine goes first; children inherit it. Where it is not allowed, so be it.
	_ = syscall.Setpriority(syscall.PRIO_PROCESS, 0, 10)
	survivors, err := run(context.Background(), o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "mutate:", err)
		os.Exit(2)
	}
	if survivors > 0 {
		os.Exit(1)
	}
}

type options struct {
	packages []string
	n        int
	seed     uint64
	timeout  time.Duration
	parallel int
	skip     string
	dir      string // where go runs; "": here
	out      io.Writer
}

// mutant is one change of one file: the bytes from begin to end become text.
type mutant struct {
	pkg, file  string
	begin, end int
	text       string
	where      token.Position
	before     string
}

func (m *mutant) String() string {
	show := func(s string) string {
		s = strings.Join(strings.Fields(s), " ")
		if len(s) > 60 {
			s = s[:57] + "..."
		}
		return s
	}
	after := show(m.text)
	if after == "" {
		after = "nothing"
	}
	return fmt.Sprintf("%s:%d: %s -> %s", m.file, m.where.Line, show(m.before), after)
}

// The fates of mutants.
const (
	unfit   = iota // does not compile
	noticed        // a test failed, or hung
	survived
)

// run reports the survivors to o.out, and how many there are.
func run(ctx context.Context, o options) (survivors int, err error) {
	dir, err := os.MkdirTemp("", "mutate")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	queues := make([][]*mutant, len(o.packages))
	for i, pkg := range o.packages {
		if queues[i], err = candidates(ctx, o, pkg); err != nil {
			return 0, err
		}
		if fate, out := o.test(ctx, pkg, ""); fate != survived {
			return 0, fmt.Errorf("%s fails as it is:\n%s", pkg, out)
		}
		r := rand.New(rand.NewPCG(o.seed, uint64(i)))
		r.Shuffle(len(queues[i]), func(a, b int) { queues[i][a], queues[i][b] = queues[i][b], queues[i][a] })
	}
	var (
		mu     sync.Mutex
		work   sync.WaitGroup
		failed error
		counts = make([][3]int, len(queues))
		left   []*mutant
	)
	// Each package has its share; a worker takes packages in turn, so that two do not link the same one at once.
	jobs := make(chan int, len(queues))
	for i := range queues {
		jobs <- i
	}
	close(jobs)
	for w := range o.parallel {
		work.Go(func() {
			for i := range jobs {
				share := (o.n + i) / len(queues)
				for _, m := range queues[i] {
					mu.Lock()
					full := counts[i][noticed]+counts[i][survived] >= share || failed != nil
					mu.Unlock()
					if full {
						break
					}
					fate, err := o.try(ctx, m, filepath.Join(dir, fmt.Sprint(w)))
					mu.Lock()
					counts[i][fate]++
					failed = cmp.Or(failed, err)
					if fate == survived && err == nil {
						left = append(left, m)
						fmt.Fprintln(o.out, "survived:", m)
					}
					mu.Unlock()
				}
			}
		})
	}
	work.Wait()
	for i, pkg := range o.packages {
		c := counts[i]
		fmt.Fprintf(o.out, "%s: %d of %d mutants survived (%d did not compile, %d possible)\n", pkg, c[survived], c[survived]+c[noticed], c[unfit], len(queues[i]))
	}
	return len(left), failed
}

// try gives a mutant its fate.
func (o *options) try(ctx context.Context, m *mutant, dir string) (int, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return unfit, err
	}
	src, err := os.ReadFile(m.file)
	if err != nil {
		return unfit, err
	}
	changed := slices.Concat(src[:m.begin], []byte(m.text), src[m.end:])
	path := filepath.Join(dir, filepath.Base(m.file))
	overlay := filepath.Join(dir, "overlay.json")
	plan, err := json.Marshal(map[string]any{"Replace": map[string]string{m.file: path}})
	if err != nil {
		return unfit, err
	}
	if err := errors.Join(os.WriteFile(path, changed, 0o644), os.WriteFile(overlay, plan, 0o644)); err != nil {
		return unfit, err
	}
	if out, err := o.command(ctx, "build", "-overlay", overlay, m.pkg); err != nil {
		if ctx.Err() != nil {
			return unfit, fmt.Errorf("%w: %s", err, out)
		}
		return unfit, nil
	}
	fate, _ := o.test(ctx, m.pkg, overlay)
	return fate, ctx.Err()
}

// test runs a package's own tests.
func (o *options) test(ctx context.Context, pkg, overlay string) (int, []byte) {
	args := []string{"test", "-count=1", "-failfast", "-vet=off", "-timeout", o.timeout.String()}
	if overlay != "" {
		args = append(args, "-overlay", overlay)
	}
	if o.skip != "" {
		args = append(args, "-skip", o.skip)
	}
	if out, err := o.command(ctx, append(args, pkg)...); err != nil {
		return noticed, out
	}
	return survived, nil
}

func (o *options) command(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = o.dir
	cmd.WaitDelay = time.Second
	return cmd.CombinedOutput()
}

// candidates are all mutants of a package, in the order of its text.
func candidates(ctx context.Context, o options, pkg string) (all []*mutant, err error) {
	cmd := exec.CommandContext(ctx, "go", "list", "-json=Dir,GoFiles", pkg)
	cmd.Dir, cmd.Stderr = o.dir, os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list %s: %w", pkg, err)
	}
	var list struct {
		Dir     string
		GoFiles []string
	}
	if err := json.Unmarshal(out, &list); err != nil {
		return nil, err
	}
	for _, name := range list.GoFiles {
		path := filepath.Join(list.Dir, name)
		src, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		if bytes.Contains(src, []byte("\n// Code generated ")) || bytes.HasPrefix(src, []byte("// Code generated ")) {
			continue
		}
		found, err := mutants(pkg, path, src)
		if err != nil {
			return nil, err
		}
		all = append(all, found...)
	}
	return all, nil
}

// opposite operators.
var opposite = map[token.Token]token.Token{
	token.EQL: token.NEQ, token.NEQ: token.EQL, token.LSS: token.LEQ, token.LEQ: token.LSS,
	token.GTR: token.GEQ, token.GEQ: token.GTR,
	token.LAND: token.LOR, token.LOR: token.LAND, token.ADD: token.SUB, token.SUB: token.ADD,
	token.MUL: token.QUO, token.QUO: token.MUL,
	token.AND: token.OR, token.OR: token.AND, token.SHL: token.SHR, token.SHR: token.SHL,
	token.ADD_ASSIGN: token.SUB_ASSIGN, token.SUB_ASSIGN: token.ADD_ASSIGN, token.INC: token.DEC, token.DEC: token.INC,
	token.BREAK: token.CONTINUE, token.CONTINUE: token.BREAK,
}

// mutants finds what can be changed in a file.
func mutants(pkg, path string, src []byte) (found []*mutant, err error) {
	fset := token.NewFileSet()
	file, err := parser.ParseFile(fset, path, src, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	add := func(from, to token.Pos, text string) {
		begin, end := fset.Position(from).Offset, fset.Position(to).Offset
		found = append(found, &mutant{pkg: pkg, file: path, begin: begin, end: end, text: text,
			where: fset.Position(from), before: string(src[begin:end])})
	}
	turn := func(at token.Pos, op token.Token) {
		if to, ok := opposite[op]; ok {
			add(at, at+token.Pos(len(op.String())), to.String())
		}
	}
	text := func(n ast.Node) string {
		return string(src[fset.Position(n.Pos()).Offset:fset.Position(n.End()).Offset])
	}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.ImportSpec:
			return false
		case *ast.BinaryExpr:
			turn(n.OpPos, n.Op)
		case *ast.UnaryExpr:
			if n.Op == token.NOT {
				add(n.OpPos, n.OpPos+1, "")
			}
		case *ast.IncDecStmt:
			turn(n.TokPos, n.Tok)
		case *ast.BranchStmt:
			if n.Label == nil {
				turn(n.TokPos, n.Tok)
			}
		case *ast.AssignStmt:
			if turn(n.TokPos, n.Tok); n.Tok == token.ASSIGN {
				add(n.Pos(), n.End(), "")
			}
		case *ast.BasicLit:
			if v, err := strconv.ParseInt(n.Value, 0, 64); n.Kind == token.INT && err == nil {
				add(n.Pos(), n.End(), strconv.FormatInt(v+1, 10))
			}
		case *ast.Ident:
			if n.Name == "true" || n.Name == "false" {
				add(n.Pos(), n.End(), strconv.FormatBool(n.Name == "false"))
			}
		case *ast.IfStmt:
			add(n.Cond.Pos(), n.Cond.End(), "true || "+text(n.Cond))
			add(n.Cond.Pos(), n.Cond.End(), "false && ("+text(n.Cond)+")")
		case *ast.ExprStmt:
			if !logs(n) {
				add(n.Pos(), n.End(), "")
			}
		case *ast.DeferStmt:
			add(n.Pos(), n.End(), "")
		}
		return true
	})
	return found, nil
}

// logs reports whether a statement writes a log line, which tests rightly do not insist on.
func logs(n *ast.ExprStmt) bool {
	call, ok := n.X.(*ast.CallExpr)
	if !ok {
		return false
	}
	sel, ok := call.Fun.(*ast.SelectorExpr)
	return ok && slices.Contains([]string{"Debug", "Info", "Warn", "Error", "Log", "LogAttrs"}, sel.Sel.Name)
}
