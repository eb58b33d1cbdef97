package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
)

// Error codes of our own, which CNI has from 100 on.
const (
	codeRefused = 100 // the agent refuses
)

// Main is the plugin: what a runtime runs, with CNI's environment, standard input and output. It returns the exit code.
func Main(about string) int {
	p := plugin{out: os.Stdout, patience: usual}
	err := skel.PluginMainFuncsWithError(skel.CNIFuncs{
		Add: p.add, Check: p.check, Del: nothing, GC: nothing, Status: nothing,
	}, version.All, about)
	if err == nil {
		return 0
	}
	if perr := err.Print(); perr != nil {
		fmt.Fprintln(os.Stderr, "ztun-cni: the error cannot be written:", perr)
	}
	return 1
}

type plugin struct {
	out      io.Writer
	patience patience
}

// conf is what a runtime writes to standard input: our entry, and what comes with it.
type conf struct {
	Entry
	CNIVersion string          `json:"cniVersion"`
	Raw        json.RawMessage `json:"prevResult"` // of the plugins before, and ours as well
}

// kubernetes is what a Kubernetes runtime says of the pod in CNI_ARGS. The names are the protocol's.
type kubernetes struct {
	types.CommonArgs
	K8S_POD_NAME               types.UnmarshallableString
	K8S_POD_NAMESPACE          types.UnmarshallableString
	K8S_POD_UID                types.UnmarshallableString
	K8S_POD_INFRA_CONTAINER_ID types.UnmarshallableString
}

// nothing is DEL, GC and STATUS; doc.go says why.
func nothing(*skel.CmdArgs) error { return nil }

// check is CHECK: what the plugins before have made is theirs to check, and the capture is the agent's to mend.
func (p plugin) check(args *skel.CmdArgs) error {
	_, _, err := read(args.StdinData)
	return err
}

// add is ADD.
func (p plugin) add(args *skel.CmdArgs) error {
	c, result, err := read(args.StdinData)
	if err != nil {
		return err
	}
	// Whatever else a runtime has to tell is not ours to refuse.
	k := kubernetes{CommonArgs: types.CommonArgs{IgnoreUnknown: true}}
	if err := types.LoadArgs(args.Args, &k); err != nil {
		return types.NewError(types.ErrInvalidEnvironmentVariables, "ztun: CNI_ARGS cannot be read", err.Error())
	}
	name, namespace := string(k.K8S_POD_NAME), string(k.K8S_POD_NAMESPACE)
	if name != "" && namespace != "" { // anything else is no pod of Kubernetes
		ev := Event{Netns: args.Netns, PodName: name, PodNamespace: namespace, PodUID: string(k.K8S_POD_UID)}
		for _, ip := range result.IPs {
			ev.IPs = append(ev.IPs, IP{ip.Interface, ip.Address, ip.Gateway})
		}
		if err := admit(context.Background(), c.Entry, ev, p.patience); err != nil {
			return explain(err, ev, c.Socket)
		}
	}
	_, err = p.out.Write(c.Raw)
	return err
}

// explain makes of why a pod must not start what kubelet reports as an event of the pod.
func explain(err error, ev Event, socket string) error {
	pod := ev.PodNamespace + "/" + ev.PodName
	var r *refusal
	if errors.As(err, &r) {
		return types.NewError(codeRefused, fmt.Sprintf("ztun: pod %s is not captured: the node agent refuses it", pod),
			fmt.Sprintf("%s (status %d)", r.reason, r.status))
	}
	return types.NewError(types.ErrTryAgainLater, fmt.Sprintf("ztun: pod %s does not start uncaptured", pod),
		fmt.Sprintf("%v; does ztun's agent run on this node? (%s)", err, socket))
}

// read reads the configuration and the result of the plugins before.
func read(stdin []byte) (conf, *current.Result, error) {
	var c conf
	bad := func(msg string, err error) (conf, *current.Result, error) {
		e := types.NewError(types.ErrInvalidNetworkConfig, "ztun: "+msg, "")
		if err != nil {
			e.Details = err.Error()
		}
		return conf{}, nil, e
	}
	if err := json.Unmarshal(stdin, &c); err != nil {
		return bad("the configuration cannot be read", err)
	}
	if c.Socket == "" || c.Enrolled == "" {
		return bad(`the configuration lacks "socket" or "enrolled": it is not what the agent has written`, nil)
	}
	if len(c.Raw) == 0 || string(c.Raw) == "null" {
		return bad("there is no prevResult: the plugin works only behind the one that makes the network", nil)
	}
	prev, err := version.NewResult(c.CNIVersion, c.Raw)
	if err != nil {
		return bad("prevResult cannot be read", err)
	}
	result, err := current.NewResultFromResult(prev)
	if err != nil {
		return bad("prevResult cannot be read", err)
	}
	return c, result, nil
}
