package ambient

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"istio.io/istio/operator/pkg/helm"
	"istio.io/istio/operator/pkg/values"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	yamlutil "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/scheme"
)

const manifests = "../../../scripts/kubernetes"

// decode reads one Kubernetes object, and knows every field of it.
func decode(t *testing.T, from string, doc []byte) runtime.Object {
	t.Helper()
	strict := serializer.NewCodecFactory(scheme.Scheme, serializer.EnableStrict).UniversalDeserializer()
	o, _, err := strict.Decode(doc, nil, nil)
	if err != nil {
		t.Fatalf("%s: %v", from, err)
	}
	return o
}

// TestManifests: what scripts/kubernetes applies are objects that an API server takes to the last field, and the
// DaemonSet is the one of Istio's own ztunnel chart but for the image: capabilities, volumes, arguments, environment,
// probes, the order of an update. So whoever swaps the image in a DaemonSet of that chart runs what is tested here.
func TestManifests(t *testing.T) {
	files, err := filepath.Glob(manifests + "/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var ours *appsv1.DaemonSet
	account := false
	for _, f := range files {
		if filepath.Base(f) == "kustomization.yaml" {
			continue // kustomize's, no object of the API
		}
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for r := yamlutil.NewYAMLReader(bufio.NewReader(bytes.NewReader(b))); ; {
			doc, err := r.Read()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			switch o := decode(t, f, doc).(type) {
			case *appsv1.DaemonSet:
				ours = o
			case *corev1.ServiceAccount:
				account = o.Name == "ztunnel"
			default:
				t.Errorf("%s: a %T that nobody here expects", f, o)
			}
		}
	}
	if ours == nil || !account {
		t.Fatalf("DaemonSet %v, service account ztunnel %v", ours != nil, account)
	}

	rendered, warnings, err := helm.Render("ztunnel", "istio-system", "ztunnel", values.Map{}, nil)
	if err != nil || len(warnings) > 0 {
		t.Fatal(err, warnings)
	}
	var theirs *appsv1.DaemonSet
	for _, m := range rendered {
		if m.GetKind() == "DaemonSet" {
			theirs = decode(t, "Istio's chart", []byte(m.Content)).(*appsv1.DaemonSet)
		}
	}
	if theirs == nil {
		t.Fatal("Istio's chart has no DaemonSet")
	}
	if got := ours.Spec.Template.Spec.Containers[0].Image; got != "localhost/ztun" {
		t.Errorf("image %q", got)
	}
	if diff := cmp.Diff(templateOf(theirs), templateOf(ours)); diff != "" {
		t.Errorf("Istio's chart (-), ours (+):\n%s", diff)
	}
	if diff := cmp.Diff(theirs.Spec.UpdateStrategy, ours.Spec.UpdateStrategy); diff != "" {
		t.Errorf("Istio's chart (-), ours (+):\n%s", diff)
	}
	if diff := cmp.Diff(theirs.Spec.Selector, ours.Spec.Selector); diff != "" {
		t.Errorf("the selector of a DaemonSet cannot be changed; Istio's chart (-), ours (+):\n%s", diff)
	}
}

// templateOf is a DaemonSet's pod without what differs on purpose: the image, and variables that only Rust reads.
func templateOf(d *appsv1.DaemonSet) corev1.PodSpec {
	p := *d.Spec.Template.Spec.DeepCopy()
	c := &p.Containers[0]
	c.Image, c.ImagePullPolicy = "", ""
	var env []corev1.EnvVar
	for _, e := range c.Env {
		if e.Name != "RUST_BACKTRACE" {
			env = append(env, e)
		}
	}
	c.Env = env
	return p
}
