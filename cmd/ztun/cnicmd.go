package main

import (
	"path/filepath"

	"github.com/spf13/cobra"

	"ztun/cmd/cni"
)

// isPlugin reports whether the program was started under the name by which a container runtime knows the CNI plugin.
func isPlugin(args []string) bool {
	return len(args) > 0 && filepath.Base(args[0]) == cni.PluginType
}

// runPlugin is the CNI plugin; it returns the exit code.
func runPlugin() int { return cni.Main("CNI plugin " + cni.PluginType + " of " + versionText()) }

func cniCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "cni", Short: "be the CNI plugin of `ztun agent`, or take it off this node", Args: noArgs,
		Long: "The CNI plugin by which a pod of the mesh starts only when it is captured. A container runtime runs it under\n" +
			"the name " + cni.PluginType + " or as this command, with CNI's environment and standard input; `ztun agent` installs it.",
		RunE: func(*cobra.Command, []string) error {
			if code := runPlugin(); code != 0 {
				return exitStatus(code) // the plugin has said why, as CNI has it
			}
			return nil
		},
	}
	cmd.AddCommand(cniUninstallCommand())
	return cmd
}

func cniUninstallCommand() *cobra.Command {
	var confDir, binDir string
	cmd := &cobra.Command{
		Use: "uninstall", Short: "take the CNI plugin off this node", Args: noArgs,
		Long: "Takes the plugin out of the node's network configurations, which are otherwise left as they are, and removes\n" +
			"its program. `ztun agent` does so by itself when its DaemonSet is deleted; this is for a node on which it could not:\n" +
			"the plugin itself does it, /opt/cni/bin/" + cni.PluginType + " uninstall. An agent that runs would install it again.",
		RunE: func(*cobra.Command, []string) error { return cni.Uninstall(confDir, binDir) },
	}
	cmd.Flags().StringVar(&confDir, "cni-conf-dir", "/etc/cni/net.d", "`directory` of network configurations")
	cmd.Flags().StringVar(&binDir, "cni-bin-dir", "/opt/cni/bin", "`directory` of CNI plugins")
	return cmd
}
