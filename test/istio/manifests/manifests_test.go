package manifests

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
	istiohelm "istio.io/istio/operator/pkg/helm"
	istiovalues "istio.io/istio/operator/pkg/values"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	yamlutil "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"

	"ztun/cmd/agentcmd"
)

const root = "../../../"
const kubernetes = root + "scripts/kubernetes"

// objects reads what kubectl would be given, by kind and name. Every field of it has to be one of Kubernetes, but for
// the one kind that is not.
func objects(t *testing.T, text []byte) map[string]runtime.Object {
	t.Helper()
	strict := serializer.NewCodecFactory(scheme.Scheme, serializer.EnableStrict).UniversalDeserializer()
	all := map[string]runtime.Object{}
	for r := yamlutil.NewYAMLReader(bufio.NewReader(bytes.NewReader(text))); ; {
		doc, err := r.Read()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		var plain map[string]any
		if err := yaml.Unmarshal(doc, &plain); err != nil {
			t.Fatalf("%v in\n%s", err, doc)
		}
		if plain == nil { // nothing but comments
			continue
		}
		var o runtime.Object = &unstructured.Unstructured{Object: plain}
		if plain["kind"] != "PodMonitor" {
			if o, _, err = strict.Decode(doc, nil, nil); err != nil {
				t.Fatalf("%v in\n%s", err, doc)
			}
		}
		named, err := meta.Accessor(o)
		if err != nil {
			t.Fatal(err)
		}
		key := fmt.Sprintf("%s %s", plain["kind"], named.GetName())
		if all[key] != nil {
			t.Fatalf("%s twice", key)
		}
		all[key] = o
	}
}

// kustomized is what `kubectl apply -k` applies.
func kustomized(t *testing.T, dir string) map[string]runtime.Object {
	t.Helper()
	m, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		t.Fatal(err)
	}
	text, err := m.AsYaml()
	if err != nil {
		t.Fatal(err)
	}
	return objects(t, text)
}

func daemonSet(t *testing.T, all map[string]runtime.Object, name string) *appsv1.DaemonSet {
	t.Helper()
	d, ok := all["DaemonSet "+name].(*appsv1.DaemonSet)
	if !ok {
		t.Fatalf("no DaemonSet %s", name)
	}
	return d
}

// TestManifests: what `kubectl apply -k scripts/kubernetes` applies is the DaemonSet of Istio's own ztunnel chart but
// for the image: capabilities, volumes, arguments, environment, probes, the order of an update. So whoever swaps the
// image in a DaemonSet of that chart runs what is tested here.
func TestManifests(t *testing.T) {
	all := kustomized(t, kubernetes)
	ours := daemonSet(t, all, "ztunnel")
	if len(all) != 2 || all["ServiceAccount ztunnel"] == nil {
		t.Errorf("%d objects, want the DaemonSet and its account", len(all))
	}
	if diff := cmp.Diff(all, kustomized(t, kubernetes+"/istio-cni")); diff != "" {
		t.Errorf("scripts/kubernetes (-) is not scripts/kubernetes/istio-cni (+):\n%s", diff)
	}

	rendered, warnings, err := istiohelm.Render("ztunnel", "istio-system", "ztunnel", istiovalues.Map{}, nil)
	if err != nil || len(warnings) > 0 {
		t.Fatal(err, warnings)
	}
	var theirs *appsv1.DaemonSet
	for _, m := range rendered {
		if m.GetKind() == "DaemonSet" {
			theirs = daemonSet(t, objects(t, []byte(m.Content)), "ztunnel")
		}
	}
	if theirs == nil {
		t.Fatal("Istio's chart has no DaemonSet")
	}
	if diff := cmp.Diff(podOf(theirs), podOf(ours)); diff != "" {
		t.Errorf("Istio's chart (-), ours (+):\n%s", diff)
	}
	if diff := cmp.Diff(theirs.Spec.UpdateStrategy, ours.Spec.UpdateStrategy); diff != "" {
		t.Errorf("Istio's chart (-), ours (+):\n%s", diff)
	}
	if diff := cmp.Diff(theirs.Spec.Selector, ours.Spec.Selector); diff != "" {
		t.Errorf("the selector of a DaemonSet cannot be changed; Istio's chart (-), ours (+):\n%s", diff)
	}
}

// podOf is a DaemonSet's pod without what differs on purpose: the image, a variable that only Rust reads, and the one
// that says that this is ztun.
func podOf(d *appsv1.DaemonSet) corev1.PodSpec {
	p := *d.Spec.Template.Spec.DeepCopy()
	c := &p.Containers[0]
	c.Image, c.ImagePullPolicy = "", ""
	var env []corev1.EnvVar
	for _, e := range c.Env {
		if e.Name != "RUST_BACKTRACE" && e.Name != "ISTIO_META_ISTIO_VERSION" {
			env = append(env, e)
		}
	}
	c.Env = env
	return p
}

// TestRights: the accounts may do what docs/kubernetes.md's table has, and no more: no secrets, no exec, nothing that
// changes a pod but the annotation in its status. Nobody is root on the node for nothing.
func TestRights(t *testing.T) {
	all := kustomized(t, kubernetes+"/agent")
	var got []string
	for key, o := range all {
		var rules []rbacv1.PolicyRule
		switch o := o.(type) {
		case *rbacv1.ClusterRole:
			rules = o.Rules
		case *rbacv1.Role:
			rules = o.Rules
		}
		for _, r := range rules {
			for _, resource := range r.Resources {
				got = append(got, fmt.Sprintf("%s: %s %s %s", key, strings.Join(r.Verbs, ","), resource,
					strings.Join(r.ResourceNames, ",")))
			}
		}
	}
	want := []string{
		"ClusterRole ztun-agent: create,patch events ",
		"ClusterRole ztun-agent: get,list,watch namespaces ",
		"ClusterRole ztun-agent: get,list,watch pods ",
		"ClusterRole ztun-agent: patch pods/status ",
		"Role ztun-agent: get,list,watch daemonsets ztun-agent",
	}
	if diff := cmp.Diff(want, sorted(got)); diff != "" {
		t.Errorf("want (-), got (+):\n%s", diff)
	}
	for _, name := range []string{"ClusterRoleBinding ztun-agent", "RoleBinding ztun-agent"} {
		var subjects []rbacv1.Subject
		switch o := all[name].(type) {
		case *rbacv1.ClusterRoleBinding:
			subjects = o.Subjects
		case *rbacv1.RoleBinding:
			subjects = o.Subjects
		}
		if len(subjects) != 1 || subjects[0].Name != "ztun-agent" || subjects[0].Namespace != "istio-system" {
			t.Errorf("%s: %v", name, subjects)
		}
	}
	agent := daemonSet(t, all, "ztun-agent").Spec.Template.Spec
	c := agent.Containers[0].SecurityContext
	if diff := cmp.Diff(corev1.Capabilities{Drop: []corev1.Capability{"ALL"}, Add: []corev1.Capability{"SYS_PTRACE"}},
		*c.Capabilities); diff != "" {
		t.Errorf("the agent: want (-), got (+):\n%s", diff)
	}
	if *c.Privileged || *c.AllowPrivilegeEscalation || !*c.ReadOnlyRootFilesystem || agent.HostNetwork || agent.HostPID {
		t.Errorf("the agent: %+v", c)
	}
}

// capability is a line of YAML that adds one.
var capability = regexp.MustCompile(`^\s+- ([A-Z]+_[A-Z]+)( # \S.*)?$`)

// TestCapabilities: beside each capability stands what it is for.
func TestCapabilities(t *testing.T) {
	seen := 0
	err := filepath.WalkDir(kubernetes, func(path string, e fs.DirEntry, err error) error {
		if err != nil || filepath.Ext(path) != ".yaml" {
			return err
		}
		b, err := os.ReadFile(path)
		for n, line := range strings.Split(string(b), "\n") {
			if m := capability.FindStringSubmatch(line); m != nil {
				seen++
				if m[2] == "" {
					t.Errorf("%s:%d: what is %s for?", path, n+1, m[1])
				}
			}
		}
		return err
	})
	if err != nil || seen < 8 {
		t.Errorf("%d capabilities found, %v", seen, err)
	}
}

// TestNamesThatZtunKnows: a flag that the agent does not have ends it, and a variable that nobody reads changes
// nothing.
func TestNamesThatZtunKnows(t *testing.T) {
	page, err := os.ReadFile(root + "docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	all := kustomized(t, kubernetes+"/agent")
	for _, e := range daemonSet(t, all, "ztunnel").Spec.Template.Spec.Containers[0].Env {
		name := e.Name
		if strings.HasPrefix(name, "ISTIO_META_") {
			name = "ISTIO_META_" // any, for istiod
		}
		if !bytes.Contains(page, []byte("`"+name)) {
			t.Errorf("docs/configuration.md does not have %s", e.Name)
		}
	}
	args := daemonSet(t, all, "ztun-agent").Spec.Template.Spec.Containers[0].Args
	var got agentcmd.Options
	cmd := agentcmd.Command("agent", nil, func(_ *cobra.Command, o agentcmd.Options) error {
		got = o
		return nil
	})
	cmd.SetArgs(args[1:])
	if err := cmd.Execute(); err != nil || args[0] != "agent" {
		t.Fatalf("ztun %s: %v", strings.Join(args, " "), err)
	}
	if got.CNIConfDir != "/etc/cni/net.d" || got.CNIBinDir != "/opt/cni/bin" || got.Proc != "/host/proc" {
		t.Errorf("%+v", got)
	}
}
