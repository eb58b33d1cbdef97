package main

import (
	"bytes"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
)

// run executes the program's commands with args and returns what they print, with the error's text as main prints it.
func run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	root := rootCommand()
	var out bytes.Buffer
	root.SetArgs(args)
	root.SetOut(&out)
	root.SetErr(&out)
	err := root.ExecuteContext(t.Context())
	return out.String(), err
}

// What is mistyped is an error that names what may have been meant.
func TestMistyped(t *testing.T) {
	for args, want := range map[string]string{
		"prxy":                       `unknown command "prxy" for "ztun"; did you mean "proxy"? (ztun --help says more)`,
		"pod lst":                    `unknown command "lst" for "ztun pod"; did you mean "list"? (ztun pod --help says more)`,
		"pod nonsense":               `unknown command "nonsense" for "ztun pod" (ztun pod --help says more)`,
		"control chek":               `unknown command "chek" for "ztun control"; did you mean "check"? (ztun control --help says more)`,
		"ca nit":                     `unknown command "nit" for "ztun ca"; did you mean "init"? (ztun ca --help says more)`,
		"completion bsh":             `unknown command "bsh" for "ztun completion"; did you mean "bash"? (ztun completion --help says more)`,
		"help pdo":                   `unknown command "pdo" for "ztun"; did you mean "pod"? (ztun --help says more)`,
		"help pod lst":               `unknown command "lst" for "ztun pod"; did you mean "list"? (ztun pod --help says more)`,
		"proxy ztunnle":              `ztun proxy takes no argument, found "ztunnle" (ztun proxy --help says more)`,
		"proxy ztunnel x":            `ztun proxy takes no argument, found "ztunnel" (ztun proxy --help says more)`,
		"version please":             `ztun version takes no argument, found "please" (ztun version --help says more)`,
		"ca init":                    `ztun ca init wants DIR (ztun ca init --help says more)`,
		"ca init a b":                `ztun ca init takes one argument, DIR; found "b" as well (ztun ca init --help says more)`,
		"pod list --outptu json":     `unknown flag: --outptu; did you mean --output? (ztun pod list --help says more)`,
		"pod del --names x":          `unknown flag: --names; did you mean --name? (ztun pod del --help says more)`,
		"control status --nonsense":  `unknown flag: --nonsense (ztun control status --help says more)`,
		"control status --dri=/tmp":  `unknown flag: --dri; did you mean --dir? (ztun control status --help says more)`,
		"control --log debgu":        `did you mean "debug"?`,
		"control --log-format jsonl": `choose plain or json`,
	} {
		out, err := run(t, strings.Fields(args)...)
		if err == nil {
			t.Errorf("ztun %s: no error; it printed %q", args, out)
			continue
		}
		// The last two are the commands' own texts, after the socket or with more in them.
		if exact := strings.Contains(want, "says more"); exact && err.Error() != want ||
			!exact && !strings.Contains(err.Error(), want) {
			t.Errorf("ztun %s:\n%s, want\n%s", args, err, want)
		}
		if out != "" {
			t.Errorf("ztun %s printed %q beside its error", args, out)
		}
	}
	for _, args := range []string{"", "pod", "ca", "help", "help pod", "help pod list", "--version", "version",
		"pod list --help"} {
		if out, err := run(t, strings.Fields(args)...); err != nil || len(out) < 20 {
			t.Errorf("ztun %s: %q, %v", args, out, err)
		}
	}
	if out, _ := run(t, "--version"); !strings.HasPrefix(out, "ztun ") || strings.Count(out, "\n") != 1 {
		t.Errorf("--version: %q", out)
	}
}

// No command takes more arguments than it names.
func TestNoCommandTakesAnything(t *testing.T) {
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		// help's words are a command's; after -- stands a command of the user's.
		if cmd.Name() != "help" && !strings.Contains(cmd.Use, "--") {
			if err := cmd.ValidateArgs([]string{"x", "y", "z"}); err == nil || cmd.Args == nil {
				t.Errorf("%s takes any arguments", cmd.CommandPath())
			}
		}
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
	}
	walk(rootCommand())
}

// What pflag shows as a flag's value is one word: text in back quotes, which a command's name was once.
func TestFlagsValuesAreWords(t *testing.T) {
	n := 0
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		for _, set := range []*pflag.FlagSet{cmd.LocalFlags(), cmd.PersistentFlags()} {
			set.VisitAll(func(f *pflag.Flag) {
				n++
				if value, _ := pflag.UnquoteUsage(f); strings.Contains(value, " ") {
					t.Errorf("%s --%s %q", cmd.CommandPath(), f.Name, value)
				}
			})
		}
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
	}
	walk(rootCommand())
	if n < 50 {
		t.Errorf("only %d flags were seen", n)
	}
}

// Who lacks rights is told which, and for what.
func TestPermissionHints(t *testing.T) {
	all := needs(load(t))
	if err := needRoot("ztun proxy", capsOf(unix.CAP_NET_ADMIN, unix.CAP_SYS_ADMIN), all[:required]...); err != nil {
		t.Error(err)
	}
	err := needRoot("ztun proxy", capsOf(unix.CAP_SYS_ADMIN), all[:required]...)
	if want := "ztun proxy needs root (CAP_NET_ADMIN: TUN devices, addresses, routes and rules, transparent " +
		"sockets)"; err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	if err = needRoot("ztun proxy", 0, all[:required]...); err == nil ||
		!strings.Contains(err.Error(), "CAP_SYS_ADMIN: ") || permissionHint(err) != "" {
		t.Error(err)
	}
	for err, want := range map[error]string{
		&fs.PathError{Op: "mkdir", Path: "/etc/x", Err: syscall.EACCES}:                         "CAP_DAC_OVERRIDE",
		&net.OpError{Op: "listen", Net: "tcp", Err: os.NewSyscallError("bind", syscall.EACCES)}: "CAP_NET_BIND_SERVICE",
		fmt.Errorf("a device: %w",
			syscall.EPERM): "CAP_NET_ADMIN CAP_SYS_ADMIN",
		fmt.Errorf("cannot enter a namespace: %w (CAP_SYS_ADMIN is needed)", syscall.EPERM):      "",
		&fs.PathError{Op: "open", Path: "/etc/x", Err: syscall.ENOENT}:                           "",
		fmt.Errorf("no access to a socket: needs root, or its owner: %w", error(syscall.EACCES)): "",
		&fs.PathError{Op: "open", Path: "/dev/net/tun", Err: fmt.Errorf("x: %w", syscall.ENXIO)}: "",
	} {
		if got := permissionHint(err); (got == "") != (want == "") || !strings.Contains(got, want) {
			t.Errorf("%v: %q, want %q", err, got, want)
		}
	}
}
