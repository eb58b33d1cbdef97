package admin

import (
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"ztun/admin/guard"
	"ztun/admin/suggest"
	"ztun/proxy/fair"
)

// AdminOptions configure the admin server (15000).
type AdminOptions struct {
	Port    uint16 // 15000 in production; 0 picks a free one
	IPv6    bool   // IPV6_ENABLED: bind ::1 as well, where lo has it
	Logging Logging
	// Dump returns the sections of /config_dump by key. It is called once per dump, so that all sections
	// can close over one snapshot.
	Dump        func() map[string]Section
	Connections ConnectionSource // of /ztun/connections and /ztun/flows
	// What the page at / shows beside the above; each may be nil. Overview is called once per rendering.
	Overview func() Overview
	Meter    *Meter
	Ready    *Ready
	// Quit asks for the end of the process; it must not wait for it. reason is "/quitquitquit".
	Quit func(reason string)
	// Debug are additional exact paths, which must begin with /debug/.
	Debug map[string]http.Handler
	// Token is a file with what a request must show that changes something (ZTUN_ADMIN_TOKEN_FILE); "": none is asked for.
	Token  string
	Report *fair.Report // of the bound on connections; may be nil
	Logger *slog.Logger
}

// NewAdmin binds the admin server to 127.0.0.1 and ::1. Without a token there is no authentication: loopback is the
// boundary, as in ztunnel, but a web page on this machine stands outside it (package guard).
func NewAdmin(o AdminOptions) (*Server, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	for p := range o.Debug {
		if !strings.HasPrefix(p, "/debug/") {
			return nil, fmt.Errorf("additional admin path %q is not below /debug/", p)
		}
	}
	index, err := overview(&o, slices.Sorted(maps.Keys(o.Debug)))
	if err != nil {
		return nil, err
	}
	ls, err := listenLoopback("admin", o.Port, o.IPv6, o.Logger)
	if err != nil {
		return nil, err
	}
	prof := &profiler{}
	dump := newDumper(o.Dump, o.Logger)
	routes := map[string]http.Handler{}
	for p, h := range prof.routes() {
		routes[p] = h
	}
	maps.Copy(routes, o.Debug)
	routes["/"] = index
	routes["/config_dump"] = dump
	routes[connectionsPage], routes[flowsPage] = o.Connections.handler(false), o.Connections.handler(true)
	routes["/quitquitquit"] = quitHandler(o.Quit)
	if o.Logging != nil {
		routes["/logging"] = loggingHandler(o.Logging)
	}
	local := guard.NewLocal(guard.LocalOptions{Token: o.Token, Logger: o.Logger})
	s := newServer("admin", ls, local.Handler(exact(routes)), o.Logger, guard.ConnsOptions{Report: o.Report})
	s.local = local
	prof.drain, dump.drain = s.drain, s.drain
	s.dumps = dump
	return s, nil
}

// exact routes by the whole path, byte for byte; the query plays no part. Everything else is 404, as ztunnel's, with a
// line that says what there is. (http.ServeMux would clean paths and redirect.)
func exact(routes map[string]http.Handler) http.Handler {
	paths := slices.Sorted(maps.Keys(routes))
	shown := strings.Join(slices.DeleteFunc(slices.Clone(paths), func(p string) bool {
		return strings.HasPrefix(p, "/debug/") && p != "/debug/pprof/" // that one lists the rest
	}), " ")
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := routes[r.URL.Path]
		if h == nil {
			plain(w, http.StatusNotFound, fmt.Sprintf("no path %q here%s\npaths: %s\n",
				clip(r.URL.Path, 80), suggest.DidYouMean(r.URL.Path, paths), shown))
			return
		}
		h.ServeHTTP(w, r)
	})
}

// wrongMethod answers a request whose path wants another method: 405, as ztunnel's, with a line that says which.
func wrongMethod(w http.ResponseWriter, r *http.Request, want, what string) {
	w.Header().Set("Allow", want)
	plain(w, http.StatusMethodNotAllowed, fmt.Sprintf("%s wants %s, to %s (curl -X %[2]s)\n", r.URL.Path, want, what))
}

func quitHandler(quit func(string)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			wrongMethod(w, r, http.MethodPost, "shut the process down")
			return
		}
		if quit != nil {
			quit("/quitquitquit")
		}
		plain(w, http.StatusOK, "shutdown now\n")
	}
}

// ReadinessOptions configure the readiness server (15021).
type ReadinessOptions struct {
	At     netip.AddrPort // in the place of every address and Port, if valid
	Port   uint16
	IPv6   bool // bind [::] rather than 0.0.0.0
	Ready  *Ready
	Report *fair.Report // of the bound on connections; may be nil
	Logger *slog.Logger
}

// NewReadiness binds the readiness server to At, or to the wildcard address.
func NewReadiness(o ReadinessOptions) (*Server, error) {
	ls, err := listenAt("readiness", o.At, o.Port, o.IPv6)
	if err != nil {
		return nil, err
	}
	h := exact(map[string]http.Handler{"/healthz/ready": readyHandler(o.Ready)})
	return newServer("readiness", ls, h, o.Logger, guard.ConnsOptions{Report: o.Report}), nil
}

// readyHandler follows spec controlplane 7.3. With ?verbose each pending task is listed with how long it
// has been pending and the last error that was reported for it.
func readyHandler(ready *Ready) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet {
			wrongMethod(w, r, http.MethodGet, "say whether the daemon is ready")
			return
		}
		pending := ready.Pending()
		if len(pending) == 0 {
			plain(w, http.StatusOK, "ready\n")
			return
		}
		names := make([]string, len(pending))
		for i, p := range pending {
			names[i] = p.Name
		}
		body := "not ready, pending: " + strings.Join(names, ", ") + "\n"
		if r.URL.Query().Has("verbose") {
			now := ready.now()
			for _, p := range pending {
				body += fmt.Sprintf("%s: pending for %s", p.Name, now.Sub(p.Since).Round(1e6))
				if p.LastError != nil {
					body += fmt.Sprintf(", failed %d times, last error: %s", p.Failures,
						strings.ToValidUTF8(strings.ReplaceAll(clip(p.LastError.Error(), 2048), "\n", " "), "?"))
				}
				body += "\n"
			}
		}
		plain(w, http.StatusInternalServerError, body)
	}
}
