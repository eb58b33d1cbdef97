package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"ztun/admin"
)

func podCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "pod", Short: "attach, detach and list the pods of a running daemon"}
	var socket string
	cmd.PersistentFlags().StringVar(&socket, "socket", defaultSocket(os.Getenv), "control socket of the daemon (ZTUN_SOCKET)")
	client := func() *admin.PodClient { return admin.NewPodClient(socket) }

	var spec admin.PodSpec
	var ips []string
	add := &cobra.Command{
		Use: "add", Short: "attach a pod: its namespace gets a TUN with its addresses", Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			var err error
			if spec.IPs, err = parseIPs(ips); err != nil {
				return err
			}
			spec.NetNS = absoluteNetNS(spec.NetNS)
			if err := client().Add(c.Context(), spec); err != nil {
				return err
			}
			fmt.Printf("pod %s/%s attached\n", spec.Namespace, spec.Name)
			if pods, err := client().List(c.Context()); err == nil {
				for _, p := range pods {
					if p.Error != "" && p.Name == spec.Name && p.Namespace == spec.Namespace {
						fmt.Fprintln(os.Stderr, "warning:", p.Error)
					}
				}
			}
			return nil
		},
	}
	f := add.Flags()
	f.StringVar(&spec.Name, "name", "", "name of the pod")
	f.StringVar(&spec.Namespace, "namespace", "default", "namespace of the pod")
	f.StringVar(&spec.ServiceAccount, "service-account", "default", "service account of the pod")
	f.StringVar(&spec.NetNS, "netns", "", "network namespace: a path, a name of `ip netns`, or a process id")
	f.StringSliceVar(&ips, "ip", nil, "address of the pod, at most one per family: 10.1.0.2[,fd00::2]")
	f.IntVar(&spec.MTU, "mtu", 0, "MTU in bytes (default the daemon's ZTUN_MTU)")
	for _, name := range []string{"name", "netns", "ip"} {
		add.MarkFlagRequired(name)
	}

	var name, namespace string
	del := &cobra.Command{
		Use: "del", Short: "detach a pod: its connections may finish, then every trace is removed", Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := client().Delete(c.Context(), namespace, name); err != nil {
				return err
			}
			fmt.Printf("pod %s/%s detached\n", namespace, name)
			return nil
		},
	}
	del.Flags().StringVar(&name, "name", "", "name of the pod")
	del.Flags().StringVar(&namespace, "namespace", "default", "namespace of the pod")
	del.MarkFlagRequired("name")

	var output string
	list := &cobra.Command{
		Use: "list", Short: "list the pods of the daemon", Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			pods, err := client().List(c.Context())
			if err != nil {
				return err
			}
			return printPods(pods, output)
		},
	}
	list.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	cmd.AddCommand(add, del, list, podExecCommand(client))
	return cmd
}

// defaultSocket is where the daemon of this environment listens. (The one place beside config.go that
// reads the environment: the client has no use for the rest of it.)
func defaultSocket(getenv func(string) string) string {
	if s := getenv("ZTUN_SOCKET"); s != "" {
		return s
	}
	dir := getenv("ZTUN_STATE_DIR")
	if dir == "" {
		dir = "/var/run/ztun"
	}
	return filepath.Join(dir, "ztun.sock")
}

func parseIPs(texts []string) ([]netip.Addr, error) {
	out := make([]netip.Addr, 0, len(texts))
	for _, s := range texts {
		a, err := netip.ParseAddr(strings.TrimSpace(s))
		if err != nil {
			return nil, fmt.Errorf("--ip %s is not an IP address", s)
		}
		out = append(out, a.Unmap())
	}
	return out, nil
}

// absoluteNetNS makes a relative path absolute: the daemon has another working directory.
func absoluteNetNS(ref string) string {
	if strings.Contains(ref, "/") && !filepath.IsAbs(ref) {
		if abs, err := filepath.Abs(ref); err == nil {
			return abs
		}
	}
	return ref
}

func printPods(pods []admin.PodStatus, output string) error {
	if output == "json" {
		e := json.NewEncoder(os.Stdout)
		e.SetIndent("", "  ")
		return e.Encode(pods)
	}
	if output != "table" {
		return fmt.Errorf("--output %s: choose table or json", output)
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "NAMESPACE\tNAME\tSTATE\tADDRESSES\tNETNS\tOFFLOAD\tINBOUND\tOUTBOUND")
	for _, p := range pods {
		var ips []string
		for _, ip := range p.IPs {
			ips = append(ips, ip.String())
		}
		st := p.State
		if p.Error != "" {
			st += " (" + p.Error + ")"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%d\t%d\n", p.Namespace, p.Name, st, strings.Join(ips, ","), p.NetNS, p.Offload, p.Connections.Inbound, p.Connections.Outbound)
	}
	return w.Flush()
}
