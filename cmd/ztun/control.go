package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"ztun/admin/control"
	"ztun/admin/zlog"
	"ztun/proxy/ports"
)

func controlCommand() *cobra.Command {
	var o control.Options
	var logLevel, logFormat string
	cmd := &cobra.Command{
		Use: "control", Short: "run the embedded control plane, for machines without istiod", Args: noArgs,
		Long: "Serves workloads, services and policies to the daemons of all nodes, and signs their certificates, as " +
			"istiod\n" +
			"does, from a directory of YAML files in the schema of LOCAL_XDS. To begin:\n\n" +
			"  ztun control init /etc/ztun-control\n" +
			"  ztun control join --dir /etc/ztun-control --node node-a --out /etc/ztun   # for each node\n" +
			"  ztun control --dir /etc/ztun-control\n" +
			"  ztun control status --dir /etc/ztun-control\n",
		RunE: func(cmd *cobra.Command, _ []string) error { return runControl(cmd.Context(), o, logLevel, logFormat) },
	}
	cmd.PersistentFlags().StringVar(&o.Dir, "dir", ".", "directory of the control plane, made by ztun control init")
	cmd.PersistentFlags().StringVar(&o.Socket, "status-socket", "",
		"Unix socket of the status (default control.sock in --dir)")
	f := cmd.Flags()
	f.StringVar(&o.Mesh, "mesh", "", "directory of the YAML files (default mesh in --dir)")
	f.StringSliceVar(&o.Listen, "listen", []string{control.DefaultListen}, "TLS addresses for the daemons")
	f.StringSliceVar(&o.Hosts, "host", nil,
		"names and addresses in the server's certificate, besides localhost and the addresses it listens on (default the "+
			"host name)")
	f.StringVar(&o.Admin, "admin", "127.0.0.1:15014",
		`loopback address of the status over HTTP: a page at /, /status, /metrics, /healthz/ready ("": none)`)
	f.DurationVar(&o.MaxLife, "max-life", control.DefaultMaxLife,
		"longest life of a workload's certificate; nodes that ask for more get this")
	f.StringVar(&logLevel, "log", "info", "log levels, as RUST_LOG of ztun proxy")
	f.StringVar(&logFormat, "log-format", "plain", "plain or json")
	cmd.AddCommand(controlInitCommand(), controlJoinCommand(&o.Dir), controlLeaveCommand(&o.Dir), controlCheckCommand(&o),
		controlStatusCommand(&o))
	return cmd
}

func runControl(ctx context.Context, o control.Options, logLevel, logFormat string) error {
	filter, err := zlog.ParseFilter(logLevel)
	if err != nil {
		return fmt.Errorf("--log %s: %w", logLevel, err)
	}
	if logFormat != "plain" && logFormat != "json" {
		return fmt.Errorf("--log-format %s: choose plain or json", logFormat)
	}
	log := zlog.New(zlog.Options{Writer: os.Stdout, JSON: logFormat == "json", Control: zlog.NewControl(filter)})
	defer log.Close(context.Background())
	// A second signal ends the process at once: the first gives signals back to the system.
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	defer context.AfterFunc(ctx, stop)()
	o.Logger = log.Logger("control")
	s, err := control.New(ctx, o)
	if err != nil {
		return err
	}
	defer s.Close()
	return s.Run(ctx)
}

func controlInitCommand() *cobra.Command {
	var trustDomain string
	cmd := &cobra.Command{
		Use: "init DIR", Short: "make the directory of a new control plane: a CA, an example of a mesh", Args: oneArg("DIR"),
		ValidArgsFunction: directories,
		RunE: func(_ *cobra.Command, args []string) error {
			if err := control.Init(args[0], trustDomain); err != nil {
				return err
			}
			fmt.Printf("made a control plane in %s: describe the mesh in %s, add nodes with ztun control join, start ztun "+
				"control --dir %s\n",
				args[0], filepath.Join(args[0], "mesh"), args[0])
			return nil
		},
	}
	cmd.Flags().StringVar(&trustDomain, "trust-domain", "cluster.local", "trust domain of the mesh")
	return cmd
}

func controlJoinCommand(dir *string) *cobra.Command {
	var o control.JoinOptions
	var host string
	cmd := &cobra.Command{
		Use: "join", Short: "make the credentials of a node, or of one workload", Args: noArgs,
		Long: "Makes the credentials of a node's daemon (--node); or of one workload (--workload), whose process then may\n" +
			"be anywhere, without root: it learns the mesh and gets certificates for that workload's identity alone.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Dir = *dir
			out, err := filepath.Abs(o.Out)
			if err != nil {
				return err
			}
			if host == "" {
				if host, err = os.Hostname(); err != nil {
					return err
				}
			}
			if o.Address, err = controlAddress(host); err != nil {
				return err
			}
			member, err := control.Join(cmd.Context(), o)
			if err != nil {
				return err
			}
			if o.Workload != "" {
				fmt.Fprintf(os.Stderr, "wrote to %s what workload %s needs, and nobody else may have; its process:\n", out, member)
				fmt.Printf("ztun run --join %s -- COMMAND\n", out)
				return nil
			}
			root := filepath.Join(out, control.RootFile)
			fmt.Fprintf(os.Stderr,
				"wrote %s, %s, %s and %s to %s; the daemon of node %s needs one of token and certificate, and:\n",
				control.RootFile, control.TokenFile, control.CertFile, control.KeyFile, out, o.Node)
			fmt.Printf("NODE_NAME=%s\nXDS_ADDRESS=%s\nCA_ADDRESS=%s\nXDS_ROOT_CA=%s\nCA_ROOT_CA=%s\nAUTH_TOKEN=%s\n",
				o.Node, o.Address, o.Address, root, root, filepath.Join(out, control.TokenFile))
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Node, "node", "", "name of the node: its NODE_NAME, and the node of its workloads")
	f.StringVar(&o.Workload, "workload", "", "the workload: uid, NAMESPACE/NAME or name of its record in the mesh")
	f.StringVar(&o.Mesh, "mesh", "", "directory of the YAML files, for --workload (default mesh in --dir)")
	f.StringVar(&o.Out, "out", "", "directory to write the credentials to; a workload's may be one file, *.json")
	f.BoolVar(&o.Renew, "renew", false, "replace the credentials of who has joined before; the old ones end")
	f.DurationVar(&o.Life, "life", 0, fmt.Sprintf("validity of the client certificate, which is renewed "+
		"(default %v; of a workload %v); the token does not expire", control.DefaultLife, control.DefaultMaxLife))
	f.StringVar(&host, "host", "", "name or address of this machine, and :PORT if the control plane listens elsewhere "+
		"than at 15012, in what is printed or written (default the host name)")
	cmd.MarkFlagsOneRequired("node", "workload")
	cmd.MarkFlagsMutuallyExclusive("node", "workload")
	cmd.MarkFlagRequired("out")
	return cmd
}

// controlAddress is the URL of a control plane at HOST or HOST:PORT.
func controlAddress(host string) (string, error) {
	if _, _, err := net.SplitHostPort(host); err != nil { // no port, or an IPv6 address
		host = net.JoinHostPort(strings.Trim(host, "[]"), strconv.Itoa(ports.XDS))
	}
	address, err := parseAddress("https://" + host)
	if err != nil {
		return "", fmt.Errorf("--host %s: %w", host, err)
	}
	return address, nil
}

func controlLeaveCommand(dir *string) *cobra.Command {
	var node, workload string
	cmd := &cobra.Command{
		Use: "leave", Short: "end the credentials of a node or of a workload that has joined by itself", Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			who, err := "node "+node, error(nil)
			if workload != "" {
				who, err = control.LeaveWorkload(*dir, workload)
				who = "workload " + who
			} else {
				err = control.Leave(*dir, node)
			}
			if err != nil {
				return err
			}
			fmt.Printf(
				"%s has left; the control plane revokes its certificates and tells the nodes that follow it "+
					"(crl.pem in %s for others)\n", who, *dir)
			return nil
		},
	}
	cmd.Flags().StringVar(&node, "node", "", "name of the node")
	cmd.Flags().StringVar(&workload, "workload", "", "the workload, as for join")
	cmd.MarkFlagsOneRequired("node", "workload")
	cmd.MarkFlagsMutuallyExclusive("node", "workload")
	return cmd
}

func controlCheckCommand(o *control.Options) *cobra.Command {
	cmd := &cobra.Command{
		Use: "check", Short: "say what is wrong with the YAML files, without publishing them", Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			st, err := control.Check(o.Dir, o.Mesh)
			if err != nil {
				return err
			}
			control.WriteProblems(os.Stdout, st.Errors, st.ErrorCount)
			if st.ErrorCount > 0 {
				return fmt.Errorf("the directory cannot be published: %d errors", st.ErrorCount)
			}
			if st.WarningCount > 0 {
				fmt.Printf("%d warnings:\n", st.WarningCount)
				control.WriteProblems(os.Stdout, st.Warnings, st.WarningCount)
			}
			fmt.Printf("good: %d files, %d workloads, %d services, %d policies\n", st.Files, st.Workloads, st.Services,
				st.Policies)
			return nil
		},
	}
	cmd.Flags().StringVar(&o.Mesh, "mesh", "", "directory of the YAML files (default mesh in --dir)")
	return cmd
}

func controlStatusCommand(o *control.Options) *cobra.Command {
	var asJSON bool
	var out output
	cmd := &cobra.Command{
		Use: "status", Short: "show what is published and what each node has acknowledged", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.Socket == "" {
				o.Socket = filepath.Join(o.Dir, "control.sock")
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), 10*time.Second)
			defer cancel()
			st, err := control.FetchStatus(ctx, o.Socket)
			if err != nil {
				return err
			}
			if asJSON {
				out.format = outputJSON
			}
			if !out.structured() {
				return st.WriteTable(os.Stdout)
			}
			return out.write(os.Stdout, st)
		},
	}
	out.bind(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "the same as -o json")
	return cmd
}
