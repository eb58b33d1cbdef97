package admin

import (
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"ztun/admin/suggest"
)

// Logging is what /logging needs of the log; *zlog.Log has it.
type Logging interface {
	Filter() string                                         // the filter in force
	Change(levels string, reset bool) (now string, _ error) // see zlog.Control.Change
}

const loggingUsage = `
usage: POST /logging                                    (shows the current levels)
usage: POST /logging?level=LEVEL                        (changes the level of everything)
usage: POST /logging?level=TARGET=LEVEL,TARGET:LEVEL    (changes the level of some targets)
usage: POST /logging?reset[&level=...]                  (back to RUST_LOG, then as above)

hint: LEVEL is one of error, warn, info, debug, trace, off
hint: TARGET is the third column of a log line, for example access
`

// loggingHandler follows spec controlplane 6.4.
func loggingHandler(l Logging) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			plain(w, http.StatusMethodNotAllowed, "Invalid HTTP method\n"+loggingUsage)
			return
		}
		q, err := loggingQuery(r.URL.RawQuery)
		if err != nil {
			plain(w, http.StatusBadRequest, err.Error()+"\n"+loggingUsage)
			return
		}
		level := colons(q.Get("level"))
		if level == "" && !q.Has("reset") {
			plain(w, http.StatusOK, "current log level is "+l.Filter()+"\n")
			return
		}
		now, err := l.Change(level, q.Has("reset"))
		if err != nil {
			plain(w, http.StatusBadRequest, "Invalid level provided: "+clip(q.Get("level"), 1024)+"\n"+err.Error()+"\n"+
				loggingUsage)
			return
		}
		plain(w, http.StatusOK, "current log level is "+now+"\n")
	}
}

// loggingQuery reads the parameters. One that is not known changes nothing, so it is refused: "level=debug" with a
// typing error would answer 200 and the levels of before, where ztunnel does just that.
func loggingQuery(raw string) (url.Values, error) {
	q, err := url.ParseQuery(raw)
	if err != nil {
		return nil, fmt.Errorf("the query cannot be read: %w", err)
	}
	known := []string{"level", "reset"}
	for _, name := range slices.Sorted(maps.Keys(q)) {
		if !slices.Contains(known, name) {
			return nil, fmt.Errorf("unknown parameter %q%s", clip(name, 80), suggest.DidYouMean(name, known))
		}
		if len(q[name]) > 1 {
			return nil, fmt.Errorf("parameter %s is given %d times; join levels by commas", name, len(q[name]))
		}
	}
	return q, nil
}

// colons turns `target:level`, which ztunnel's help text advertises, istioctl sends and ztunnel refuses
// (spec controlplane 12.32), into `target=level`. What is not of that form is left for the filter to judge.
func colons(levels string) string {
	clauses := strings.Split(levels, ",")
	for i, c := range clauses {
		at := strings.LastIndexByte(c, ':')
		if at <= 0 || c[at-1] == ':' || strings.Contains(c, "=") {
			continue
		}
		switch c[at+1:] {
		case "off", "error", "warn", "info", "debug", "trace":
			clauses[i] = c[:at] + "=" + c[at+1:]
		}
	}
	return strings.Join(clauses, ",")
}

// clip bounds text that comes back to its sender.
func clip(s string, n int) string {
	if len(s) > n {
		return s[:n] + "..."
	}
	return s
}
