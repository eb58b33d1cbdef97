package agent

import (
	"strings"
	"testing"

	"ztun/admin/zds"
)

// pod makes a pod out of words: labels and annotations as k=v, and hostnetwork, ended, ip.
func pod(words string) Pod {
	p := Pod{UID: "u", Namespace: "shop", Name: "web", ServiceAccount: "sa", Labels: map[string]string{},
		Annotations: map[string]string{}}
	for _, w := range strings.Fields(words) {
		k, v, _ := strings.Cut(w, "=")
		switch k {
		case "hostnetwork":
			p.HostNetwork = true
		case "ended":
			p.Ended = true
		case "ip":
			p.HasIP = true
		case "uid":
			p.UID = v
		case "ns":
			p.Namespace = v
		case "mode":
			p.Labels[labelMode] = v
		case "app":
			p.Labels["app"] = v
		case "sidecar":
			p.Annotations[annotationSidecar] = v
		case "redirected":
			p.Annotations[AnnotationRedirected] = v
		default:
			panic(w)
		}
	}
	return p
}

func TestDecide(t *testing.T) {
	rules := Rules{MeshNamespace: "istio-system", ExcludeNamespaces: []string{"kube-system", "other"}}
	for _, c := range []struct {
		pod, namespace string
		want           bool
	}{
		{"", "", false},
		{"", "ambient", true},
		{"mode=ambient", "", true},
		{"mode=ambient", "none", true},
		{"mode=none", "ambient", false},
		{"mode=", "ambient", true},
		{"mode=Ambient", "", false},
		{"mode=sidecar", "ambient", true}, // as istio-cni: NotIn none
		{"mode=ambient hostnetwork", "ambient", false},
		{"mode=ambient sidecar={}", "ambient", false},
		{"mode=ambient sidecar=", "ambient", false}, // the annotation is there
		{"mode=ambient ended", "ambient", false},
		{"mode=ambient ns=kube-system", "ambient", false},
		{"ns=other", "ambient", false},
		{"app=ztunnel ns=istio-system mode=ambient", "", false},
		{"app=ztunnel", "ambient", true},
		{"app=istiod ns=istio-system", "ambient", true},
		{"redirected=enabled", "", false},
	} {
		if v := Decide(pod(c.pod), map[string]string{labelMode: c.namespace}, rules); v.In != c.want || v.Why == "" {
			t.Errorf("pod %q, namespace %q: %+v, want %v", c.pod, c.namespace, v, c.want)
		}
	}
	if v := Decide(Pod{}, nil, Rules{}); v.In {
		t.Error("nothing is known:", v)
	}
}

func TestNext(t *testing.T) {
	told, kept, nothing := held{uid: "u", found: true}, held{uid: "u"}, held{}
	for _, c := range []struct {
		name, pod string
		held      held
		state     zds.State
		want      step
	}{
		{"not the mesh's", "ip", nothing, zds.Unknown, rest},
		{"unlabelled", "ip redirected=enabled", told, zds.Acked, release},
		{"unlabelled before it was captured", "ip", told, zds.Waiting, release},
		{"unlabelled while no agent ran", "ip redirected=enabled", nothing, zds.Unknown, release},
		{"half enrolled by istio-cni, unlabelled", "ip redirected=pending", nothing, zds.Unknown, release},
		{"a user's word", "ip redirected=mine", nothing, zds.Unknown, rest},
		{"ended", "ip ended mode=ambient redirected=enabled", told, zds.Acked, release},
		{"being created", "mode=ambient", nothing, zds.Unknown, rest},
		{"running", "mode=ambient ip", nothing, zds.Unknown, find},
		{"captured before this agent", "mode=ambient redirected=enabled", nothing, zds.Unknown, find},
		{"kept, not found yet", "mode=ambient ip redirected=enabled", kept, zds.Waiting, find},
		{"told", "mode=ambient ip", told, zds.Waiting, rest},
		{"refused", "mode=ambient ip", told, zds.Refused, retry},
		{"acked", "mode=ambient ip", told, zds.Acked, announce},
		{"acked before it has an address", "mode=ambient", told, zds.Acked, announce},
		{"acked, half announced by istio-cni", "mode=ambient ip redirected=pending", told, zds.Acked, announce},
		{"announced", "mode=ambient ip redirected=enabled", told, zds.Acked, rest},
		{"no proxy is there", "mode=ambient ip redirected=enabled", told, zds.Waiting, rest},
	} {
		p := pod(c.pod)
		if got := next(p, Decide(p, nil, Rules{}), c.held, c.state); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
}

func TestNotSupported(t *testing.T) {
	p := pod("redirected=enabled")
	if a := NotSupported(p); a != "" {
		t.Error(a)
	}
	p.Annotations["ambient.istio.io/dns-capture"] = "false"
	if a := NotSupported(p); a != "ambient.istio.io/dns-capture" {
		t.Error(a)
	}
}

func TestSum(t *testing.T) {
	namespaces := map[string]map[string]string{"mesh": {labelMode: "ambient"}, "none": {labelMode: "none"}, "plain": nil,
		"kube-system": {labelMode: "ambient"}}
	named := func(namespace, name, words string) Pod {
		p := pod(words)
		p.Namespace, p.Name = namespace, name
		return p
	}
	k := Sum([]Pod{
		named("mesh", "in", ""), named("mesh", "out", "mode=none"), named("mesh", "host", "hostnetwork"),
		named("mesh", "ended", "ended"), named("none", "own", "mode=ambient"), named("none", "other", ""),
		named("plain", "x", ""), named("kube-system", "dns", "mode=ambient"), named("gone", "own", "mode=ambient"),
	}, namespaces, Rules{ExcludeNamespaces: []string{"kube-system"}})
	if got, want := strings.Join(k.Namespaces, " "), "gone mesh none"; got != want {
		t.Errorf("namespaces %s, want %s", got, want)
	}
	if got, want := strings.Join(k.Except, " "), "mesh/host mesh/out none/other"; got != want {
		t.Errorf("except %s, want %s", got, want)
	}
}
