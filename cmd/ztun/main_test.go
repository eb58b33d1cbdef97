package main

import (
	"bytes"
	"slices"
	"testing"

	"github.com/spf13/cobra"
)

// A run's own tree of commands says and takes what the whole one does.
func TestRunTree(t *testing.T) {
	for _, args := range [][]string{{"run", "--help"}, {"run"}, {"run", "--jion", "x", "--", "true"}, {"run", "--mtu", "x"}} {
		whole, own := rootCommand(), commandTree(slices.Concat([]string{"ztun"}, args))
		if len(own.Commands()) >= len(whole.Commands()) {
			t.Errorf("%q has %d commands of %d", args, len(own.Commands()), len(whole.Commands()))
		}
		var said [2]bytes.Buffer
		var failed [2]string
		for i, root := range []*cobra.Command{whole, own} {
			root.SetOut(&said[i])
			root.SetArgs(args)
			if err := root.Execute(); err != nil {
				failed[i] = err.Error()
			}
		}
		if said[0].String() != said[1].String() || failed[0] != failed[1] {
			t.Errorf("%q: %s%s, in the whole tree %s%s", args, &said[1], failed[1], &said[0], failed[0])
		}
	}
	if n := len(commandTree([]string{"ztun", "pod", "run"}).Commands()); n != len(rootCommand().Commands()) {
		t.Errorf("another command has a tree of %d commands", n)
	}
}
