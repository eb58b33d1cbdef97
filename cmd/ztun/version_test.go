package main

import (
	"bytes"
	"os"
	"regexp"
	"strings"
	"testing"
)

func TestVersion(t *testing.T) {
	version, _ := buildVersion()
	if !regexp.MustCompile(`^\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?$`).MatchString(version) {
		t.Errorf("VERSION %q is no semantic version", version)
	}
	for _, args := range [][]string{{"version"}, {"--version"}} {
		var out bytes.Buffer
		root := rootCommand()
		root.SetOut(&out)
		root.SetArgs(args)
		if err := root.Execute(); err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(out.String(), "ztun "+version+" (revision ") {
			t.Errorf("ztun %s: %q", args[0], out.String())
		}
	}
	changes, err := os.ReadFile("../../CHANGELOG.md")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(changes, []byte("\n## "+version+" ")) {
		t.Errorf("CHANGELOG.md has no entry for %s", version)
	}
}
