package nodeagent

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// object is one of Kubernetes, as JSON has it.
type object = map[string]any

// apiServer is what informers and plugins need of one: pods and namespaces to get, list and watch, pods to patch.
type apiServer struct {
	t *testing.T

	mu      sync.Mutex
	objects map[string]object // by path: pods/NAMESPACE/NAME, namespaces//NAME
	events  []event
	changed chan struct{} // closed at the next event
}

// event is a change; its number is its place in events, from 1 on.
type event struct {
	plural, kind string // pods; ADDED, MODIFIED, DELETED
	text         json.RawMessage
}

func newAPIServer(t *testing.T) *apiServer {
	return &apiServer{t: t, objects: map[string]object{}, changed: make(chan struct{})}
}

func key(plural, namespace, name string) string { return plural + "/" + namespace + "/" + name }

func meta(o object) object { return o["metadata"].(object) }

// put adds or replaces an object; it is held with mu.
func (a *apiServer) put(plural, kind string, o object) {
	m := meta(o)
	m["resourceVersion"] = strconv.Itoa(len(a.events) + 1)
	namespace, _ := m["namespace"].(string)
	k := key(plural, namespace, m["name"].(string))
	text, err := json.Marshal(o)
	if err != nil {
		panic(err)
	}
	if kind == "DELETED" {
		delete(a.objects, k)
	} else {
		a.objects[k] = o
	}
	a.events = append(a.events, event{plural, kind, text})
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *apiServer) namespace(name string, labels object) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.put("namespaces", "ADDED", object{"apiVersion": "v1", "kind": "Namespace",
		"metadata": object{"name": name, "uid": "ns-" + name, "labels": labels}})
}

// pod is one that a node has just been given: it has no address yet.
func (a *apiServer) pod(namespace, name, node string, labels object) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.put("pods", "ADDED", object{"apiVersion": "v1", "kind": "Pod",
		"metadata": object{"name": name, "namespace": namespace, "uid": "uid-" + name, "labels": labels},
		"spec": object{"nodeName": node, "serviceAccountName": "default", "containers": []any{object{"name": "c",
			"image": "i"}}},
		"status": object{"phase": "Pending"}})
}

func (a *apiServer) remove(namespace, name string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if o := a.objects[key("pods", namespace, name)]; o != nil {
		a.put("pods", "DELETED", o)
	}
}

// annotation is one of a pod's.
func (a *apiServer) annotation(namespace, name, annotation string) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	o := a.objects[key("pods", namespace, name)]
	if o == nil {
		return ""
	}
	all, _ := meta(o)["annotations"].(object)
	s, _ := all[annotation].(string)
	return s
}

func (a *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	path, ok := strings.CutPrefix(r.URL.Path, "/api/v1/")
	parts := strings.Split(path, "/")
	switch {
	case r.URL.Path == "/version":
		fmt.Fprint(w, `{"major":"1","minor":"36","gitVersion":"v1.36.1"}`)
	case ok && len(parts) == 1 && r.Method == http.MethodGet && (parts[0] == "pods" || parts[0] == "namespaces"):
		if r.URL.Query().Get("watch") != "" {
			a.watch(w, r, parts[0])
		} else {
			a.list(w, parts[0])
		}
	case ok && len(parts) == 2 && r.Method == http.MethodGet && parts[0] == "namespaces":
		a.get(w, key("namespaces", "", parts[1]))
	case ok && len(parts) == 4 && r.Method == http.MethodGet && parts[2] == "pods":
		a.get(w, key("pods", parts[1], parts[3]))
	case ok && len(parts) == 5 && r.Method == http.MethodPatch && parts[2] == "pods" && parts[4] == "status":
		a.patch(w, r, key("pods", parts[1], parts[3]))
	case ok && r.Method == http.MethodPost && parts[len(parts)-1] == "events":
		fmt.Fprint(w, `{"apiVersion":"v1","kind":"Event","metadata":{"name":"e"}}`)
	default:
		a.missing(w)
	}
}

func (a *apiServer) missing(w http.ResponseWriter) {
	w.WriteHeader(http.StatusNotFound)
	fmt.Fprint(w, `{"apiVersion":"v1","kind":"Status","status":"Failure","reason":"NotFound","code":404}`)
}

func (a *apiServer) get(w http.ResponseWriter, k string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if o := a.objects[k]; o != nil {
		json.NewEncoder(w).Encode(o)
		return
	}
	a.missing(w)
}

var kinds = map[string]string{"pods": "Pod", "namespaces": "Namespace"}

func (a *apiServer) list(w http.ResponseWriter, plural string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	items := []any{}
	for k, o := range a.objects {
		if strings.HasPrefix(k, plural+"/") {
			items = append(items, o)
		}
	}
	json.NewEncoder(w).Encode(object{"apiVersion": "v1", "kind": kinds[plural] + "List", "items": items,
		"metadata": object{"resourceVersion": strconv.Itoa(len(a.events))}})
}

// watch tells what has happened since a version, and then what happens.
func (a *apiServer) watch(w http.ResponseWriter, r *http.Request, plural string) {
	q := r.URL.Query()
	since, _ := strconv.Atoi(q.Get("resourceVersion")) // none is the beginning
	initial := q.Get("sendInitialEvents") == "true"
	out := json.NewEncoder(w)
	if initial {
		since = 0 // all that is there is what has happened so far, and is not undone
	}
	for {
		a.mu.Lock()
		events, changed := a.events[min(since, len(a.events)):], a.changed
		since = len(a.events)
		a.mu.Unlock()
		for _, e := range events {
			if e.plural == plural {
				out.Encode(object{"type": e.kind, "object": e.text})
			}
		}
		if initial {
			initial = false
			out.Encode(object{"type": "BOOKMARK", "object": object{"apiVersion": "v1", "kind": kinds[plural],
				"metadata": object{"resourceVersion": strconv.Itoa(since),
					"annotations": object{"k8s.io/initial-events-end": "true"}}}})
		}
		w.(http.Flusher).Flush()
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		}
	}
}

func (a *apiServer) patch(w http.ResponseWriter, r *http.Request, k string) {
	var p object
	if err := json.NewDecoder(r.Body).Decode(&p); err != nil {
		a.t.Errorf("a patch of %s: %v", k, err)
	}
	a.mu.Lock()
	o := a.objects[k]
	if o == nil {
		a.mu.Unlock()
		a.missing(w)
		return
	}
	a.put("pods", "MODIFIED", merge(o, p))
	a.mu.Unlock()
	a.get(w, k)
}

// merge is RFC 7396's, without changing either.
func merge(o, p object) object {
	out := object{}
	for k, v := range o {
		out[k] = v
	}
	for k, v := range p {
		inner, isObject := v.(object)
		old, _ := out[k].(object)
		switch {
		case v == nil:
			delete(out, k)
		case isObject:
			out[k] = merge(old, inner)
		default:
			out[k] = v
		}
	}
	return out
}
