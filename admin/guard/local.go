package guard

import (
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync/atomic"

	"ztun/proxy/fair"
)

// LocalOptions configure a Local.
type LocalOptions struct {
	// Token is a file; whoever changes anything (any method but GET and HEAD) must show its text as Authorization:
	// Bearer. It is read at each such request. "": no token is asked for.
	Token  string
	Logger *slog.Logger
}

// Local guards the handlers of a loopback server. Close says what its log has left out.
type Local struct {
	o       LocalOptions
	lines   *fair.Lines
	refused atomic.Uint64
}

// NewLocal makes the guard of one server.
func NewLocal(o LocalOptions) *Local {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Local{o: o, lines: fair.NewLines(fair.LinesOptions{Log: o.Logger, PerSecond: 1, Burst: 10})}
}

// Refused counts the requests that were refused. Safe on nil.
func (l *Local) Refused() uint64 {
	if l == nil {
		return 0
	}
	return l.refused.Load()
}

// Close ends the log. Safe on nil.
func (l *Local) Close() {
	if l != nil {
		l.lines.Close()
	}
}

// Handler is next, behind the guard.
func (l *Local) Handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		code, err := l.check(r)
		if err == nil {
			next.ServeHTTP(w, r)
			return
		}
		l.refused.Add(1)
		l.lines.Log(r.Context(), slog.LevelWarn, "", "request refused", slog.String("method", clip(r.Method)),
			slog.String("path", clip(r.URL.Path)),
			slog.String("peer", r.RemoteAddr), slog.String("error", err.Error()))
		if code == http.StatusUnauthorized {
			w.Header().Set("WWW-Authenticate", "Bearer")
		}
		w.Header().Set("Content-Type", "text/plain")
		w.WriteHeader(code)
		fmt.Fprintf(w, "%v\n", err)
	})
}

func (l *Local) check(r *http.Request) (code int, err error) {
	if a, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok && a.Network() == "unix" {
		return 0, nil
	}
	if err := foreign(r); err != nil {
		return http.StatusForbidden, err
	}
	if r.Method == http.MethodGet || r.Method == http.MethodHead {
		return 0, nil
	}
	if isForm(r) {
		return http.StatusUnsupportedMediaType,
			errors.New(
				"a body of this Content-Type is what web pages send, and none is read here: write parameters into the query")
	}
	if l.o.Token == "" {
		return 0, nil
	}
	want, err := ReadToken(l.o.Token)
	if err != nil {
		return http.StatusServiceUnavailable, fmt.Errorf("the token of this server cannot be read: %w", err)
	}
	// Hashes have one length, so that comparing them tells nothing of the token's.
	scheme, got, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	a, b := sha256.Sum256([]byte(want)), sha256.Sum256([]byte(strings.TrimSpace(got)))
	if !strings.EqualFold(scheme, "Bearer") || subtle.ConstantTimeCompare(a[:], b[:]) != 1 {
		return http.StatusUnauthorized, fmt.Errorf("%s needs the token of ZTUN_ADMIN_TOKEN_FILE: Authorization: Bearer TOKEN",
			clip(r.Method))
	}
	return 0, nil
}

// foreign says why a request may be a web page's that is not our own; nil: it is not.
func foreign(r *http.Request) error {
	if host, _ := hostname(r.Host); host != "" && !loopbackName(host) {
		return fmt.Errorf("the host %q is not this server's: ask for localhost, 127.0.0.1 or [::1]", clip(r.Host))
	}
	// A browser says itself where the request comes from. "none" is the user's own doing, at the address bar.
	for _, v := range r.Header.Values("Sec-Fetch-Site") {
		if v != "same-origin" && v != "none" {
			return fmt.Errorf("a web page of another origin asks (Sec-Fetch-Site: %s)", clip(v))
		}
	}
	for _, name := range []string{"Origin", "Referer"} {
		for _, v := range r.Header.Values(name) {
			if u, err := url.Parse(v); err != nil || u.Scheme != "http" || !strings.EqualFold(u.Host, r.Host) {
				return fmt.Errorf("a web page of another origin asks (%s: %s)", name, clip(v))
			}
		}
	}
	return nil
}

// hostname is a Host header without its port. Without a Host (HTTP/1.0) it is "": no browser omits it.
func hostname(hostport string) (host, port string) {
	if h, p, err := net.SplitHostPort(hostport); err == nil {
		return h, p
	}
	return strings.TrimSuffix(strings.TrimPrefix(hostport, "["), "]"), ""
}

func loopbackName(host string) bool {
	return strings.EqualFold(host, "localhost") || host == "127.0.0.1" || host == "::1"
}

// isForm reports whether a request has a body of a kind that an HTML form, or a script without leave, can send.
func isForm(r *http.Request) bool {
	if r.ContentLength == 0 {
		return false
	}
	kind, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type"))
	return kind == "application/x-www-form-urlencoded" || kind == "multipart/form-data" || kind == "text/plain"
}

// maxToken bounds a token file, in bytes.
const maxToken = 4096

// ReadToken reads the file of a token: one line.
func ReadToken(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxToken+1))
	if err != nil {
		return "", err
	}
	token := strings.TrimSpace(string(data))
	switch {
	case len(data) > maxToken:
		return "", fmt.Errorf("%s is longer than %d bytes: not a token", path, maxToken)
	case token == "":
		return "", fmt.Errorf("%s is empty", path)
	case strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }):
		return "", fmt.Errorf("%s has characters that a header cannot carry: want one line", path)
	}
	return token, nil
}

// clip bounds what a request says of itself, for the log and the answer.
func clip(s string) string {
	const most = 200
	if len(s) > most {
		s = s[:most] + "..."
	}
	return strings.ToValidUTF8(s, "?")
}
