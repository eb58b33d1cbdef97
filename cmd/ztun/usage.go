package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"ztun/admin/suggest"
)

// What the commands say to those who mistype them: nothing that is not known is passed over in silence, and every
// refusal names what may have been meant.

// noArgs refuses every argument.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return usageError(cmd, fmt.Errorf("%s takes no argument, found %q", cmd.CommandPath(), args[0]))
}

// oneArg wants one argument, what.
func oneArg(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch len(args) {
		case 0:
			return usageError(cmd, fmt.Errorf("%s wants %s", cmd.CommandPath(), what))
		case 1:
			return nil
		}
		return usageError(cmd, fmt.Errorf("%s takes one argument, %s; found %q as well", cmd.CommandPath(), what, args[1]))
	}
}

// usageError says where to look.
func usageError(cmd *cobra.Command, err error) error {
	return fmt.Errorf("%w (%s --help says more)", err, cmd.CommandPath())
}

// strict makes a tree of commands refuse words that are neither a command nor a flag of theirs, with a suggestion.
// Cobra by itself shows the help of a command with subcommands and ends with 0.
func strict(cmd *cobra.Command) {
	if cmd.HasSubCommands() {
		inner := cmd.Args
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 && (inner == nil || inner(cmd, args) != nil) {
				return unknownCommand(cmd, args[0])
			}
			return nil
		}
		if cmd.Run == nil && cmd.RunE == nil {
			cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
		}
	}
	for _, sub := range cmd.Commands() {
		strict(sub)
	}
}

func unknownCommand(cmd *cobra.Command, word string) error {
	var known []string
	for _, sub := range cmd.Commands() {
		if sub.IsAvailableCommand() || sub.Name() == "help" {
			known = append(known, append([]string{sub.Name()}, sub.Aliases...)...)
		}
	}
	return usageError(cmd, fmt.Errorf("unknown command %q for %q%s", word, cmd.CommandPath(),
		suggest.DidYouMean(word, known)))
}

// flagError names the flag that may have been meant.
func flagError(cmd *cobra.Command, err error) error {
	var unknown *pflag.NotExistError
	if errors.As(err, &unknown) {
		var known []string
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			if !f.Hidden {
				known = append(known, f.Name)
			}
		})
		if name := suggest.Closest(unknown.GetSpecifiedName(), known); name != "" {
			err = fmt.Errorf("%w; did you mean --%s?", err, name)
		}
	}
	return usageError(cmd, err)
}

// helpCommand is cobra's own, but that a topic that does not exist is an error.
func helpCommand(root *cobra.Command) *cobra.Command {
	return &cobra.Command{
		Use: "help [COMMAND]", Short: "show the help of a command",
		Args: cobra.ArbitraryArgs, // words of a command, which RunE looks for
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			cmd, _, err := root.Find(args)
			if err != nil {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			var names []string
			for _, sub := range cmd.Commands() {
				if sub.IsAvailableCommand() {
					names = append(names, sub.Name()+"\t"+sub.Short)
				}
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(_ *cobra.Command, args []string) error {
			cmd, rest, err := root.Find(args)
			if err != nil {
				return err
			}
			if len(rest) > 0 {
				return unknownCommand(cmd, rest[0])
			}
			cmd.InitDefaultHelpFlag()
			return cmd.Help()
		},
	}
}

// needRoot says which of the needed capabilities are missing, and what they are for; nil if none is.
func needRoot(what string, held capSet, needed ...need) error {
	var missing []string
	for _, n := range needed {
		if held&capsOf(n.cap) == 0 {
			missing = append(missing, fmt.Sprintf("%s: %s", capNames[n.cap], n.why))
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return fmt.Errorf("%s needs root (%s)", what, strings.Join(missing, "; "))
}

// permissionHint says what a refusal of the kernel asks for, where the error does not say so itself; "" for other
// errors.
func permissionHint(err error) string {
	if !errors.Is(err, fs.ErrPermission) || strings.Contains(err.Error(), "CAP_") ||
		strings.Contains(err.Error(), "root") {
		return ""
	}
	var op *net.OpError
	var coded *codedError
	switch {
	case errors.As(err, &coded) && coded.code == exitNotRunnable:
		return "" // the user's own program
	case errors.As(err, &op) && op.Op == "listen":
		return " (needs root, or CAP_NET_BIND_SERVICE, for a port below 1024)"
	case errors.Is(err, syscall.EACCES):
		return " (needs root, which has CAP_DAC_OVERRIDE, or the user whom the path belongs to)"
	}
	return " (needs root: " + capsOf(unix.CAP_NET_ADMIN, unix.CAP_SYS_ADMIN).String() + ")"
}
