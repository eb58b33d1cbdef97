package main

import (
	"encoding/json"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// api is as much of an API server as an agent asks: pods and namespaces to get, list and watch, the pods' status to
// patch, events to create, and one DaemonSet.
type api struct {
	*httptest.Server
	t *testing.T

	mu        sync.Mutex
	version   int
	pods      map[string]*corev1.Pod
	spaces    map[string]*corev1.Namespace
	watchers  map[chan watched]string // to what they watch
	past      []change                // all that a watch has said or would have
	reasons   []string                // of events
	asked     map[string]int          // requests, by method and path
	set       string                  // the DaemonSet; "": there is none
	forbidden bool                    // all of it
}

// watched is what a watch says.
type watched struct {
	Type   string `json:"type"`
	Object any    `json:"object"`
}

// change is what watches of a kind say, in the version that it has made.
type change struct {
	kind    string
	version int
	says    watched
}

func newAPI(t *testing.T) *api {
	a := &api{t: t, version: 1, pods: map[string]*corev1.Pod{}, spaces: map[string]*corev1.Namespace{},
		watchers: map[chan watched]string{}, asked: map[string]int{}, set: `{"metadata":{"name":"ztun-agent"}}`}
	a.Server = httptest.NewServer(a)
	t.Cleanup(func() {
		a.mu.Lock()
		for w := range a.watchers {
			close(w)
		}
		clear(a.watchers)
		a.mu.Unlock()
		a.Close()
	})
	return a
}

// ServeHTTP implements http.Handler.
func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	words := strings.Split(strings.TrimPrefix(r.URL.Path, "/api/v1/"), "/")
	kind := words[len(words)-1]
	if strings.HasSuffix(r.URL.Path, "/istio-system/daemonsets") {
		if got := q.Get("fieldSelector"); got != "metadata.name=ztun-agent" {
			a.t.Errorf("DaemonSets are asked for by %q", got)
		}
		words = words[len(words)-1:]
	}
	a.mu.Lock()
	a.asked[r.Method+" "+r.URL.Path]++
	switch {
	case a.forbidden:
		defer a.mu.Unlock()
		status(w, http.StatusForbidden, metav1.StatusReasonForbidden)
	case r.Method == "GET" && strings.HasSuffix(r.URL.Path, "/daemonsets/ztun-agent") && a.set != "":
		defer a.mu.Unlock()
		reply(w, a.daemonSet())
	case r.Method == "GET" && len(words) == 1 && q.Get("sendInitialEvents") == "true":
		defer a.mu.Unlock()
		status(w, http.StatusUnprocessableEntity, metav1.StatusReasonInvalid) // as one that is older than this
	case r.Method == "GET" && len(words) == 1 && q.Get("watch") != "":
		c := make(chan watched, 1000)
		a.watchers[c] = kind
		since, err := strconv.Atoi(q.Get("resourceVersion"))
		if err != nil {
			a.t.Errorf("a watch from %q on", q.Get("resourceVersion"))
		}
		for _, e := range a.past { // what has changed since the list
			if e.kind == kind && e.version > since {
				c <- e.says
			}
		}
		a.mu.Unlock()
		a.watch(w, r, c)
	case r.Method == "GET" && len(words) == 1:
		defer a.mu.Unlock()
		a.list(w, kind, q.Get("fieldSelector"))
	case r.Method == "GET" && len(words) == 2 && a.spaces[words[1]] != nil:
		defer a.mu.Unlock()
		reply(w, a.spaces[words[1]])
	case r.Method == "GET" && len(words) == 4 && a.pods[words[1]+"/"+words[3]] != nil:
		defer a.mu.Unlock()
		reply(w, a.pods[words[1]+"/"+words[3]])
	case r.Method == "PATCH" && kind == "status" && a.pods[words[1]+"/"+words[3]] != nil:
		defer a.mu.Unlock()
		a.patch(w, r, a.pods[words[1]+"/"+words[3]])
	case r.Method == "POST" && kind == "events":
		defer a.mu.Unlock()
		var e corev1.Event
		if err := json.NewDecoder(r.Body).Decode(&e); err != nil {
			a.t.Error(err)
		}
		a.reasons = append(a.reasons, e.InvolvedObject.Name+" "+e.Reason)
		reply(w, &e)
	default:
		a.mu.Unlock()
		status(w, http.StatusNotFound, metav1.StatusReasonNotFound)
	}
}

func status(w http.ResponseWriter, code int, reason metav1.StatusReason) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"},
		Status: "Failure", Reason: reason, Code: int32(code)})
}

func reply(w http.ResponseWriter, o any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(o)
}

func (a *api) list(w http.ResponseWriter, kind, selector string) {
	meta := metav1.ListMeta{ResourceVersion: strconv.Itoa(a.version)}
	if kind == "namespaces" {
		l := corev1.NamespaceList{TypeMeta: metav1.TypeMeta{Kind: "NamespaceList", APIVersion: "v1"}, ListMeta: meta}
		for _, ns := range a.spaces {
			l.Items = append(l.Items, *ns)
		}
		reply(w, l)
		return
	}
	if kind == "daemonsets" {
		l := appsv1.DaemonSetList{TypeMeta: metav1.TypeMeta{Kind: "DaemonSetList", APIVersion: "apps/v1"}, ListMeta: meta}
		if a.set != "" {
			l.Items = append(l.Items, *a.daemonSet())
		}
		reply(w, l)
		return
	}
	if selector != "spec.nodeName=n1" {
		a.t.Errorf("pods are asked for by %q", selector)
	}
	l := corev1.PodList{TypeMeta: metav1.TypeMeta{Kind: "PodList", APIVersion: "v1"}, ListMeta: meta}
	for _, p := range a.pods {
		l.Items = append(l.Items, *p)
	}
	reply(w, l)
}

func (a *api) watch(w http.ResponseWriter, r *http.Request, c chan watched) {
	defer func() {
		a.mu.Lock()
		delete(a.watchers, c)
		a.mu.Unlock()
	}()
	w.Header().Set("Content-Type", "application/json")
	w.(http.Flusher).Flush()
	for {
		select {
		case e, ok := <-c:
			if !ok {
				return
			}
			json.NewEncoder(w).Encode(e)
			w.(http.Flusher).Flush()
		case <-r.Context().Done():
			return
		}
	}
}

func (a *api) patch(w http.ResponseWriter, r *http.Request, p *corev1.Pod) {
	var change struct {
		Metadata struct {
			UID         types.UID
			Annotations map[string]*string
		}
	}
	if err := json.NewDecoder(r.Body).Decode(&change); err != nil || r.Header.Get("Content-Type") !=
		string(types.MergePatchType) {
		a.t.Errorf("patch %v, %q", err, r.Header)
	}
	if change.Metadata.UID != p.UID {
		status(w, http.StatusConflict, metav1.StatusReasonConflict)
		return
	}
	p = p.DeepCopy()
	for k, v := range change.Metadata.Annotations {
		if v == nil {
			delete(p.Annotations, k)
		} else {
			p.Annotations[k] = *v
		}
	}
	a.store(p)
	reply(w, p)
}

// store has everybody see a pod. The caller holds mu.
func (a *api) store(p *corev1.Pod) {
	key := p.Namespace + "/" + p.Name
	kind := "ADDED"
	if a.pods[key] != nil {
		kind = "MODIFIED"
	}
	a.version++
	p.ResourceVersion = strconv.Itoa(a.version)
	a.pods[key] = p
	a.tell("pods", watched{kind, p})
}

// tell tells watches of a change, which has made this version. The caller holds mu.
func (a *api) tell(kind string, e watched) {
	a.past = append(a.past, change{kind, a.version, e})
	for c, k := range a.watchers {
		if k == kind {
			c <- e
		}
	}
}

// pod makes a pod, or changes it. The label is its own istio.io/dataplane-mode.
func (a *api) pod(name, uid, label string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := &corev1.Pod{TypeMeta: metav1.TypeMeta{Kind: "Pod", APIVersion: "v1"}}
	if old := a.pods["shop/"+name]; old != nil && string(old.UID) == uid {
		p = old.DeepCopy()
	}
	p.Namespace, p.Name, p.UID = "shop", name, types.UID(uid)
	p.Spec.NodeName, p.Spec.ServiceAccountName = "n1", "sa"
	p.Status.Phase, p.Status.PodIP = corev1.PodRunning, "10.0.0.7"
	p.Labels = map[string]string{}
	if label != "" {
		p.Labels["istio.io/dataplane-mode"] = label
	}
	if p.Annotations == nil {
		p.Annotations = map[string]string{}
	}
	a.store(p)
}

func (a *api) deletePod(name string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.pods["shop/"+name].DeepCopy() // a watch may be writing that one
	delete(a.pods, "shop/"+name)
	a.version++
	p.ResourceVersion = strconv.Itoa(a.version)
	a.tell("pods", watched{"DELETED", p})
}

// namespace makes a namespace, or changes it.
func (a *api) namespace(name, label string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	kind := "ADDED"
	if a.spaces[name] != nil {
		kind = "MODIFIED"
	}
	a.version++
	a.spaces[name] = &corev1.Namespace{TypeMeta: metav1.TypeMeta{Kind: "Namespace", APIVersion: "v1"},
		ObjectMeta: metav1.ObjectMeta{Name: name, ResourceVersion: strconv.Itoa(a.version),
			Labels: map[string]string{"istio.io/dataplane-mode": label}}}
	a.tell("namespaces", watched{kind, a.spaces[name]})
}

// daemonSet is the one that there is. The caller holds mu.
func (a *api) daemonSet() *appsv1.DaemonSet {
	s := &appsv1.DaemonSet{}
	if err := json.Unmarshal([]byte(a.set), s); err != nil {
		a.t.Error(err)
	}
	s.TypeMeta = metav1.TypeMeta{Kind: "DaemonSet", APIVersion: "apps/v1"}
	s.Namespace, s.ResourceVersion = "istio-system", strconv.Itoa(a.version)
	return s
}

// changeSet has the DaemonSet be another; "": it is deleted.
func (a *api) changeSet(json string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.version++
	kind := "MODIFIED"
	if json == "" {
		kind = "DELETED"
	} else {
		a.set = json
	}
	says := watched{kind, a.daemonSet()}
	a.set = json
	a.tell("daemonsets", says)
}

// annotated are the pods that are said to be captured.
func (a *api) annotated() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var names []string
	for _, p := range a.pods {
		if p.Annotations["ambient.istio.io/redirection"] == "enabled" {
			names = append(names, p.Name)
		}
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}

// events are the reasons of events so far, each once.
func (a *api) events() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return strings.Join(slices.Compact(slices.Sorted(slices.Values(a.reasons))), ", ")
}

// paths are what was asked for.
func (a *api) paths() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Sorted(maps.Keys(a.asked))
}
