package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"ztun/cmd/supervise"
)

// Exit codes: 1 is a failure at work, 2 a configuration that cannot be used.
const (
	exitFailure = 1
	exitConfig  = 2
)

// A supervised proxy ends with its supervisor: on the process's first thread, see there.
func init() {
	supervise.EndWithParent(os.Getenv, os.Getenv(executedAgain) != "")
}

func main() {
	if supervise.Wanted(os.Args, os.Getenv, os.Getpid(), os.Getppid()) {
		os.Exit(superviseProxy())
	}
	root := commandTree(os.Args)
	if isPlugin(os.Args) {
		if len(os.Args) == 1 { // as a runtime runs it
			os.Exit(runPlugin())
		}
		root.SetArgs(append([]string{"cni"}, os.Args[1:]...)) // /opt/cni/bin/ztun-cni uninstall
	}
	if err := root.ExecuteContext(context.Background()); err != nil {
		var status exitStatus
		if errors.As(err, &status) {
			os.Exit(int(status)) // the command of `ztun run` has said what there is to say
		}
		fmt.Fprintln(os.Stderr, "ztun:", err.Error()+permissionHint(err))
		os.Exit(exitCode(err))
	}
}

func exitCode(err error) int {
	var c *configError
	if errors.As(err, &c) {
		return exitConfig
	}
	var coded *codedError
	if errors.As(err, &coded) {
		return coded.code
	}
	return exitFailure
}

// commandTree is what a call needs of the program's commands: all of them, but for a run that one alone. To make the
// others, with their help and what completes their flags, takes a millisecond, in each of a run's two processes.
func commandTree(args []string) *cobra.Command {
	if len(args) > 1 && args[1] == "run" {
		return newRoot(runCommand())
	}
	return rootCommand()
}

func rootCommand() *cobra.Command {
	root := newRoot(proxyCommand(), runCommand(), podCommand(), connectionsCommand(), flowsCommand(), explainCommand(),
		captureCommand(), doctorCommand(), nodeCommand(), caCommand(), controlCommand(), agentCommand(), cniCommand(),
		versionCommand(), manCommand())
	complete(root)
	return root
}

func newRoot(commands ...*cobra.Command) *cobra.Command {
	root := &cobra.Command{
		Use:           "ztun",
		Short:         "Istio ambient node proxy over TUN and a userspace TCP/IP stack",
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       versionText(),
	}
	root.SetVersionTemplate("{{.Version}}\n")
	root.AddCommand(commands...)
	root.SetFlagErrorFunc(flagError)
	root.SetHelpCommand(helpCommand(root))
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	strict(root)
	return root
}

func proxyCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "proxy",
		Short: "run the daemon of one node",
		Long: "Runs the daemon of one node in the network namespace it is started in.\n" +
			"It is configured by environment variables (name, default, meaning):\n\n" + helpTable(),
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 && args[0] == "ztunnel" { // as ztunnel's chart starts it
				return nil
			}
			return noArgs(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := loadConfig(os.LookupEnv, os.Environ)
			if err != nil {
				return err
			}
			if err := c.deliberate(); err != nil {
				return err
			}
			held, err := permitted()
			if err == nil && !c.Mode.Dedicated {
				err = needRoot(cmd.CommandPath(), held, needs(c)[:required]...)
			}
			if err != nil {
				return err
			}
			c.Self.Args = strings.Join(append([]string{"proxy"}, args...), " ")
			if c.Privileges.Drop {
				held, err := dropPrivileges(c)
				if err != nil {
					c.Warnings = append(c.Warnings, fmt.Sprintf("capabilities that are not needed could not be given up: %v", err))
				}
				c.Privileges.Held = held
			}
			return runProxy(cmd.Context(), c)
		},
	}
}
