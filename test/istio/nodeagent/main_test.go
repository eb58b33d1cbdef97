package nodeagent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/version"
	"istio.io/istio/cni/pkg/constants"
	"istio.io/istio/cni/pkg/nodeagent"
	"istio.io/istio/cni/pkg/plugin"
	"istio.io/istio/cni/pkg/util"

	"ztun/test/lab"
)

// agentVariable has this program be istio-cni's agent, with these arguments (JSON).
const agentVariable = "ZTUN_TEST_ISTIO_AGENT"

type agentArguments struct {
	Kubeconfig, Plugin, ZDS string
	Mounts                  string // where the agent's container has the node's file system
	Ready                   string // a file that is there when the agent is ready
}

// selectors are those of istio-cni's chart: by the pod's label, or by its namespace's unless the pod says none.
const selectors = `[
 {"podSelector": {"matchLabels": {"istio.io/dataplane-mode": "ambient"}}},
 {"podSelector": {"matchExpressions": [{"key": "istio.io/dataplane-mode", "operator": "NotIn", "values": ["none"]}]},
  "namespaceSelector": {"matchLabels": {"istio.io/dataplane-mode": "ambient"}}}]`

// ztun and ztunAgent are the programs under test, built once by TestMain.
var ztun, ztunAgent string

func TestMain(m *testing.M) {
	if text := os.Getenv(agentVariable); text != "" {
		if err := beAgent(text); err != nil {
			fmt.Fprintln(os.Stderr, "the agent:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if os.Getenv("CNI_COMMAND") != "" {
		skel.PluginMainFuncs(skel.CNIFuncs{Add: plugin.CmdAdd, Check: plugin.CmdCheck, Del: plugin.CmdDelete}, version.All,
			"istio-cni")
		os.Exit(0)
	}
	os.Exit(func() int {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
		defer cancel()
		dir, err := os.MkdirTemp("", "ztun-nodeagent-")
		if err == nil {
			defer os.RemoveAll(dir)
			ztun, err = lab.Build(ctx, dir, "./cmd/ztun")
		}
		if err == nil {
			ztunAgent, err = lab.Build(ctx, dir, "./cmd/ztun-agent")
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "nodeagent:", err)
			return 1
		}
		return m.Run()
	}())
}

// beAgent is what istio-cni's DaemonSet runs, in the namespace that is the node's, until SIGTERM.
func beAgent(text string) error {
	var a agentArguments
	if err := json.Unmarshal([]byte(text), &a); err != nil {
		return err
	}
	var raw []util.EnablementSelector
	if err := json.Unmarshal([]byte(selectors), &raw); err != nil {
		return err
	}
	compiled, err := util.NewCompiledEnablementSelectors(raw)
	if err != nil {
		return err
	}
	constants.HostMountsPath = a.Mounts
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	var ready atomic.Value
	s, err := nodeagent.NewServer(ctx, &ready, a.Plugin, nodeagent.AmbientArgs{SystemNamespace: "istio-system",
		KubeConfig: a.Kubeconfig, ServerSocket: a.ZDS, EnablementSelector: compiled, DNSCapture: true, EnableIPv6: true})
	if err != nil {
		return err
	}
	s.Start()
	if ready.Load() != true {
		return errors.New("started, and not ready")
	}
	if err := os.WriteFile(a.Ready, nil, 0o600); err != nil {
		return err
	}
	<-ctx.Done()
	s.Stop(false)
	return nil
}
