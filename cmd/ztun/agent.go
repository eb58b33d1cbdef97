package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"ztun/cmd/agentcmd"
)

// agentCommand has ztun-agent do it, which lies beside ztun.
func agentCommand() *cobra.Command {
	cmd := agentcmd.Command("agent", noArgs, func(cmd *cobra.Command, _ agentcmd.Options) error {
		self, err := os.Executable()
		if err != nil {
			return err
		}
		path := filepath.Join(filepath.Dir(self), agentcmd.Program)
		err = unix.Exec(path, append([]string{agentcmd.Program}, agentcmd.Arguments(cmd.Flags())...), os.Environ())
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("there is no %s: it comes with the container image and the release, and belongs beside ztun", path)
		}
		return fmt.Errorf("%s: %w", path, err)
	})
	if err := cmd.RegisterFlagCompletionFunc("node", nothing); err != nil { // not a control plane's
		panic(err) // a flag that is there
	}
	return cmd
}
