package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"k8s.io/client-go/rest"

	"ztun/admin/zds"
	"ztun/cmd/agentcmd"
)

// klog starts a goroutine that nobody can end.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("k8s.io/klog/v2.(*flushDaemon).run.func1"))
}

const patience = 30 * time.Second

func eventually(t *testing.T, want string, get func() string) {
	t.Helper()
	got := ""
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if got = get(); got == want {
			return
		}
	}
	t.Fatalf("%s, want %s", got, want)
}

// world is a node: an agent at work, its API server, processes and proxies.
type world struct {
	*api
	dir string
	o   agentcmd.Options
	n   *node // the agent that was started last
}

func newWorld(t *testing.T) *world {
	w := &world{api: newAPI(t), dir: t.TempDir()}
	w.o = agentcmd.Options{Node: "n1", ZDSSocket: filepath.Join(w.dir, "zds.sock"), Proc: filepath.Join(w.dir, "proc"),
		PluginSocket: filepath.Join(w.dir, "plugin.sock"), HostRoot: "/", MeshNamespace: "istio-system",
		ExcludeNamespaces: []string{"kube-system"}, DaemonSet: "ztun-agent", Listen: "127.0.0.1:0"}
	w.process("1", "", "host")
	w.namespace("shop", "")
	return w
}

// process makes a process of a pod, whose network namespace is a file.
func (w *world) process(pid, uid, netns string) {
	w.t.Helper()
	dir, ns := filepath.Join(w.o.Proc, pid), filepath.Join(w.dir, "ns-"+netns)
	cgroup := "0::/init.scope\n"
	if uid != "" {
		cgroup = "0::/kubepods/pod" + uid + "/c\n"
	}
	if err := errors.Join(os.MkdirAll(filepath.Join(dir, "ns"), 0o755),
		os.WriteFile(filepath.Join(dir, "stat"), []byte("1 (x) S 1 7 7 0 -1 0 1 2 3 4 5 6 7 8 20 0 1 0 7 0"), 0o644),
		os.WriteFile(ns, nil, 0o644), os.Symlink(ns, filepath.Join(dir, "ns", "net")),
		os.WriteFile(filepath.Join(dir, "cgroup"), []byte(cgroup), 0o644)); err != nil {
		w.t.Fatal(err)
	}
}

// start runs an agent, until stop.
func (w *world) start() (stop func()) {
	w.t.Helper()
	n, err := newNode(w.o, &rest.Config{Host: w.URL}, func(string) *slog.Logger { return slog.New(slog.DiscardHandler) })
	if err != nil {
		w.t.Fatal(err)
	}
	w.n = n
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := n.run(ctx); err != nil {
			w.t.Error(err)
		}
	})
	stop = sync.OnceFunc(func() {
		cancel()
		running.Wait()
	})
	w.t.Cleanup(stop)
	return stop
}

// captured starts an agent whose one pod is captured by a proxy.
func (w *world) captured() (p *proxy, stop func()) {
	w.t.Helper()
	w.namespace("shop", "ambient")
	w.pod("a", uid1, "")
	w.process("10", uid1, "a")
	p = w.proxy()
	stop = w.start()
	eventually(w.t, "a", w.annotated)
	return p, stop
}

// get is a page of the agent's, with its status.
func (w *world) get(path string) string {
	r := httptest.NewRecorder()
	w.n.visible().ServeHTTP(r, httptest.NewRequest("GET", path, nil))
	return fmt.Sprintf("%d %s", r.Code, r.Body)
}

func (w *world) readyCode() string { return w.get("/healthz/ready")[:3] }

// proxy is the node's proxy, as far as it is a node agent's business.
type proxy struct {
	mu    sync.Mutex
	known map[string]string // uid to who it is
	fail  error
	stop  func()
}

func (p *proxy) Attach(_ context.Context, w zds.Workload, netns *os.File) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fail == nil {
		p.known[w.UID] = fmt.Sprintf("%s/%s/%s", w.Namespace, w.Name, w.ServiceAccount)
	}
	return p.fail
}

func (p *proxy) Detach(uid string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.known, uid)
	return nil
}

func (p *proxy) Known() (uids []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for uid := range p.known {
		uids = append(uids, uid)
	}
	slices.Sort(uids)
	return uids
}

func (p *proxy) has() string { return strings.Join(p.Known(), " ") }

func (p *proxy) failing(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fail = err
}

func (w *world) proxy() *proxy {
	p := &proxy{known: map[string]string{}}
	c := zds.New(zds.Options{Path: w.o.ZDSSocket, Pods: p, Snapshot: func() {}, Lost: func() {}, Failed: func(error) {},
		Random: func(int64) int64 { return 0 }, Logger: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { c.Run(ctx) })
	p.stop = sync.OnceFunc(func() {
		cancel()
		running.Wait()
	})
	w.t.Cleanup(p.stop)
	return p
}

// plugin asks as a CNI plugin does.
func (w *world) plugin(name string) string {
	w.t.Helper()
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", w.o.PluginSocket)
		}}}
	r, err := c.Post("http://unix/cmdadd", "application/json", bytes.NewReader(fmt.Appendf(nil,
		`{"Netns":"/proc/self/ns/net","PodName":%q,"PodNamespace":"shop","IPs":[]}`, name)))
	if err != nil {
		return err.Error()
	}
	defer r.Body.Close()
	b, _ := io.ReadAll(r.Body)
	return fmt.Sprintf("%d %s", r.StatusCode, bytes.TrimSpace(b))
}

const uid1, uid2, uid3 = "0f0bc1d4-5ac2-4d7b-9a0b-000000000001", "0f0bc1d4-5ac2-4d7b-9a0b-000000000002",
	"0f0bc1d4-5ac2-4d7b-9a0b-000000000003"

// A node's day: running pods are found, labels are followed, one proxy takes over from another, the plugin is answered,
// the agent is replaced.
func TestAgent(t *testing.T) {
	w := newWorld(t)
	w.pod("a", uid1, "ambient")
	w.pod("b", uid2, "")
	w.process("10", uid1, "a")
	w.process("20", uid2, "b")
	old := w.proxy()
	stop := w.start()
	eventually(t, uid1, old.has)
	eventually(t, "a", w.annotated)
	old.mu.Lock()
	if got := old.known[uid1]; got != "shop/a/sa" {
		t.Error(got)
	}
	old.mu.Unlock()
	eventually(t, "200 ready: 1 pods of the mesh, 1 proxies\n", func() string { return w.get("/healthz/ready") })

	w.namespace("shop", "ambient") // running pods are enrolled by their namespace's label
	eventually(t, uid1+" "+uid2, old.has)
	eventually(t, "a b", w.annotated)
	w.pod("b", uid2, "none")
	eventually(t, uid1, old.has)
	eventually(t, "a", w.annotated)
	w.pod("b", uid2, "")
	eventually(t, "a b", w.annotated)

	young := w.proxy()
	eventually(t, uid1+" "+uid2, young.has)
	old.stop()

	// A new pod, by the plugin.
	w.pod("c", uid3, "")
	if got := w.plugin("c"); got != `200 {"enrolled":true}` {
		t.Error(got)
	}
	if got := young.has(); got != uid1+" "+uid2+" "+uid3 {
		t.Error("the plugin is answered before a proxy has the pod:", got)
	}
	eventually(t, "a b c", w.annotated)
	w.deletePod("c")
	eventually(t, uid1+" "+uid2, young.has)

	// The agent is replaced; meanwhile a pod goes and another is unlabelled.
	stop()
	if got := w.plugin("c"); !strings.Contains(got, "connection refused") {
		t.Error(got)
	}
	w.deletePod("a")
	w.pod("b", uid2, "none")
	w.start()
	eventually(t, "", young.has)
	eventually(t, "", w.annotated)
	if got := w.plugin("b"); got != `200 {"enrolled":false}` {
		t.Error(got)
	}
	if got := w.plugin("nobody"); !strings.HasPrefix(got, "503 pod shop/nobody: the API server has no such pod") {
		t.Error(got)
	}
}

// What a proxy refuses is told on the pod, tried again, and not announced meanwhile; a pod whose sandbox was just made
// does not start.
func TestAgentRefused(t *testing.T) {
	w := newWorld(t)
	w.namespace("shop", "ambient")
	p := w.proxy()
	p.failing(errors.New("port 15008 is taken"))
	w.start()
	w.process("10", uid1, "a")
	w.pod("a", uid1, "")
	eventually(t, "a NotCaptured", w.events)
	w.pod("c", uid3, "")
	if got := w.plugin("c"); !strings.Contains(got, "503 pod shop/c: the node proxy: ") ||
		!strings.Contains(got, "port 15008 is taken") {
		t.Error(got)
	}
	eventually(t, "a NotCaptured, c NotCaptured", w.events)
	if got := w.annotated(); got != "" {
		t.Error("annotated as captured:", got)
	}
	p.failing(nil)
	eventually(t, "a", w.annotated)
	eventually(t, "", func() string {
		if s := w.get("/metrics"); strings.Contains(s, "ztun_agent_plugin_failed_total 1") &&
			strings.Contains(s, "ztun_agent_announced_total 1") {
			return ""
		}
		return "not counted"
	})
}

// No other right is used than the manifests give.
func TestAgentRights(t *testing.T) {
	w := newWorld(t)
	w.o.CNIConfDir, w.o.CNIBinDir, w.o.Ztun = w.dir, w.dir, "/bin/true"
	w.pod("a", uid1, "ambient")
	w.process("10", uid1, "a")
	w.proxy()
	stop := w.start()
	eventually(t, "a", w.annotated)
	w.pod("b", uid2, "")
	w.plugin("b")
	stop()
	for _, p := range w.paths() {
		if !slices.Contains([]string{
			"GET /api/v1/pods", "GET /api/v1/namespaces", "GET /api/v1/namespaces/shop", "GET /api/v1/namespaces/shop/pods/b",
			"PATCH /api/v1/namespaces/shop/pods/a/status", "POST /api/v1/namespaces/shop/events",
			"GET /apis/apps/v1/namespaces/istio-system/daemonsets",
			"GET /apis/apps/v1/namespaces/istio-system/daemonsets/ztun-agent",
		}, p) {
			t.Error(p)
		}
	}
}

// The plugin is put into the node's configuration, which with what is known is needed to be ready, and taken out of it
// only with the DaemonSet.
func TestAgentInstalls(t *testing.T) {
	w := newWorld(t)
	conf, bin := filepath.Join(w.dir, "net.d"), filepath.Join(w.dir, "bin")
	w.o.CNIConfDir, w.o.CNIBinDir = conf, bin
	w.o.Ztun = filepath.Join(w.dir, "ztun")
	if err := errors.Join(os.Mkdir(conf, 0o755), os.Mkdir(bin, 0o755),
		os.WriteFile(w.o.Ztun, []byte("#!/bin/true\n"), 0o755)); err != nil {
		t.Fatal(err)
	}
	w.namespace("shop", "ambient")
	w.pod("out", uid2, "none")
	stop := w.start()
	eventually(t, "503", w.readyCode)
	own := []byte(`{"cniVersion":"1.0.0","name":"x","plugins":[{"type":"bridge"}]}`)
	path := filepath.Join(conf, "10-x.conflist")
	if err := os.WriteFile(path, own, 0o644); err != nil {
		t.Fatal(err)
	}
	eventually(t, "200", w.readyCode)
	read := func() string {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if got := read(); !strings.Contains(got, "ztun-cni") {
		t.Error(got)
	}
	known := func() string {
		b, _ := os.ReadFile(filepath.Join(conf, "ztun.d", "enrolled.json"))
		return strings.Join(strings.Fields(string(b)), "")
	}
	eventually(t, `{"namespaces":["shop"],"except":["shop/out"]}`, known)
	w.deletePod("out")
	eventually(t, `{"namespaces":["shop"]}`, known)
	stop()
	if got := read(); !strings.Contains(got, "ztun-cni") {
		t.Error("an update takes the plugin away:", got)
	}
	stop = w.start()
	eventually(t, "200", w.readyCode)
	w.mu.Lock()
	w.set = `{"metadata":{"name":"ztun-agent","deletionTimestamp":"2026-11-29T10:00:00Z"}}`
	w.mu.Unlock()
	stop()
	if got := read(); got != string(own) {
		t.Error("the DaemonSet is gone, and the plugin stays:", got)
	}
}

// When its DaemonSet is deleted the agent has the proxies let go of all pods and takes the plugin away, without being
// told to end, and waits for the proxies when it is. Where the DaemonSet's pods are to stay, all stays.
func TestAgentUninstalled(t *testing.T) {
	const being = `{"metadata":{"name":"ztun-agent","deletionTimestamp":"2026-11-29T10:00:00Z"}}`
	const orphaned = `{"metadata":{"name":"ztun-agent","deletionTimestamp":"2026-11-29T10:00:00Z","finalizers":["orphan"]}}`
	for _, tt := range []struct {
		name    string
		changes []string
		stays   bool
	}{
		{"in the background", []string{""}, false},
		{"in the foreground", []string{being}, false},
		{"without its pods", []string{orphaned, ""}, true},
		{"without its pods, and somebody else waited for", []string{orphaned, being, ""}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			conf := filepath.Join(w.dir, "net.d")
			w.o.CNIConfDir, w.o.CNIBinDir, w.o.Ztun = conf, w.dir, filepath.Join(w.dir, "ztun")
			own := []byte(`{"cniVersion":"1.0.0","name":"x","plugins":[{"type":"bridge"}]}`)
			path := filepath.Join(conf, "10-x.conflist")
			if err := errors.Join(os.Mkdir(conf, 0o755), os.WriteFile(path, own, 0o644),
				os.WriteFile(w.o.Ztun, []byte("#!/bin/true\n"), 0o755)); err != nil {
				t.Fatal(err)
			}
			installed := func() string {
				b, err := os.ReadFile(path)
				return fmt.Sprint(err == nil && strings.Contains(string(b), "ztun-cni"))
			}
			p, stop := w.captured()
			eventually(t, "true", installed)
			for _, set := range tt.changes {
				w.changeSet(set)
			}
			if tt.stays {
				eventually(t, "orphaned true, left 0", func() string { // the pods' watch is another
					set := &w.n.cluster.set
					return fmt.Sprintf("orphaned %v, left %d", set.orphaned.Load(), len(set.informer.GetStore().List()))
				})
				w.pod("b", uid2, "")
				w.process("20", uid2, "b")
				eventually(t, uid1+" "+uid2, p.has)
				stop()
				if got := p.has(); got != uid1+" "+uid2 || installed() != "true" {
					t.Errorf("pods that are left: %q; the plugin is: %s", got, installed())
				}
				return
			}
			eventually(t, "false", installed)
			eventually(t, "", p.has)
			eventually(t, "", w.annotated)
			if got := w.plugin("a"); got != `200 {"enrolled":false}` {
				t.Error(got)
			}
			stop()
		})
	}
}

// Without rights nobody knows whether ztun is to go: pods keep what they have, and only new ones start without it.
func TestAgentWithoutRights(t *testing.T) {
	w := newWorld(t)
	p, stop := w.captured()
	w.mu.Lock()
	w.forbidden = true
	w.mu.Unlock()
	stop()
	if got := p.has(); got != uid1 {
		t.Error("left with the proxy:", got)
	}
}

// An agent that is told to end in the moment in which its DaemonSet goes stays until its proxies have let go of the
// pods.
func TestAgentUninstalledAtOnce(t *testing.T) {
	w := newWorld(t)
	w.namespace("shop", "ambient")
	var want []string
	for i := range 20 {
		uid := fmt.Sprintf("%s%02d", uid1[:len(uid1)-2], i)
		want = append(want, uid)
		w.pod(fmt.Sprint("p", i), uid, "")
		w.process(fmt.Sprint(100+i), uid, fmt.Sprint("p", i))
	}
	p := w.proxy()
	stop := w.start()
	eventually(t, strings.Join(want, " "), p.has)
	w.changeSet("")
	<-w.n.cluster.set.gone
	stop()
	if got := p.has(); got != "" {
		t.Error("left with the proxy:", got)
	}
}

func TestStart(t *testing.T) {
	for _, c := range []struct {
		o    agentcmd.Options
		want string
	}{
		{agentcmd.Options{Log: "info=x=y", Node: "n"}, "--log"},
		{agentcmd.Options{Log: "info"}, "--node"},
		{agentcmd.Options{Log: "info", Node: "n"}, "--kubeconfig"},
		{agentcmd.Options{Log: "info", Node: "n", Kubeconfig: "/nowhere"}, "/nowhere"},
	} {
		if err := start(context.Background(), c.o); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v", c.o, err)
		}
	}
}
