package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"ztun/admin/zlog"
	"ztun/cmd/agentcmd"
)

func main() {
	cmd := agentcmd.Command(agentcmd.Program, cobra.NoArgs, func(cmd *cobra.Command, o agentcmd.Options) error {
		return start(cmd.Context(), o)
	})
	cmd.SilenceUsage, cmd.SilenceErrors = true, true
	if err := cmd.ExecuteContext(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "ztun agent:", err)
		os.Exit(1)
	}
}

// start runs an agent until a signal.
func start(ctx context.Context, o agentcmd.Options) error {
	filter, err := zlog.ParseFilter(o.Log)
	if err != nil {
		return fmt.Errorf("--log %s: %w", o.Log, err)
	}
	if o.Node == "" {
		return errors.New("no --node: the name of this node is needed, as the API server has it (NODE_NAME)")
	}
	config, err := restConfig(o.Kubeconfig)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	o.Ztun = filepath.Join(filepath.Dir(self), "ztun")
	log := zlog.New(zlog.Options{Writer: os.Stdout, JSON: o.LogFormat == "json", Control: zlog.NewControl(filter)})
	defer log.Close(context.Background())
	klog.SetSlogLogger(log.Logger("kubernetes"))
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	defer context.AfterFunc(ctx, stop)() // a second signal ends the process at once
	n, err := newNode(o, config, log.Logger)
	if err != nil {
		return err
	}
	return n.run(ctx)
}

// restConfig says how to reach the API server.
func restConfig(file string) (*rest.Config, error) {
	if file == "" {
		c, err := rest.InClusterConfig()
		if err != nil {
			return nil, fmt.Errorf("no --kubeconfig, and this is no pod with a service account: %w", err)
		}
		return c, nil
	}
	c, err := clientcmd.BuildConfigFromFlags("", file)
	if err != nil {
		return nil, fmt.Errorf("--kubeconfig: %w", err)
	}
	return c, nil
}
