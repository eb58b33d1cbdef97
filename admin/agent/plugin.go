package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
)

// added is what a CNI plugin says of a sandbox that it has just made: istio-cni's words. The addresses that it sends as
// well are not needed; PodUID is of ztun's plugin alone.
type added struct {
	Netns, PodName, PodNamespace, PodUID string
}

// Answer is what the plugin is told with status 200.
type Answer struct {
	Enrolled bool `json:"enrolled"` // false: the pod is not the mesh's and starts as ever
}

const (
	// PluginPath is where a plugin posts.
	PluginPath = "/cmdadd"
	// maxAdded bounds what a plugin may say; a pod with a hundred addresses says less.
	maxAdded = 64 << 10
	// maxAdding bounds the sandboxes that wait at one time. Kubelet makes about ten.
	maxAdding = 256
)

// Plugin answers a CNI plugin (ztun's or istio-cni's) that asks for a pod. With any status but 200 the plugin fails,
// and kubelet makes another sandbox; but ztun's judges by itself where the status is 504: nobody knows whether the pod
// is the mesh's. The paths of namespaces are looked for below root.
func (e *Enroller) Plugin(root string) http.Handler {
	places := make(chan struct{}, maxAdding)
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+PluginPath, func(w http.ResponseWriter, r *http.Request) {
		fail := func(code int, err error) {
			e.count(func(s *Stats) { s.PluginFail++ })
			e.o.Logger.Warn("a pod does not start", "error", err)
			http.Error(w, err.Error(), code)
		}
		select {
		case places <- struct{}{}:
			defer func() { <-places }()
		default:
			fail(http.StatusServiceUnavailable, fmt.Errorf("%d pods are being added already", maxAdding))
			return
		}
		a, err := readAdded(http.MaxBytesReader(w, r.Body, maxAdded))
		if err != nil {
			fail(http.StatusBadRequest, err)
			return
		}
		ref := Ref{a.PodNamespace, a.PodName}
		in, err := e.Add(r.Context(), ref, a.PodUID, func() (*os.File, error) {
			return OpenNetns(filepath.Join(root, a.Netns))
		})
		if err != nil {
			code := http.StatusServiceUnavailable
			if errors.Is(err, errUnknown) {
				code = http.StatusGatewayTimeout
			}
			fail(code, fmt.Errorf("pod %s: %w", ref, err))
			return
		}
		e.count(func(s *Stats) {
			if in {
				s.PluginAdded++
			} else {
				s.PluginLeft++
			}
		})
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(Answer{in})
	})
	return mux
}

// readAdded reads what a plugin says.
func readAdded(r io.Reader) (a added, err error) {
	if err := json.NewDecoder(r).Decode(&a); err != nil {
		return a, fmt.Errorf("no {Netns, PodName, PodNamespace}: %w", err)
	}
	for _, name := range []string{a.PodName, a.PodNamespace} {
		if name == "" || len(name) > 253 || strings.ContainsAny(name, "/ \n") || name == "." || name == ".." {
			return a, fmt.Errorf("no pod is called %.300q in %.300q", a.PodName, a.PodNamespace)
		}
	}
	if !filepath.IsAbs(a.Netns) {
		return a, fmt.Errorf("pod %s/%s: no path of a network namespace: %.300q", a.PodNamespace, a.PodName, a.Netns)
	}
	return a, nil
}
