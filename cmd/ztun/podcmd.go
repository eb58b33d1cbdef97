package main

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ztun/admin"
)

func podCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "pod", Short: "attach, detach and list the pods of a running daemon"}
	var a asker
	a.bind(cmd)
	client := a.client

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
	f.StringVar(&spec.NetNS, "netns", "", "network namespace: a path, a name of 'ip netns', or a process id")
	f.StringSliceVar(&ips, "ip", nil, "address of the pod, at most one per family: 10.1.0.2[,fd00::2]; not needed where "+
		"its namespace has one (steered, redirected)")
	f.StringVar(&spec.UID, "uid", "", "what the pod is known by, if several may have its name for a while")
	f.IntVar(&spec.MTU, "mtu", 0, "MTU in bytes (default the daemon's ZTUN_MTU)")
	for _, name := range []string{"name", "netns"} {
		add.MarkFlagRequired(name)
	}

	var name, namespace, uid string
	del := &cobra.Command{
		Use: "del", Short: "detach a pod: its connections may finish, then every trace is removed", Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if uid != "" {
				if err := client().DeleteUID(c.Context(), uid); err != nil {
					return err
				}
				fmt.Printf("pod %s detached\n", uid)
				return nil
			}
			if err := client().Delete(c.Context(), namespace, name); err != nil {
				return err
			}
			fmt.Printf("pod %s/%s detached\n", namespace, name)
			return nil
		},
	}
	del.Flags().StringVar(&name, "name", "", "name of the pod")
	del.Flags().StringVar(&namespace, "namespace", "default", "namespace of the pod")
	del.Flags().StringVar(&uid, "uid", "", "uid of the pod, in place of its name (ztun pod list -o wide shows it)")
	del.MarkFlagsOneRequired("name", "uid")
	del.MarkFlagsMutuallyExclusive("name", "uid")
	del.MarkFlagsMutuallyExclusive("namespace", "uid")

	var o output
	var follow bool
	list := &cobra.Command{
		Use: "list", Short: "list the pods of the daemon", Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return watching[admin.PodStatus]{
				out: c.OutOrStdout(), o: &o, every: time.Second, columns: podColumns, fetch: client().List,
				key:  func(p admin.PodStatus) string { return p.Namespace + "/" + p.Name },
				text: func(p admin.PodStatus) string { return fmt.Sprint(p) },
				gone: func(p admin.PodStatus) admin.PodStatus { p.State, p.Error = "Gone", ""; return p },
			}.run(c.Context(), follow, func(all []admin.PodStatus) any { return all })
		},
	}
	o.bind(list)
	list.Flags().BoolVarP(&follow, "watch", "w", false, "go on and show what changes")
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
		dir = defaultStateDir()
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

var podColumns = []column[admin.PodStatus]{
	{head: "NAMESPACE", cell: func(p admin.PodStatus) string { return p.Namespace }},
	{head: "NAME", cell: func(p admin.PodStatus) string { return p.Name }},
	{head: "STATE", cell: func(p admin.PodStatus) string {
		if p.Error != "" {
			return p.State + " (" + p.Error + ")"
		}
		return p.State
	}},
	{head: "ADDRESSES", cell: func(p admin.PodStatus) string {
		var ips []string
		for _, ip := range p.IPs {
			ips = append(ips, ip.String())
		}
		return strings.Join(ips, ",")
	}},
	{head: "NETNS", cell: func(p admin.PodStatus) string { return p.NetNS }},
	{head: "OFFLOAD", cell: func(p admin.PodStatus) string { return p.Offload.String() }},
	{head: "INBOUND", cell: func(p admin.PodStatus) string { return strconv.Itoa(p.Connections.Inbound) }},
	{head: "OUTBOUND", cell: func(p admin.PodStatus) string { return strconv.Itoa(p.Connections.Outbound) }},
	{head: "SERVICE-ACCOUNT", wide: true, cell: func(p admin.PodStatus) string { return p.ServiceAccount }},
	{head: "DEVICE", wide: true, cell: func(p admin.PodStatus) string { return p.Device }},
	{head: "MTU", wide: true, cell: func(p admin.PodStatus) string {
		if p.MTU == 0 {
			return ""
		}
		return strconv.Itoa(p.MTU)
	}},
	{head: "UID", wide: true, cell: func(p admin.PodStatus) string { return p.UID }},
}
