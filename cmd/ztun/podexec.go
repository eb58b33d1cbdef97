package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"ztun/admin"
	"ztun/admin/suggest"
	"ztun/tun/netns"
)

// What a shell answers for a command that cannot be run; `ztun pod exec` does the same, and has the command's own
// exit code otherwise: it becomes the command.
const (
	exitNotRunnable = 126
	exitNotFound    = 127
)

func podExecCommand(client func() *admin.PodClient) *cobra.Command {
	var namespace string
	cmd := &cobra.Command{
		Use: "exec NAME -- COMMAND [ARGUMENT...]", Short: "run a command in the network of a pod",
		Long: "Runs a command in the network namespace of a pod of this node, as if it were the pod's application, and " +
			"ends with its\n" +
			"exit code. Files are those of the host, but for what /etc/netns has for the namespace's name (resolv.conf, " +
			"hosts), as\n" +
			"with ip netns exec. Needs root (CAP_SYS_ADMIN).\n\n" +
			"NAME may have the pod's namespace in front: shop/front-1.",
		Example: "  ztun pod exec front-1 -- curl -s http://stock/\n  ztun pod exec -n shop front-1 -- ip route",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) < 1 {
				return usageError(cmd, errors.New("ztun pod exec wants the NAME of a pod and a COMMAND"))
			}
			if len(command(args)) < 1 {
				return usageError(cmd, fmt.Errorf("ztun pod exec wants a COMMAND: ztun pod exec %s -- ip address", args[0]))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			pods, err := client().List(cmd.Context())
			if err != nil {
				return err
			}
			pod, err := findPod(pods, namespace, args[0])
			if err != nil {
				return err
			}
			return execIn(pod, command(args), os.Environ())
		},
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveDefault
			}
			return podNames(cmd.Context(), client(), namespace), cobra.ShellCompDirectiveNoFileComp
		},
	}
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "default", "namespace of the pod")
	cmd.Flags().SetInterspersed(false) // what follows NAME is the command's
	return cmd
}

// command is what follows NAME, with or without a -- between.
func command(args []string) []string {
	if len(args) > 1 && args[1] == "--" {
		return args[2:]
	}
	return args[1:]
}

// findPod finds a pod by NAME, which wins with a namespace of its own, NAMESPACE/NAME.
func findPod(pods []admin.PodStatus, namespace, name string) (admin.PodStatus, error) {
	if ns, n, ok := strings.Cut(name, "/"); ok {
		namespace, name = ns, n
	}
	var names, elsewhere []string
	for _, p := range pods {
		switch {
		case p.Name == name && p.Namespace == namespace:
			return p, nil
		case p.Name == name:
			elsewhere = append(elsewhere, p.Namespace+"/"+p.Name)
		case p.Namespace == namespace:
			names = append(names, p.Name)
		}
	}
	hint := suggest.DidYouMean(name, names)
	if len(elsewhere) > 0 {
		hint = "; there is " + strings.Join(elsewhere[:min(len(elsewhere), 5)], ", ")
	}
	return admin.PodStatus{}, fmt.Errorf("no pod %s/%s among the %d of this daemon%s", namespace, name, len(pods), hint)
}

// codedError is an error with an exit code of its own.
type codedError struct {
	code int
	err  error
}

func (e *codedError) Error() string { return e.err.Error() }
func (e *codedError) Unwrap() error { return e.err }

// findProgram is the file of a command. Its errors have the exit codes that a shell has for them.
func findProgram(name string) (string, error) {
	program, err := exec.LookPath(name)
	switch {
	case name == "":
		return "", &codedError{exitNotFound, errors.New("the command has no name")}
	case errors.Is(err, exec.ErrNotFound), errors.Is(err, fs.ErrNotExist):
		return "", &codedError{exitNotFound, fmt.Errorf("%s: command not found", name)}
	case err != nil && !errors.Is(err, exec.ErrDot): // a program of this directory is what was asked for by ./NAME alone
		return "", &codedError{exitNotRunnable, fmt.Errorf("%s cannot be run: %w", name, err)}
	case err != nil:
		return "", &codedError{exitNotFound, fmt.Errorf("%s: command not found (write ./%[1]s for the one here)", name)}
	}
	return program, nil
}

// startProgram starts a command. A script that does not say who reads it is a shell's, as with execvp(3).
func startProgram(c *exec.Cmd) (*exec.Cmd, error) {
	err := c.Start()
	if errors.Is(err, syscall.ENOEXEC) {
		script := exec.Command("/bin/sh", append([]string{c.Path}, c.Args[1:]...)...)
		script.Stdin, script.Stdout, script.Stderr, script.Env, script.Dir = c.Stdin, c.Stdout, c.Stderr, c.Env, c.Dir
		c, err = script, script.Start()
	}
	if err != nil {
		return nil, &codedError{exitNotRunnable, fmt.Errorf("%s cannot be run: %w", c.Args[0], err)}
	}
	return c, nil
}

// execIn becomes argv in the network of the pod. It returns only if that fails.
func execIn(pod admin.PodStatus, argv, env []string) error {
	program, err := findProgram(argv[0])
	if err != nil {
		return err
	}
	ns, err := netns.Open(pod.NetNS)
	if err != nil {
		return fmt.Errorf("the network of pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	defer ns.Close()
	// On success the thread that has entered the namespaces is the only one that goes on, as the new program.
	return ns.Do(func() error {
		if err := ownFiles(pod.NetNS); err != nil {
			return err
		}
		if err := syscall.Exec(program, argv, env); err != nil {
			return &codedError{exitNotRunnable, fmt.Errorf("%s cannot be run: %w", program, err)}
		}
		return nil
	})
}

// ownFiles puts the files that /etc/netns/NAME has for a namespace of `ip netns` in the place of those in /etc, for the
// calling thread and what it executes.
func ownFiles(ref string) error {
	dir := filepath.Join("/etc/netns", filepath.Base(ref))
	files, err := os.ReadDir(dir)
	if !slices.Contains([]string{".", netns.Dir, "/run/netns"}, filepath.Dir(ref)) || err != nil || len(files) == 0 {
		return nil // not a name of `ip netns`, or one without files
	}
	// Nothing of what follows may be seen by others. If it fails the thread must not be used again: nor is it, the
	// process ends.
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("mounting the files of %s: %w (CAP_SYS_ADMIN is needed)", dir, err)
	}
	if err := unix.Mount("", "/", "none", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("mounting the files of %s: %w", dir, err)
	}
	for _, f := range files {
		at := filepath.Join("/etc", f.Name())
		if err := unix.Mount(filepath.Join(dir, f.Name()), at, "none", unix.MS_BIND, ""); err != nil {
			// As ip netns exec: the command runs all the same.
			fmt.Fprintf(os.Stderr, "ztun: %s in the place of %s: %v\n", filepath.Join(dir, f.Name()), at, err)
		}
	}
	return nil
}

// podNames are the names of the daemon's pods, for a shell that completes them: of one namespace by themselves, of
// others with it. None if the daemon cannot be asked.
func podNames(ctx context.Context, client *admin.PodClient, namespace string) []string {
	ctx, cancel := context.WithTimeout(ctx, completionTimeout)
	defer cancel()
	pods, err := client.List(ctx)
	if err != nil {
		return nil
	}
	var names []string
	for _, p := range pods {
		if p.Namespace == namespace {
			names = append(names, p.Name)
		} else {
			names = append(names, p.Namespace+"/"+p.Name)
		}
	}
	return names
}
