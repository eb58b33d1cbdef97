package agentcmd

import (
	"cmp"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Program is the name of the program that does the work, in the directory of ztun.
const Program = "ztun-agent"

// Options are what the flags say.
type Options struct {
	Node              string
	ZDSSocket         string
	PluginSocket      string
	CNIConfDir        string
	CNIBinDir         string
	DaemonSet         string
	Proc              string
	HostRoot          string
	MeshNamespace     string
	ExcludeNamespaces []string
	Listen            string
	Kubeconfig        string
	Log, LogFormat    string
	Ztun              string // the ztun program, which is the CNI plugin as well; not a flag
}

// Command is `ztun agent`, which does run.
func Command(use string, args cobra.PositionalArgs, run func(*cobra.Command, Options) error) *cobra.Command {
	var o Options
	cmd := &cobra.Command{
		Use: use, Short: "run a Kubernetes node's agent, which tells ztun proxy of the pods (in place of istio-cni)",
		Args: args,
		Long: "Watches the pods of this node and tells the node proxy which of them are the mesh's (label " +
			"istio.io/dataplane-mode\n" +
			"of the pod or of its namespace), over the socket that the proxy's INPOD_UDS names. It takes istio-cni's place: " +
			"where\n" +
			"that runs it is not needed. A CNI plugin (ztun cni, or istio-cni's own) may ask it for each new pod, which then\n" +
			"starts only when a proxy has it.\n\n" +
			"The proxy captures the pods, by ZTUN_STEERING=steered.",
		RunE: func(cmd *cobra.Command, _ []string) error { return run(cmd, o) },
	}
	f := cmd.Flags()
	f.StringVar(&o.Node, "node", os.Getenv("NODE_NAME"), "name of this node (default $NODE_NAME)")
	f.StringVar(&o.ZDSSocket, "zds-socket", cmp.Or(os.Getenv("INPOD_UDS"), "/var/run/ztunnel/ztunnel.sock"),
		"socket for the node's proxies (default $INPOD_UDS, as theirs)")
	f.StringVar(&o.PluginSocket, "plugin-socket", "/var/run/istio-cni/pluginevent.sock",
		`socket for the CNI plugin ("": none, then the watch alone says which pods there are)`)
	f.StringVar(&o.CNIConfDir, "cni-conf-dir", "", "directory of the node's network configurations, into which the CNI "+
		"plugin is put,\nunder the name that it has on the node (\"\": the plugin is not installed)")
	f.StringVar(&o.CNIBinDir, "cni-bin-dir", "/opt/cni/bin", "directory of the node's CNI plugins, likewise")
	f.StringVar(&o.DaemonSet, "daemonset", Program, "name of the agent's DaemonSet: the plugin goes when that does")
	f.StringVar(&o.Proc, "proc", "/proc", "proc file system that shows the node's processes")
	f.StringVar(&o.HostRoot, "host-root", "/",
		"directory below which the plugin's paths of network namespaces (/var/run/netns/...) are")
	f.StringVar(&o.MeshNamespace, "mesh-namespace", cmp.Or(os.Getenv("POD_NAMESPACE"), "istio-system"),
		"namespace of the node proxies (default $POD_NAMESPACE), which are not pods of the mesh")
	f.StringSliceVar(&o.ExcludeNamespaces, "exclude-namespaces", []string{"kube-system"},
		"namespaces whose pods are never the mesh's")
	f.StringVar(&o.Listen, "listen", ":15025", `address of /healthz/ready and /metrics ("": none)`)
	f.StringVar(&o.Kubeconfig, "kubeconfig", "", "file that says how to reach the API server (default as a pod does)")
	f.StringVar(&o.Log, "log", cmp.Or(os.Getenv("RUST_LOG"), "info"), "log levels (default $RUST_LOG), as of ztun proxy")
	f.StringVar(&o.LogFormat, "log-format", cmp.Or(os.Getenv("LOG_FORMAT"), "plain"),
		"plain or json (default $LOG_FORMAT)")
	return cmd
}

// Arguments are the flags that were given, as arguments.
func Arguments(f *pflag.FlagSet) (args []string) {
	f.Visit(func(f *pflag.Flag) {
		value := f.Value.String()
		if s, ok := f.Value.(pflag.SliceValue); ok {
			value = strings.Join(s.GetSlice(), ",")
		}
		args = append(args, "--"+f.Name+"="+value)
	})
	return args
}
