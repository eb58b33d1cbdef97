package main

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"ztun/admin"
	"ztun/tun/netns"
)

// completionTimeout bounds how long a shell waits for the names of pods.
const completionTimeout = 2 * time.Second

type completion = func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective)

// values completes from a fixed list.
func values(all ...string) completion {
	return func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return all, cobra.ShellCompDirectiveNoFileComp
	}
}

// nothing stands for a value that nobody can know: better no offer than the files of this directory.
func nothing(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveNoFileComp
}

// directories completes directories.
func directories(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveFilterDirs
}

// files leaves it to the shell.
func files(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveDefault
}

// completions says, by the name of a flag, what its value may be; it holds for all commands, so that a flag means the
// same everywhere. client is the daemon's, dir the control plane's directory.
func completions(cmd *cobra.Command) map[string]completion {
	flag := func(name string) string {
		f := cmd.Flag(name)
		if f == nil {
			return ""
		}
		return f.Value.String()
	}
	pods := func(show func(admin.PodStatus) string) completion {
		return func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
			ctx, cancel := context.WithTimeout(cmd.Context(), completionTimeout)
			defer cancel()
			var out []string
			all, _ := admin.NewPodClient(flag("socket")).List(ctx) // no daemon, no offer
			for _, p := range all {
				if s := show(p); s != "" && !slices.Contains(out, s) {
					out = append(out, s)
				}
			}
			return out, cobra.ShellCompDirectiveNoFileComp
		}
	}
	// joined are the members of a control plane's mesh: nodes, or workloads that have joined by themselves, whose files
	// are called NAMESPACE~NAME.
	joined := func(workloads bool) completion {
		return func(*cobra.Command, []string, string) (out []string, _ cobra.ShellCompDirective) {
			for _, name := range namesIn(filepath.Join(flag("dir"), "nodes"), ".json") {
				if strings.Contains(name, "~") == workloads {
					out = append(out, strings.ReplaceAll(name, "~", "/"))
				}
			}
			return out, cobra.ShellCompDirectiveNoFileComp
		}
	}
	return map[string]completion{
		"name": pods(func(p admin.PodStatus) string {
			if cmd.Name() == "add" || p.Namespace != flag("namespace") { // a new one has a new name
				return ""
			}
			return p.Name
		}),
		"uid": pods(func(p admin.PodStatus) string {
			if cmd.Name() == "add" {
				return ""
			}
			return p.UID
		}),
		"namespace": pods(func(p admin.PodStatus) string { return p.Namespace }),
		"pod":       pods(func(p admin.PodStatus) string { return p.Namespace + "/" + p.Name }),
		"netns": func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return namesIn(netns.Dir, ""), cobra.ShellCompDirectiveDefault // a path as well
		},
		"node": joined(false), "workload": joined(true),
		"output":    values(outputTable, outputWide, outputJSON, outputYAML),
		"direction": values("outbound", "inbound", "passthrough"),
		"outcome":   values("success", "denied", "failed", "cut", "bad"),
		"sort":      values("age", "bytes", "sent", "received", "pod", "peer"),
		"from":      pods(func(p admin.PodStatus) string { return p.Namespace + "/" + p.Name }),
		"to":        nothing, "identity": nothing, "count": nothing, "duration": nothing, "snaplen": nothing, "peer": nothing,
		"limit": nothing, "since": nothing, "timeout": nothing,
		"log-format": values("plain", "json"),
		"log":        values("error", "warn", "info", "debug", "trace", "off"),
		"dir":        directories, "state-dir": directories, "out": directories, "mesh": directories,
		"cni-conf-dir": directories, "cni-bin-dir": directories,
		"socket": files, "status-socket": files, "join": files,
		"service-account": nothing, "ip": nothing, "mtu": nothing, "wait": nothing, "mesh-port": nothing,
		"publish": nothing, "tun-fd": nothing,
		"tun-socket": files, "tun-device": files,
		"listen": nothing, "host": nothing, "admin": nothing, "metrics": nothing, "ready": nothing,
		"run": func(*cobra.Command, []string, string) (out []string, _ cobra.ShellCompDirective) {
			for _, r := range liveRuns(runBases(os.Getenv)) {
				out = append(out, r.name, r.workload)
			}
			return out, cobra.ShellCompDirectiveNoFileComp
		},
		"zds-socket": files, "plugin-socket": files, "kubeconfig": files, "proc": directories, "host-root": directories,
		"mesh-namespace": nothing, "daemonset": nothing, "exclude-namespaces": nothing,
		"max-life":     nothing,
		"trust-domain": nothing, "life": nothing,
	}
}

// namesIn are the entries of a directory, without their ending, but for hidden ones.
func namesIn(dir, ending string) []string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	var out []string
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), ending); ok && !strings.HasPrefix(name, ".") {
			out = append(out, name)
		}
	}
	return out
}

// complete gives every flag of a tree of commands that takes a value its completion.
func complete(cmd *cobra.Command) {
	known := completions(cmd)
	cmd.LocalNonPersistentFlags().VisitAll(func(f *pflag.Flag) { completeFlag(cmd, f, known) })
	cmd.PersistentFlags().VisitAll(func(f *pflag.Flag) { completeFlag(cmd, f, known) })
	for _, sub := range cmd.Commands() {
		complete(sub)
	}
}

func completeFlag(cmd *cobra.Command, f *pflag.Flag, known map[string]completion) {
	c := known[f.Name]
	if _, given := cmd.GetFlagCompletionFunc(f.Name); c == nil || given || f.Value.Type() == "bool" {
		return
	}
	if err := cmd.RegisterFlagCompletionFunc(f.Name, c); err != nil {
		panic(err) // a flag that was just looked up
	}
}
