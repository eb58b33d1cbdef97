package main

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"ztun/admin"
)

// podsOf serves a control socket that lists the given pods.
func podsOf(t *testing.T, names ...string) (socket string) {
	t.Helper()
	var list struct {
		Pods []admin.PodStatus `json:"pods"`
	}
	for _, n := range names {
		ns, name, _ := strings.Cut(n, "/")
		list.Pods = append(list.Pods,
			admin.PodStatus{PodSpec: admin.PodSpec{Name: name, Namespace: ns, NetNS: "/no/such/namespace"}})
	}
	socket = filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		json.NewEncoder(w).Encode(list)
	})}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(l) }()
	t.Cleanup(func() { srv.Close(); <-done })
	return socket
}

// What the shell offers, by cobra's own protocol.
func TestCompletion(t *testing.T) {
	socket := podsOf(t, "default/front", "default/stock", "shop/till")
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "nodes"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"n1.json", "n2.json", "shop~till.json", ".tmp.json", "README"} {
		if err := os.WriteFile(filepath.Join(dir, "nodes", f), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		args []string
		want []string
	}{
		{[]string{"pod", "exec", "--socket", socket, ""}, []string{"front", "stock", "shop/till", ":4"}},
		{[]string{"pod", "exec", "--socket", socket, "-n", "shop", ""},
			[]string{"default/front", "default/stock", "till", ":4"}},
		{[]string{"pod", "del", "--socket", socket, "--name", ""}, []string{"front", "stock", ":4"}},
		{[]string{"pod", "del", "--socket", socket, "--namespace", "shop", "--name", ""}, []string{"till", ":4"}},
		{[]string{"pod", "del", "--socket", socket, "--namespace", ""}, []string{"default", "shop", ":4"}},
		{[]string{"pod", "del", "--socket", "/no/such/socket", "--name", ""}, []string{":4"}},
		{[]string{"pod", "list", "--output", ""}, []string{"table", "wide", "json", "yaml", ":4"}},
		{[]string{"flows", "--socket", socket, "--pod", ""}, []string{"default/front", "shop/till", ":4"}},
		{[]string{"control", "leave", "--dir", dir, "--node", ""}, []string{"n1", "n2", ":4"}},
		{[]string{"control", "leave", "--dir", dir, "--workload", ""}, []string{"shop/till", ":4"}},
		{[]string{"control", "--log-format", ""}, []string{"plain", "json", ":4"}},
		{[]string{"control", "init", ""}, []string{":16"}}, // directories
		{[]string{"help", "pod", ""}, []string{"add", "del", "exec", "list", ":4"}},
	} {
		out, err := run(t, append([]string{cobra.ShellCompRequestCmd}, tc.args...)...)
		var got []string
		for l := range strings.Lines(out) {
			if l = strings.TrimSpace(l); l != "" && !strings.HasPrefix(l, "Completion ended") {
				word, _, _ := strings.Cut(l, "\t")
				got = append(got, word)
			}
		}
		for _, w := range tc.want {
			if err != nil || !slices.Contains(got, w) {
				t.Errorf("%q: %q, %v, want %q", tc.args, got, err, w)
			}
		}
	}
}

// Every flag with a value has a completion: a shell that offers the files of this directory for the name of a node
// misleads.
func TestEveryFlagCompletes(t *testing.T) {
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		cmd.LocalFlags().VisitAll(func(f *pflag.Flag) {
			if _, ok := cmd.GetFlagCompletionFunc(f.Name); !ok && f.Value.Type() != "bool" {
				t.Errorf("%s --%s: say in completions what its value may be", cmd.CommandPath(), f.Name)
			}
		})
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
	}
	walk(rootCommand())
}

func TestFindPod(t *testing.T) {
	pods, err := admin.NewPodClient(podsOf(t, "default/front", "shop/till", "shop/front", "shop/stock")).List(
		context.Background())
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ namespace, name, found, err string }{
		{"default", "front", "default/front", ""},
		{"shop", "front", "shop/front", ""},
		{"default", "shop/till", "shop/till", ""},
		{"default", "till", "", "no pod default/till among the 4 of this daemon; there is shop/till"},
		{"default", "frnt", "", `no pod default/frnt among the 4 of this daemon; did you mean "front"?`},
		{"shop", "nothing", "", "no pod shop/nothing among the 4 of this daemon"},
	} {
		p, err := findPod(pods, tc.namespace, tc.name)
		if got := p.Namespace + "/" + p.Name; tc.err == "" && (err != nil || got != tc.found) || tc.err != "" &&
			(err == nil || err.Error() != tc.err) {
			t.Errorf("%s %s: %s, %v", tc.namespace, tc.name, got, err)
		}
	}
}

// What `ztun pod exec` says when there is nothing to execute; that it works is shown in test/e2e.
func TestPodExecRefusals(t *testing.T) {
	socket := podsOf(t, "default/front")
	for args, want := range map[string]struct {
		text string
		code int
	}{
		"":                                   {"wants the NAME of a pod and a COMMAND", 1},
		"front":                              {"wants a COMMAND: ztun pod exec front -- ip address", 1},
		"front --":                           {"wants a COMMAND", 1},
		"frnt -- true":                       {`did you mean "front"?`, 1},
		"front -- no-such-command-anywhere":  {"no-such-command-anywhere: command not found", 127},
		"front -- /no/such/command":          {"/no/such/command: command not found", 127},
		"front /etc/passwd":                  {"/etc/passwd cannot be run: ", 126},
		"front -- true":                      {"the network of pod default/front: no such network namespace", 1},
		"front true --flag-of-the-command -": {"the network of pod default/front: no such network namespace", 1},
	} {
		_, err := run(t, append([]string{"pod", "exec", "--socket", socket}, strings.Fields(args)...)...)
		if err == nil || !strings.Contains(err.Error(), want.text) || exitCode(err) != want.code {
			t.Errorf("%s: %v (%d), want %s (%d)", args, err, exitCode(err), want.text, want.code)
		}
	}
}

// The manual has a page for each command that somebody may call, the same each time.
func TestManualPages(t *testing.T) {
	dirs := []string{t.TempDir(), t.TempDir()}
	for _, dir := range dirs {
		if out, err := run(t, "man", "--out", dir); err != nil || out != "" {
			t.Fatalf("%q, %v", out, err)
		}
	}
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		if cmd.Name() == "help" || cmd.Hidden {
			return
		}
		name := pageName(cmd) + ".1"
		a, err := os.ReadFile(filepath.Join(dirs[0], name))
		if err != nil {
			t.Error(err)
			return
		}
		b, err := os.ReadFile(filepath.Join(dirs[1], name))
		if err != nil || string(a) != string(b) || !strings.Contains(string(a), ".SH SYNOPSIS") ||
			strings.Contains(string(a), "0001") {
			t.Errorf("%s: %v\n%.300s", name, err, a)
		}
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
	}
	walk(rootCommand())
	env, err := os.ReadFile(filepath.Join(dirs[0], "ztun-proxy.1"))
	if err != nil || !strings.Contains(string(env), "\n  NODE_NAME ") {
		t.Errorf("the table of variables is not set line by line: %v\n%.2000s", err, env)
	}
	single, err := run(t, "man")
	if err != nil || !strings.Contains(single, "ztun-proxy(1)") {
		t.Errorf("%v\n%s", err, single)
	}
}
