package nodeagent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"ztun/test/lab"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually polls until f is content; what it said last is the failure.
func eventually(t testing.TB, f func() error) {
	t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// rig is one node: an API server, istio-cni's agent and ztun in ztunnel's place.
type rig struct {
	*lab.World
	t          *testing.T
	ctx        context.Context
	api        *apiServer
	kubeconfig string
	runDir     string // the agent's sockets, and what istio-cni's plugin reads
	args       agentArguments
}

func newRig(t *testing.T) *rig {
	lab.Require(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	t.Cleanup(cancel)
	r := &rig{World: lab.ForTest(t, lab.Options{Bin: ztun}), t: t, ctx: ctx, api: newAPIServer(t)}
	l, err := r.N1.NS.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	s := &http.Server{Handler: r.api}
	served := make(chan struct{})
	go func() { defer close(served); s.Serve(l) }()
	t.Cleanup(func() { s.Close(); <-served })
	r.runDir = r.Path("run")
	must(t, os.Mkdir(r.runDir, 0o755))
	r.kubeconfig = filepath.Join(r.runDir, "istio-cni-kubeconfig")
	must(t, os.WriteFile(r.kubeconfig, []byte(fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "http://%s"}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
users: [{name: u, user: {}}]
current-context: x
`, l.Addr())), 0o600))
	r.args = agentArguments{Kubeconfig: r.kubeconfig, Plugin: filepath.Join(r.runDir, "pluginevent.sock"),
		ZDS: filepath.Join(r.runDir, "ztunnel.sock"), Mounts: r.Path("host"), Ready: filepath.Join(r.runDir, "ready")}
	// The node's process 1 is in the node's namespace, as whoever follows the link is; and there is no other.
	for link, to := range map[string]string{"proc/1/ns/net": "/proc/self/ns/net", "var/run/netns": "/var/run/netns"} {
		path := filepath.Join(r.args.Mounts, link)
		must(t, os.MkdirAll(filepath.Dir(path), 0o755))
		must(t, os.Symlink(to, path))
	}
	r.api.namespace("shop", object{"istio.io/dataplane-mode": "ambient"})
	r.api.namespace("infra", object{})
	return r
}

// istioAgent starts istio-cni's agent and waits until it is ready.
func (r *rig) istioAgent() {
	r.t.Helper()
	text, err := json.Marshal(r.args)
	must(r.t, err)
	p := r.agent([]string{"/proc/self/exe"}, agentVariable+"="+string(text))
	r.until(p, func() error {
		_, err := os.Stat(r.args.Ready)
		return err
	})
}

// ztunAgent starts ztun's, as istio-cni's.
func (r *rig) ztunAgent(flags ...string) {
	r.t.Helper()
	p := r.agent(append([]string{ztunAgent, "--kubeconfig=" + r.kubeconfig, "--plugin-socket=" + r.args.Plugin,
		"--zds-socket=" + r.args.ZDS, "--listen=127.0.0.1:15025", "--log=debug"}, flags...))
	r.until(p, func() error {
		resp, err := r.N1.NS.HTTP(10 * time.Second).Get("http://127.0.0.1:15025/healthz/ready")
		if err != nil {
			return err
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return errors.New(resp.Status)
		}
		return nil
	})
}

// agent starts a node agent; its end is the test's.
func (r *rig) agent(args []string, env ...string) *lab.Process {
	r.t.Helper()
	log, err := os.Create(r.Path("agent.log"))
	must(r.t, err)
	defer log.Close()
	p, err := r.Start(r.N1.NS, lab.Cmd{Args: args, Stdout: log, Stderr: log,
		Env: append(append(lab.BaseEnv(), "NODE_NAME=n1", "POD_NAMESPACE=istio-system"), env...)})
	must(r.t, err)
	r.t.Cleanup(func() {
		if r.t.Failed() {
			b, _ := os.ReadFile(log.Name())
			r.t.Logf("the agent's log ends:\n%s", b[max(0, len(b)-6000):])
		}
		p.Signal(syscall.SIGTERM)
		ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
		defer cancel()
		p.Wait(ctx)
	})
	return p
}

// until waits for an agent that runs.
func (r *rig) until(p *lab.Process, f func() error) {
	r.t.Helper()
	eventually(r.t, func() error {
		select {
		case <-p.Done():
			r.t.Fatalf("the agent has ended: %v", p.Err())
		default:
		}
		return f()
	})
}

// proxy starts ztun with ztunnel's environment.
func (r *rig) proxy(env map[string]string) *lab.Daemon {
	r.t.Helper()
	all := map[string]string{"INPOD_ENABLED": "true", "INPOD_UDS": r.args.ZDS, "POD_NAME": "ztunnel-n1",
		"POD_NAMESPACE": "istio-system", "SERVICE_ACCOUNT": "ztunnel"}
	for k, v := range env {
		all[k] = v
	}
	d, err := r.StartDaemon(r.ctx, r.N1, lab.DaemonOptions{Env: all, ReadyWait: 60 * time.Second})
	must(r.t, err)
	return d
}

// started is a pod for which the runtime has made a namespace and a network, and is about to run the plugin.
func (r *rig) started(namespace, name string, labels object) *lab.Host {
	r.t.Helper()
	h, err := r.AddHost(r.N1, name)
	must(r.t, err)
	r.api.pod(namespace, name, "n1", labels)
	return h
}

// add runs a plugin as a runtime does; conf is what its entry in the network configuration has of its own.
func (r *rig) add(program []string, namespace string, h *lab.Host, conf object) (stdout, prev string, err error) {
	r.t.Helper()
	prev = fmt.Sprintf(`{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":%q}],"ips":[`+
		`{"interface":0,"address":"%s/32"},{"interface":0,"address":"%s/128"}],"dns":{}}`, h.NS.Path(), h.V4(), h.V6())
	all := object{"cniVersion": "1.0.0", "name": "net", "prevResult": json.RawMessage(prev)}
	for k, v := range conf {
		all[k] = v
	}
	in, err := json.Marshal(all)
	must(r.t, err)
	args := fmt.Sprintf("IgnoreUnknown=1;K8S_POD_NAMESPACE=%s;K8S_POD_NAME=%s;K8S_POD_INFRA_CONTAINER_ID=c;K8S_POD_UID=uid-%s",
		namespace, h.Name, h.Name)
	out, err := r.RunCmd(r.ctx, r.N1.NS, lab.Cmd{Args: program, Stdin: strings.NewReader(string(in)),
		Env: append(lab.BaseEnv(), "CNI_COMMAND=ADD", "CNI_CONTAINERID=c-"+h.Name, "CNI_NETNS="+h.NS.Path(),
			"CNI_IFNAME=eth0", "CNI_PATH=/opt/cni/bin", "CNI_ARGS="+args)})
	return out, prev, err
}

// ours is ztun's plugin, asked about a pod.
func (r *rig) ours(namespace string, h *lab.Host) (stdout string, err error) {
	r.t.Helper()
	enrolled := r.Path("enrolled.json")
	must(r.t, os.WriteFile(enrolled, []byte(`{"namespaces":["shop"]}`), 0o600))
	out, prev, err := r.add([]string{ztun, "cni"}, namespace, h,
		object{"type": "ztun-cni", "socket": r.args.Plugin, "enrolled": enrolled})
	if err == nil && out != prev {
		r.t.Errorf("%s: our plugin hands on %s; it was given %s", h.Name, out, prev)
	}
	return out, err
}

// theirs is istio-cni's.
func (r *rig) theirs(namespace string, h *lab.Host) (stdout string, err error) {
	r.t.Helper()
	out, _, err := r.add([]string{"/proc/self/exe"}, namespace, h, object{"type": "istio-cni",
		"cni_agent_run_dir": r.runDir, "ambient_enabled": true, "enablement_selectors": json.RawMessage(selectors),
		"pod_namespace": "istio-system"})
	return out, err
}

// attached lists the pods that the proxy serves.
func (r *rig) attached() string {
	out, err := r.PodCmd(r.ctx, r.N1, "list")
	if err != nil {
		return err.Error()
	}
	return out
}

// asking is ours or theirs.
type asking func(namespace string, h *lab.Host) (stdout string, err error)

// starts runs a plugin until it lets a pod start, as kubelet does: an agent's informer may be behind the API server.
func (r *rig) starts(p asking, namespace string, h *lab.Host) {
	r.t.Helper()
	eventually(r.t, func() error {
		_, err := p(namespace, h)
		return err
	})
}

const redirection = "ambient.istio.io/redirection"

// served checks that a pod is captured by the time that the plugin has returned, for kubelet starts it then; and that
// istiod is told.
func (r *rig) served(what string, namespace, name string) {
	r.t.Helper()
	if list := r.attached(); !strings.Contains(list, name) {
		r.t.Errorf("%s: %s is not among the proxy's pods:\n%s", what, name, list)
	}
	eventually(r.t, func() error {
		if got := r.api.annotation(namespace, name, redirection); got != "enabled" {
			return fmt.Errorf("%s: %s is annotated %q", what, name, got)
		}
		return nil
	})
}

// TestIstioAgent: istio-cni's own server code drives ztun, whether its plugin asks or ours; a pod is captured when the
// plugin has returned, is let go when it is deleted, and is served again by a proxy that comes later.
func TestIstioAgent(t *testing.T) {
	r := newRig(t)
	r.istioAgent()
	d := r.proxy(nil)

	a := r.started("shop", "a", object{})
	r.starts(r.ours, "shop", a)
	r.served("asked by our plugin", "shop", "a")

	b := r.started("shop", "b", object{})
	r.starts(r.theirs, "shop", b)
	r.served("asked by istio-cni's plugin", "shop", "b")

	// By the pod's own label; and one that says no.
	c := r.started("infra", "c", object{"istio.io/dataplane-mode": "ambient"})
	r.starts(r.theirs, "infra", c)
	r.served("by its own label", "infra", "c")
	no := r.started("shop", "no", object{"istio.io/dataplane-mode": "none"})
	r.starts(r.theirs, "shop", no)
	if list := r.attached(); strings.Contains(list, " no ") {
		t.Errorf("a pod that says none is captured:\n%s", list)
	}

	r.api.remove("shop", "b")
	gone := func() error {
		if list := r.attached(); strings.Contains(list, "uid-b") || strings.Contains(list, " b ") {
			return fmt.Errorf("a deleted pod is served:\n%s", list)
		}
		return nil
	}
	eventually(t, gone)

	if _, err := d.Stop(60 * time.Second); err != nil {
		t.Fatal(err)
	}
	// While there is no proxy no pod of the mesh starts.
	e := r.started("shop", "e", object{})
	if out, err := r.ours("shop", e); err == nil || !strings.Contains(out, "ztun: pod shop/e ") {
		t.Errorf("without a proxy: %v, %s", err, out)
	}
	r.proxy(nil)
	eventually(t, func() error {
		if list := r.attached(); !strings.Contains(list, " a ") || !strings.Contains(list, " c ") {
			return fmt.Errorf("the next proxy serves\n%s", list)
		}
		return nil
	})
	eventually(t, gone)
}

// TestZtunAgent: istio-cni's plugin drives ztun's agent as it drives istio-cni's, and ours asks it about every pod.
func TestZtunAgent(t *testing.T) {
	for _, way := range []string{"steered", "rules"} {
		t.Run(way, func(t *testing.T) { ownAgent(t, way) })
	}
}

func ownAgent(t *testing.T, way string) {
	r := newRig(t)
	r.ztunAgent()
	r.proxy(map[string]string{"ZTUN_STEERING": way})
	a := r.started("shop", "a", object{})
	r.starts(r.ours, "shop", a)
	r.served("asked by our plugin", "shop", "a")
	b := r.started("shop", "b", object{})
	r.starts(r.theirs, "shop", b)
	r.served("asked by istio-cni's plugin", "shop", "b")
	plain := r.started("infra", "plain", object{})
	r.starts(r.ours, "infra", plain)
	if list := r.attached(); strings.Contains(list, "plain") {
		t.Errorf("it is captured:\n%s", list)
	}
	// The node's own namespace is left alone.
	for _, args := range [][]string{{"ip", "-o", "link", "show", "type", "tun"}, {"ip", "rule"}, {"ip", "-6", "rule"},
		{"ss", "-Hltn", "sport = :15008"}} {
		out, err := r.Run(r.ctx, r.N1.NS, args...)
		must(t, err)
		if strings.Contains(out, "ztun-node") || strings.Contains(out, "15008") {
			t.Errorf("%v:\n%s", args, out)
		}
	}
}
