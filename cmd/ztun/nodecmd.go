package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"ztun/admin"
	"ztun/cmd/attach"
	"ztun/cmd/attach/isolated"
)

func nodeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "node", Short: "tell or undo what ztun has changed on this host",
		Long: "Tells what of ztun's there is on this host, or takes it away: devices, routes, rules, and settings " +
			"of the kernel.\n" +
			"Both work without a daemon. Run them as root, in the network namespace in which the daemon ran.",
	}
	cmd.AddCommand(nodeStatusCommand(), nodeCleanCommand())
	return cmd
}

// stateDirFlag is --state-dir.
func stateDirFlag(cmd *cobra.Command) *string {
	def := os.Getenv("ZTUN_STATE_DIR")
	if def == "" {
		def = defaultStateDir()
	}
	return cmd.Flags().String("state-dir", def, "directory of the daemon's state (ZTUN_STATE_DIR)")
}

func nodeStatusCommand() *cobra.Command {
	var o output
	cmd := &cobra.Command{Use: "status", Short: "tell what of ztun's there is on this host", Args: noArgs}
	dir := stateDirFlag(cmd)
	o.bind(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		places, bad := savedPlaces(*dir)
		left, err := hostLeft(places, *dir)
		running, lerr := daemonRuns(*dir)
		if err = errors.Join(bad, err, lerr); err != nil {
			return err
		}
		s := nodeStatus{running, left}
		if o.structured() {
			return o.write(cmd.OutOrStdout(), s)
		}
		s.print(cmd.OutOrStdout())
		return nil
	}
	return cmd
}

// nodeStatus is what `ztun node status` tells.
type nodeStatus struct {
	Running bool `json:"running"`
	isolated.Left
}

func (s nodeStatus) print(w io.Writer) {
	if s.Running {
		fmt.Fprintln(w, "the daemon runs")
	} else {
		fmt.Fprintln(w, "the daemon does not run")
	}
	if s.Empty() {
		fmt.Fprintln(w, "there is nothing of ztun's on this host")
		return
	}
	for _, part := range []struct {
		what  string
		lines []string
	}{{"devices", s.Devices}, {"routes", s.Routes}, {"rules", s.Rules},
		{"settings of the kernel; to set them back", s.Sysctls}} {
		if len(part.lines) == 0 {
			continue
		}
		fmt.Fprintf(w, "%s:\n", part.what)
		for _, l := range part.lines {
			fmt.Fprintf(w, "  %s\n", l)
		}
	}
}

func nodeCleanCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "clean", Short: "take away what ztun has left on this host", Args: noArgs,
		Long: "Removes the devices of pods (with their addresses and routes) and of the node, the node's routes and\n" +
			"rules, and the list of pods, and gives settings of the kernel that are still as ztun has set them their former\n" +
			"values. The daemon must have ended. Pods that were captured have no network after that. Cleaning a clean host\n" +
			"changes nothing.",
	}
	dir := stateDirFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		running, err := daemonRuns(*dir)
		if err != nil {
			return err
		}
		if running {
			return fmt.Errorf("the daemon of %s runs and would be cut off from its pods: stop it first", *dir)
		}
		places, bad := savedPlaces(*dir)
		before, err := hostLeft(places, *dir)
		if err != nil {
			return errors.Join(bad, err)
		}
		if err := errors.Join(bad, hostUndo(places, *dir)); err != nil {
			return err // the list and the record stay, for another try
		}
		for _, f := range []string{filepath.Join(*dir, podsFile), hostRecord(*dir)} {
			if err := os.Remove(f); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
		out := cmd.OutOrStdout()
		if before.Empty() {
			fmt.Fprintln(out, "there was nothing of ztun's on this host")
			return nil
		}
		for _, part := range []struct {
			what string
			n    int
		}{{"devices", len(before.Devices)}, {"routes", len(before.Routes)}, {"rules", len(before.Rules)},
			{"settings set back", len(before.Sysctls)}} {
			fmt.Fprintf(out, "%s: %d\n", part.what, part.n)
		}
		return nil
	}
	return cmd
}

// daemonRuns reports whether a daemon has the control socket of a state directory, or ZTUN_SOCKET.
func daemonRuns(dir string) (bool, error) {
	for _, socket := range []string{filepath.Join(dir, "ztun.sock"), os.Getenv("ZTUN_SOCKET")} {
		if socket == "" {
			continue
		}
		if held, err := admin.SocketHeld(socket); held || err != nil {
			return held, err
		}
	}
	return false, nil
}

// savedPlaces is where the pods live that a daemon has written down. The error is about those that cannot be read.
func savedPlaces(dir string) ([]attach.Place, error) {
	path := filepath.Join(dir, podsFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	specs, err := readSaved(b)
	if err != nil {
		err = fmt.Errorf("%s: %w", path, err)
	}
	var places []attach.Place
	for _, s := range specs {
		places = append(places, s.place())
	}
	return places, err
}
