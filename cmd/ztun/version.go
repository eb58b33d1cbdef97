package main

import (
	"cmp"
	_ "embed"
	"fmt"
	"runtime"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"
)

// versionFile is the version of this source tree (semantic versioning). A release is tagged v + this; CHANGELOG.md
// has an entry for it.
//
//go:embed VERSION
var versionFile string

// linkedRevision is the commit, where whoever builds names it (-ldflags "-X main.linkedRevision=..."): builds without
// access to the repository's metadata know none otherwise.
var linkedRevision string

// buildVersion is the version of the source tree and the commit that it was built from.
func buildVersion() (version, revision string) {
	version, revision = strings.TrimSpace(versionFile), linkedRevision
	info, ok := debug.ReadBuildInfo()
	if revision != "" || !ok {
		return version, cmp.Or(revision, "unknown")
	}
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			revision = s.Value
		case s.Key == "vcs.modified" && s.Value == "true" && revision != "":
			revision += "-dirty"
		}
	}
	return version, cmp.Or(revision, "unknown")
}

// versionText is what `ztun version` and `ztun --version` print.
func versionText() string {
	version, revision := buildVersion()
	return fmt.Sprintf("ztun %s (revision %s, %s, %s/%s)", version, revision, runtime.Version(), runtime.GOOS,
		runtime.GOARCH)
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "print the version and end", Args: noArgs,
		Run: func(cmd *cobra.Command, _ []string) { fmt.Fprintln(cmd.OutOrStdout(), versionText()) },
	}
}
