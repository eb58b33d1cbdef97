package manifests

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"helm.sh/helm/v4/pkg/chart/common"
	commonutil "helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/v2/lint"
	"helm.sh/helm/v4/pkg/chart/v2/lint/support"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"
)

func sorted(s []string) []string {
	slices.Sort(s)
	return s
}

// render is `helm template ztun scripts/kubernetes/chart -n NAMESPACE -f` a file with this text.
func render(t *testing.T, namespace, values string) (map[string]runtime.Object, error) {
	t.Helper()
	chart, err := loader.LoadDir(kubernetes + "/chart")
	if err != nil {
		t.Fatal(err)
	}
	given := common.Values{}
	if err := yaml.Unmarshal([]byte(values), &given); err != nil {
		t.Fatal(err)
	}
	vals, err := commonutil.ToRenderValues(chart, given, common.ReleaseOptions{Name: "ztun", Namespace: namespace},
		common.DefaultCapabilities)
	if err != nil {
		return nil, err
	}
	files, err := engine.Render(chart, vals)
	if err != nil {
		return nil, err
	}
	var text []string
	for _, name := range sorted(mapKeys(files)) {
		if filepath.Ext(name) == ".yaml" {
			text = append(text, files[name])
		}
	}
	return objects(t, []byte(strings.Join(text, "\n---\n"))), nil
}

func mapKeys(m map[string]string) (keys []string) {
	for k := range m {
		keys = append(keys, k)
	}
	return keys
}

// TestChart: with its defaults the chart applies what kustomize applies, in each mode, to the last field.
func TestChart(t *testing.T) {
	for mode, dir := range map[string]string{"istio-cni": "/istio-cni", "agent": "/agent"} {
		chart, err := render(t, "istio-system", "mode: "+mode)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(ordered(t, kustomized(t, kubernetes+dir)), ordered(t, chart)); diff != "" {
			t.Errorf("mode %s: kustomize (-), the chart (+):\n%s", mode, diff)
		}
	}
	// The component, in an overlay as docs/kubernetes.md has it.
	overlay := t.TempDir()
	base, err := filepath.Abs(kubernetes)
	if err != nil {
		t.Fatal(err)
	}
	rel, err := filepath.Rel(overlay, base)
	if err != nil {
		t.Fatal(err)
	}
	text := "resources: [" + rel + "/agent]\ncomponents: [" + rel + "/podmonitor]\nnamespace: istio-system\n"
	if err := os.WriteFile(filepath.Join(overlay, "kustomization.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	chart, err := render(t, "istio-system", "{mode: agent, podMonitor: {enabled: true}}")
	if err != nil {
		t.Fatal(err)
	}
	if chart["PodMonitor ztun"] == nil {
		t.Error("no PodMonitor")
	}
	if diff := cmp.Diff(ordered(t, kustomized(t, overlay)), ordered(t, chart)); diff != "" {
		t.Errorf("with the PodMonitor: kustomize (-), the chart (+):\n%s", diff)
	}
}

// ordered sorts what has no order: variables, volumes and mounts. No variable is there twice.
func ordered(t *testing.T, all map[string]runtime.Object) map[string]runtime.Object {
	t.Helper()
	for _, o := range all {
		d, ok := o.(*appsv1.DaemonSet)
		if !ok {
			continue
		}
		p := &d.Spec.Template.Spec
		slices.SortFunc(p.Volumes, func(a, b corev1.Volume) int { return strings.Compare(a.Name, b.Name) })
		for i := range p.Containers {
			c := &p.Containers[i]
			slices.SortFunc(c.Env, func(a, b corev1.EnvVar) int { return strings.Compare(a.Name, b.Name) })
			slices.SortFunc(c.VolumeMounts, func(a, b corev1.VolumeMount) int { return strings.Compare(a.Name, b.Name) })
			for k := 1; k < len(c.Env); k++ {
				if c.Env[k].Name == c.Env[k-1].Name {
					t.Errorf("%s: %s twice", d.Name, c.Env[k].Name)
				}
			}
		}
	}
	return all
}

// TestChartValues: what is set arrives, in both DaemonSets.
func TestChartValues(t *testing.T) {
	all, err := render(t, "mesh", `
mode: agent
steering: rules
image: {repository: registry.example/ztun, tag: "1.10", pullPolicy: Always}
imagePullSecrets: [regcred]
logLevel: "debug,hbone=trace"
xdsAddress: istiod-canary.mesh.svc:15012
clusterID: "7"
nodeSelector: {kubernetes.io/os: linux, pool: a}
affinity: {nodeAffinity: {}}
tolerations: [{key: only, operator: Exists}]
podMonitor: {enabled: true, labels: {release: prom}}
proxy: {env: {NUM: 3, FLAG: true, TEXT: "a: b"}, podLabels: {team: net},
        podAnnotations: {x: z}, terminationGracePeriodSeconds: 60}
agent: {cniConfDir: /var/lib/rancher/k3s/agent/etc/cni/net.d, cniBinDir: /var/lib/rancher/k3s/data/cni,
        args: [--exclude-namespaces=a], env: {A: "1"}, seLinuxOptions: {type: spc_t}}
`)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ztunnel", "ztun-agent"} {
		d := daemonSet(t, all, name)
		p := d.Spec.Template.Spec
		if d.Namespace != "mesh" || p.Containers[0].Image != "registry.example/ztun:1.10" ||
			p.Containers[0].ImagePullPolicy != "Always" || len(p.ImagePullSecrets) != 1 ||
			p.NodeSelector["pool"] != "a" || p.Affinity == nil || len(p.Tolerations) != 1 {
			t.Errorf("%s: %+v", name, p)
		}
	}
	env := map[string]string{}
	proxy := daemonSet(t, all, "ztunnel").Spec.Template
	for _, e := range proxy.Spec.Containers[0].Env {
		env[e.Name] = e.Value
	}
	want := map[string]string{"NUM": "3", "FLAG": "true", "TEXT": "a: b", "RUST_LOG": "debug,hbone=trace",
		"XDS_ADDRESS": "istiod-canary.mesh.svc:15012", "ISTIO_META_CLUSTER_ID": "7", "TERMINATION_GRACE_PERIOD_SECONDS": "60",
		"ZTUN_STEERING": "rules"}
	for name, value := range want {
		if env[name] != value {
			t.Errorf("%s=%q, want %q", name, env[name], value)
		}
	}
	if proxy.Labels["team"] != "net" || proxy.Annotations["x"] != "z" || *proxy.Spec.TerminationGracePeriodSeconds != 60 {
		t.Errorf("the proxy's pod: %v %v", proxy.Labels, proxy.Annotations)
	}
	agent := daemonSet(t, all, "ztun-agent").Spec.Template.Spec
	args := strings.Join(agent.Containers[0].Args, " ")
	conf, bin := "/var/lib/rancher/k3s/agent/etc/cni/net.d", "/var/lib/rancher/k3s/data/cni"
	if !strings.HasSuffix(args, "--cni-conf-dir="+conf+" --cni-bin-dir="+bin+" --exclude-namespaces=a") {
		t.Errorf("arguments %s", args)
	}
	if o := agent.Containers[0].SecurityContext.SELinuxOptions; o == nil || o.Type != "spc_t" {
		t.Errorf("SELinux: %v", o)
	}
	// The plugin's configuration names its file: the directory has one name inside and outside.
	for _, v := range agent.Volumes {
		if v.Name != "cni-conf" && v.Name != "cni-bin" {
			continue
		}
		for _, m := range agent.Containers[0].VolumeMounts {
			if m.Name == v.Name && m.MountPath != v.HostPath.Path {
				t.Errorf("%s: %s on the node, %s inside", v.Name, v.HostPath.Path, m.MountPath)
			}
		}
	}
	if all["PodMonitor ztun"] == nil {
		t.Error("no PodMonitor")
	}
}

// TestChartRefuses: a value that nobody reads is a mistake, and is said before anything is applied.
func TestChartRefuses(t *testing.T) {
	for _, values := range []string{"mode: istiocni", "steering: redirected", "proxi: {}", "proxy: {ressources: {}}", "agent: {cniConfDir: etc}",
		"proxy: {env: {A: [1]}}", "image: {repository: ''}", "image: {tag: 1.10}"} {
		if _, err := render(t, "istio-system", values); err == nil {
			t.Errorf("%s is taken", values)
		}
	}
}

// TestChartLint: `helm lint` has nothing to say but that there is no icon.
func TestChartLint(t *testing.T) {
	for _, mode := range []string{"istio-cni", "agent"} {
		values := map[string]any{"mode": mode, "podMonitor": map[string]any{"enabled": true}}
		for _, m := range lint.RunAll(kubernetes+"/chart", values, "istio-system").Messages {
			if m.Severity > support.InfoSev {
				t.Errorf("mode %s: %v", mode, m)
			}
		}
	}
}

// TestVersions: one version is said in many places.
func TestVersions(t *testing.T) {
	b, err := os.ReadFile(root + "cmd/ztun/VERSION")
	if err != nil {
		t.Fatal(err)
	}
	version := strings.TrimSpace(string(b))
	chart, err := loader.LoadDir(kubernetes + "/chart")
	if err != nil {
		t.Fatal(err)
	}
	if chart.Metadata.Version != version || chart.Metadata.AppVersion != version {
		t.Errorf("Chart.yaml has %s and %s, cmd/ztun/VERSION %s", chart.Metadata.Version, chart.Metadata.AppVersion, version)
	}
	all := kustomized(t, kubernetes+"/agent")
	for _, name := range []string{"ztunnel", "ztun-agent"} {
		if got := daemonSet(t, all, name).Spec.Template.Spec.Containers[0].Image; got != "localhost/ztun:"+version {
			t.Errorf("%s has image %s, cmd/ztun/VERSION is %s", name, got, version)
		}
	}
	c := daemonSet(t, kustomized(t, kubernetes), "ztunnel").Spec.Template.Spec.Containers[0]
	if c.Image != "localhost/ztun:"+version {
		t.Errorf("image %s, cmd/ztun/VERSION is %s", c.Image, version)
	}
	if !slices.ContainsFunc(c.Env, func(e corev1.EnvVar) bool {
		return e.Name == "ISTIO_META_ISTIO_VERSION" && e.Value == "ztun-"+version
	}) {
		t.Errorf("ISTIO_META_ISTIO_VERSION is not ztun-%s", version)
	}
}
