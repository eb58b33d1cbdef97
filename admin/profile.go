package admin

import (
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/pprof"
	"runtime"
	rpprof "runtime/pprof"
	"strconv"
	"sync"
	"time"
)

// profiler answers /debug/pprof/*: ztunnel's three paths with ztunnel's rules, and Go's own.
type profiler struct {
	busy  sync.Mutex      // one CPU profile at a time, the runtime has no more
	drain <-chan struct{} // ends a profile early
}

// bounded reads an unsigned number of the query, or returns def where it is absent.
func bounded(r *http.Request, name string, def, low, high int) (int, error) {
	if !r.URL.Query().Has(name) {
		return def, nil
	}
	s := r.URL.Query().Get(name)
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || int(n) < low || int(n) > high {
		return 0, fmt.Errorf("invalid %s %q: must be a whole number from %d to %d", name, clip(s, 64), low, high)
	}
	return int(n), nil
}

// cpu answers /debug/pprof/profile: seconds 1 to 300 (10), frequency 1 to 1000 Hz (100), the body being
// an uncompressed pprof protobuf without a content type (spec controlplane 6.2).
func (p *profiler) cpu(w http.ResponseWriter, r *http.Request) {
	seconds, err := bounded(r, "seconds", 10, 1, 300)
	if err == nil {
		var hz int
		if hz, err = bounded(r, "frequency", 100, 1, 1000); err == nil {
			p.profile(w, r, time.Duration(seconds)*time.Second, hz)
			return
		}
	}
	plain(w, http.StatusBadRequest, err.Error()+"\n")
}

func (p *profiler) profile(w http.ResponseWriter, r *http.Request, d time.Duration, hz int) {
	if !p.busy.TryLock() {
		plain(w, http.StatusInternalServerError, "a CPU profile is already being taken\n")
		return
	}
	defer p.busy.Unlock()
	rc := http.NewResponseController(w)
	rc.SetWriteDeadline(time.Now().Add(d + writeTimeout))

	// The runtime writes gzip while it profiles; undo it on the way, through a pipe.
	pr, pw := io.Pipe()
	if hz != 100 {
		// The only way to another rate: StartCPUProfile then finds the rate set, says so on stderr, and
		// keeps it.
		runtime.SetCPUProfileRate(hz)
	}
	if err := rpprof.StartCPUProfile(pw); err != nil {
		if hz != 100 {
			runtime.SetCPUProfileRate(0)
		}
		plain(w, http.StatusInternalServerError, err.Error()+"\n")
		return
	}
	w.Header()["Content-Type"] = nil
	rc.Flush() // the header tells the client that the profile has begun
	copied := make(chan error, 1)
	go func() {
		z, err := gzip.NewReader(pr)
		if err == nil {
			_, err = io.Copy(w, z)
		}
		pr.CloseWithError(errors.Join(err, io.ErrClosedPipe)) // the profile's writer never waits for a lost reader
		copied <- err
	}()
	t := time.NewTimer(d)
	select {
	case <-t.C:
	case <-r.Context().Done():
	case <-p.drain:
	}
	t.Stop()
	rpprof.StopCPUProfile() // returns when all is written
	pw.Close()
	if err := <-copied; err != nil {
		panic(http.ErrAbortHandler)
	}
}

// heapProfiling answers the toggle that ztunnel has for jemalloc. Go's allocator always samples (one in
// 512 KiB, as ztunnel's), so the truthful answer is the same for either wish.
func heapProfiling(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Query().Get("activate") {
	case "true", "false":
		plain(w, http.StatusOK, "heap profiling active: true\n")
	default:
		plain(w, http.StatusBadRequest, "activate must be true or false\n")
	}
}

// named answers one of the runtime's profiles, in its binary form, or as text with ?debug=1.
func named(name string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("seconds") != "" { // a difference over time; net/http/pprof bounds nothing
			if _, err := bounded(r, "seconds", 1, 1, 300); err != nil {
				plain(w, http.StatusBadRequest, err.Error()+"\n")
				return
			}
		}
		http.NewResponseController(w).SetWriteDeadline(time.Now().Add(300*time.Second + writeTimeout))
		pprof.Handler(name).ServeHTTP(w, r)
	}
}

// trace answers /debug/pprof/trace for 1 to 300 seconds (1).
func (p *profiler) trace(w http.ResponseWriter, r *http.Request) {
	if _, err := bounded(r, "seconds", 1, 1, 300); err != nil {
		plain(w, http.StatusBadRequest, err.Error()+"\n")
		return
	}
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(300*time.Second + writeTimeout))
	pprof.Trace(w, r)
}

// routes are the paths below /debug/pprof/.
func (p *profiler) routes() map[string]http.HandlerFunc {
	m := map[string]http.HandlerFunc{
		"/debug/pprof/profile":        p.cpu,
		"/debug/pprof/heap":           named("heap"),
		"/debug/pprof/heap/profiling": heapProfiling,
		"/debug/pprof/":               pprof.Index,
		"/debug/pprof/cmdline":        pprof.Cmdline,
		"/debug/pprof/symbol":         pprof.Symbol,
		"/debug/pprof/trace":          p.trace,
	}
	for _, name := range []string{"goroutine", "allocs", "block", "mutex", "threadcreate"} {
		m["/debug/pprof/"+name] = named(name)
	}
	return m
}
