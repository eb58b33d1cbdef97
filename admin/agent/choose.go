package agent

import "slices"

// What Istio's users write on pods and namespaces, and what they read there.
const (
	labelMode         = "istio.io/dataplane-mode"
	annotationSidecar = "sidecar.istio.io/status"
	annotationHash    = "kubernetes.io/config.hash" // of a static pod: its uid in the names of its cgroups
)

// AnnotationRedirected with the value Redirected is by what istiod knows that a pod takes HBONE.
const (
	AnnotationRedirected = "ambient.istio.io/redirection"
	Redirected           = "enabled"
)

// unsupported are annotations that ask for something that is not done.
var unsupported = [...]string{"ambient.istio.io/bypass-inbound-capture", "ambient.istio.io/dns-capture"}

// Pod is what the API server says about a pod, and is never changed.
type Pod struct {
	UID, Namespace, Name, ServiceAccount string
	Labels, Annotations                  map[string]string
	HostNetwork                          bool
	Ended                                bool // its phase is Succeeded or Failed
	HasIP                                bool // its sandbox is there
}

// Ref names the pod, which keeps its name when it is made anew.
type Ref struct{ Namespace, Name string }

func (r Ref) String() string { return r.Namespace + "/" + r.Name }

// Ref names the pod.
func (p Pod) Ref() Ref { return Ref{p.Namespace, p.Name} }

// Rules are what a node's owner decides about all pods.
type Rules struct {
	MeshNamespace     string   // of the proxies, which are no pods of the mesh
	ExcludeNamespaces []string // whose pods never are
}

// Verdict says whether a pod belongs to the mesh, and why.
type Verdict struct {
	In  bool
	Why string
}

// Decide says whether a pod is to be captured, from its own labels before those of its namespace.
func Decide(p Pod, namespaceLabels map[string]string, r Rules) Verdict {
	switch _, sidecar := p.Annotations[annotationSidecar]; {
	case p.Ended:
		return Verdict{false, "it has ended"}
	case p.HostNetwork:
		return Verdict{false, "its network is the host's"}
	case sidecar:
		return Verdict{false, "it has a sidecar"}
	case p.Namespace == r.MeshNamespace && p.Labels["app"] == "ztunnel":
		return Verdict{false, "it is a node proxy"}
	case slices.Contains(r.ExcludeNamespaces, p.Namespace):
		return Verdict{false, "its namespace is excluded"}
	}
	switch own := p.Labels[labelMode]; {
	case own == "ambient":
		return Verdict{true, "its label"}
	case own == "none":
		return Verdict{false, "its label"}
	case namespaceLabels[labelMode] == "ambient":
		return Verdict{true, "its namespace's label"}
	}
	return Verdict{false, "no label"}
}

// NotSupported is the first annotation of a pod that is not honoured; "" if none.
func NotSupported(p Pod) string {
	for _, a := range unsupported {
		if _, ok := p.Annotations[a]; ok {
			return a
		}
	}
	return ""
}

// Known is what is left for a CNI plugin that finds no agent, to judge by the namespace and name of a new pod.
type Known struct {
	Namespaces []string // whose new pods are to be taken for the mesh's
	Except     []string // pods in them, as namespace/name, that are not
}

// Sum sums up what is known of the mesh on a node: its pods, and the labels of namespaces. A namespace counts that has
// the label, or in which a pod is enrolled by its own.
func Sum(pods []Pod, namespaces map[string]map[string]string, r Rules) (k Known) {
	counts := map[string]bool{}
	for name, labels := range namespaces {
		if Decide(Pod{Namespace: name}, labels, r).In { // a pod that says nothing
			counts[name] = true
		}
	}
	for _, p := range pods {
		if Decide(p, namespaces[p.Namespace], r).In {
			counts[p.Namespace] = true
		}
	}
	for _, p := range pods {
		// One that has ended might be made anew under its name: it does not count as an exception.
		if counts[p.Namespace] && !p.Ended && !Decide(p, namespaces[p.Namespace], r).In {
			k.Except = append(k.Except, p.Ref().String())
		}
	}
	for name := range counts {
		k.Namespaces = append(k.Namespaces, name)
	}
	slices.Sort(k.Namespaces)
	slices.Sort(k.Except)
	return k
}
