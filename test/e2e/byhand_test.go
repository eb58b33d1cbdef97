package e2e

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"ztun/test/lab"
)

// handStep is one command of README's section "By hand", with what it is said to show.
type handStep struct{ command, want string }

// byHand reads the steps: a line each, but for a document that follows one (<<'END').
func byHand(t *testing.T) (steps []handStep) {
	t.Helper()
	root, err := lab.Root()
	must(t, err)
	b, err := os.ReadFile(filepath.Join(root, "README.md"))
	must(t, err)
	_, section, ok := strings.Cut(string(b), "### By hand\n")
	m := regexp.MustCompile("(?s)```sh\n(.*?)```").FindStringSubmatch(section)
	if !ok || m == nil {
		t.Fatal("README.md has no section By hand with a block of commands")
	}
	lines := strings.Split(m[1], "\n")
	for i := 0; i < len(lines); i++ {
		command, want, _ := strings.Cut(lines[i], "# ->")
		if strings.HasPrefix(command, "#") || strings.TrimSpace(command) == "" {
			continue
		}
		if strings.Contains(command, "<<'END'") {
			for more := ""; more != "END"; {
				i++
				more = lines[i]
				command += "\n" + more
			}
		}
		steps = append(steps, handStep{command, strings.TrimSpace(want)})
	}
	return steps
}

// TestReadmeByHand types README's section "By hand" into a shell, line by line, and looks for what it says is to be
// seen. The names of namespaces are the shell's own: it has its own /run/netns and /etc/netns.
func TestReadmeByHand(t *testing.T) {
	needTool(t, "curl")
	needTool(t, "python3")
	steps := byHand(t)
	if len(steps) < 30 {
		t.Fatalf("only %d commands", len(steps))
	}
	const build = "go build -o bin/ztun ./cmd/ztun"
	if !strings.HasPrefix(steps[0].command, build) {
		t.Fatalf("the first command is %q, want %s", steps[0].command, build)
	}
	steps[0].command = "mkdir bin && cp " + bins.ztun + " bin/ztun" // built already
	dir := t.TempDir()
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	const own = "mkdir -p /run/netns /etc/netns && mount -t tmpfs ztun /run/netns && mount -t tmpfs ztun /etc/netns && " +
		"exec bash --noprofile --norc"
	shell := exec.CommandContext(ctx, "unshare", "--mount", "sh", "-c", own)
	shell.Dir = dir
	in, err := shell.StdinPipe()
	must(t, err)
	out, w, err := os.Pipe()
	must(t, err)
	defer out.Close()
	shell.Stdout, shell.Stderr = w, w
	must(t, shell.Start())
	w.Close()
	said := bufio.NewReader(out)
	// do types a command and returns what is printed until it has ended, and its exit code.
	do := func(command string) (string, int) {
		t.Helper()
		_, err := fmt.Fprintf(in, "%s\necho \"<done $?>\"\n", command)
		must(t, err)
		var all strings.Builder
		for {
			line, err := said.ReadString('\n')
			all.WriteString(line)
			var code int
			if i := strings.Index(line, "<done "); i >= 0 {
				if _, err := fmt.Sscanf(line[i:], "<done %d>", &code); err == nil {
					return all.String(), code
				}
			}
			if err != nil {
				t.Fatalf("%s: the shell has ended: %v\n%s", command, err, all.String())
			}
		}
	}
	defer func() { // whatever has failed: nothing is left running
		fmt.Fprintln(in, "kill $(jobs -p); wait; for n in $(ls /run/netns); do ip netns del $n; done; exit")
		in.Close()
		io.Copy(io.Discard, said)
		shell.Wait()
		os.Remove("/etc/netns") // only if it is empty
	}()
	for _, s := range steps {
		got, code := do(s.command)
		refused := strings.HasPrefix(s.want, "curl: ") // an exit code that is no accident
		if !strings.Contains(got, s.want) || code != 0 && !refused {
			var logs []string
			for _, name := range []string{"control.log", "n1.log", "n2.log"} {
				b, _ := os.ReadFile(filepath.Join(dir, "hand", name))
				logs = append(logs, name+":\n"+string(b[max(0, len(b)-3000):]))
			}
			t.Fatalf("%s\nexit code %d, want %q in:\n%s\n%s", s.command, code, s.want, got, strings.Join(logs, "\n"))
		}
	}
	if left, code := do("ls /run/netns /etc/netns; jobs"); code != 0 || strings.Contains(left, "front") ||
		strings.Contains(left, "ztun") {
		t.Errorf("left over:\n%s", left)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("left over: %v, %v", entries, err)
	}
}
