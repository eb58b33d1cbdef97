package admin

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"ztun/admin/guard"
	"ztun/proxy/fair"
)

// podTimeout bounds one Add or Delete.
const podTimeout = 60 * time.Second

// maxSocketPath is what sun_path holds, without the ending zero and what a temporary name adds.
const maxSocketPath = 107 - len(".new")

// PodSocketOptions configure the control socket.
type PodSocketOptions struct {
	Path string // ZTUN_SOCKET
	Pods PodManager
	// Connections is asked by GET /v1/connections and /v1/flows.
	Connections ConnectionSource
	// Handlers answer GET requests of further exact paths, below /v1/.
	Handlers map[string]PodHandler
	Report   *fair.Report // of the bound on connections; may be nil
	Logger   *slog.Logger
}

// PodHandler gives what a request is answered with, as JSON, or an error, whose status is that of podCodes. One that
// writes the answer itself gives neither: from its first byte on nothing else can be said.
type PodHandler func(w http.ResponseWriter, r *http.Request) (body any, err error)

// PodSocket is the HTTP server behind `ztun pod` and whatever else asks a running daemon. Its paths are POST /v1/pods,
// GET /v1/pods, DELETE /v1/pods/{namespace}/{name} or /v1/pods?uid={uid}, GET /v1/connections and GET /v1/flows; errors
// are {"error": "..."}.
type PodSocket struct {
	*Server
	path   string
	ino    uint64 // of our socket, so that only it is removed at the end
	lock   *os.File
	cancel context.CancelFunc
}

// NewPodSocket binds the socket with mode 0600, in a directory made with 0700 if it is not there. Who
// holds the lock beside it (Path.lock) owns the socket: a leftover of a process that has died is
// replaced, that of a living one is an error.
func NewPodSocket(o PodSocketOptions) (*PodSocket, error) {
	if len(o.Path) > maxSocketPath {
		return nil, fmt.Errorf("control socket path %q is longer than %d characters", o.Path, maxSocketPath)
	}
	if err := os.MkdirAll(filepath.Dir(o.Path), 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the directory of the control socket: %w", err)
	}
	lock, err := lockSocket(o.Path)
	if err != nil {
		return nil, err
	}
	l, ino, err := bindSocket(o.Path)
	if err != nil {
		lock.Close()
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	h := &podHandler{ctx: ctx, pods: o.Pods, connections: o.Connections, handlers: o.Handlers, logger: o.Logger}
	// All callers are one source, the node's own tools: what one has begun is not cut for another.
	bounds := guard.ConnsOptions{KeepBusy: true, Report: o.Report}
	s := &PodSocket{Server: newServer("control", []net.Listener{l}, h, o.Logger, bounds), path: o.Path, ino: ino,
		lock: lock, cancel: cancel}
	s.http.WriteTimeout = podTimeout + writeTimeout
	return s, nil
}

func lockSocket(path string) (*os.File, error) {
	f, err := os.OpenFile(path+".lock", os.O_RDWR|os.O_CREATE|syscall.O_CLOEXEC|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot open the lock of the control socket: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, inUse(path)
		}
		return nil, fmt.Errorf("cannot lock the control socket %s: %w", path, err)
	}
	return f, nil
}

// SocketHeld reports whether a process owns the control socket at path, also one that is still starting or about to
// end.
func SocketHeld(path string) (bool, error) {
	f, err := os.OpenFile(path+".lock", os.O_RDWR|syscall.O_CLOEXEC|syscall.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close() // unlocks
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return true, nil
	} else {
		return false, err
	}
}

func inUse(path string) error {
	return fmt.Errorf("control socket %s is in use by a running ztun: stop it, or set ZTUN_SOCKET or ZTUN_STATE_DIR: %w",
		path, syscall.EADDRINUSE)
}

// bindSocket makes the socket under another name and renames it, so that it appears with its mode and
// replaces a leftover in one step. Called with the lock held.
func bindSocket(path string) (*net.UnixListener, uint64, error) {
	switch st, err := os.Lstat(path); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, 0, fmt.Errorf("control socket: %w", err)
	case st.Mode().Type() != fs.ModeSocket:
		return nil, 0, fmt.Errorf("control socket path %s exists and is not a socket; it is left alone", path)
	default:
		// Nobody of us holds it, but it might belong to a program that knows no lock.
		if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
			c.Close()
			return nil, 0, inUse(path)
		} else if !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, 0, fmt.Errorf("cannot tell whether control socket %s is in use: %w", path, err)
		}
	}
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, 0, fmt.Errorf("control socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, 0, fmt.Errorf("cannot bind the control socket: %w", err)
	}
	l.SetUnlinkOnClose(false) // the name it knows is gone by then
	var st unix.Stat_t
	err = os.Chmod(tmp, 0o600)
	if err == nil {
		err = unix.Lstat(tmp, &st)
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		l.Close()
		os.Remove(tmp)
		return nil, 0, fmt.Errorf("cannot set up the control socket: %w", err)
	}
	return l, st.Ino, nil
}

// Shutdown lets running requests finish, then removes the socket. See Server.Shutdown.
func (s *PodSocket) Shutdown(ctx context.Context) error {
	err := s.Server.Shutdown(ctx)
	s.release()
	return err
}

// Close ends the server at once and cancels the contexts of running requests.
func (s *PodSocket) Close() error {
	s.cancel()
	err := s.Server.Close()
	s.release()
	return err
}

func (s *PodSocket) release() {
	s.cancel()
	var st unix.Stat_t
	if unix.Lstat(s.path, &st) == nil && st.Ino == s.ino {
		os.Remove(s.path)
	}
	s.lock.Close() // unlocks; the file stays, since removing it would race with the next owner
}

type podHandler struct {
	ctx         context.Context // ends at Close
	pods        PodManager
	connections ConnectionSource
	handlers    map[string]PodHandler
	logger      *slog.Logger
}

const (
	podsPath        = "/v1/pods"
	connectionsPath = "/v1/connections"
	flowsPath       = "/v1/flows"
)

func (h *podHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	code := http.StatusOK
	var body any
	var err error
	if next := h.handlers[r.URL.Path]; next != nil && r.Method == http.MethodGet {
		body, err = next(w, r)
	} else if r.URL.Path == connectionsPath || r.URL.Path == flowsPath {
		err = h.list(w, r)
	} else {
		code, body, err = h.serve(r)
	}
	if err != nil {
		code = podStatus(err)
		body = podError{err.Error()}
		level := slog.LevelInfo
		if code >= 500 {
			level = slog.LevelWarn
		}
		h.logger.Log(r.Context(), level, "control request failed", "method", r.Method, "path", clip(r.URL.Path, 256),
			"status", code, "error", err)
	}
	if body == nil {
		if code != http.StatusOK {
			w.WriteHeader(code)
		}
		return // or it is written already
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(body)
}

// list answers what is asked of connections; an error if nothing was written.
func (h *podHandler) list(w http.ResponseWriter, r *http.Request) error {
	if r.Method != http.MethodGet {
		return fmt.Errorf("%w: %s, use GET", errPodMethod, clip(r.Method, 16))
	}
	q, err := connectionQuery(r.URL.Query())
	if err != nil {
		return err
	}
	h.connections.Select(r.URL.Path == flowsPath, q).write(w)
	return nil
}

type podError struct {
	Error string `json:"error"`
}

type podList struct {
	Pods []PodStatus `json:"pods"`
}

func (h *podHandler) serve(r *http.Request) (code int, body any, err error) {
	// What has begun is carried through even if the caller leaves (an interrupted command line must not
	// leave half a pod): the context ends with the server or with podTimeout, not with the connection.
	ctx, cancel := context.WithTimeout(h.ctx, podTimeout)
	defer cancel()
	if r.URL.Path == podsPath {
		switch r.Method {
		case http.MethodGet:
			pods := slices.Clone(h.pods.List())
			slices.SortFunc(pods, func(a, b PodStatus) int {
				return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
			})
			if pods == nil {
				pods = []PodStatus{}
			}
			return http.StatusOK, podList{pods}, nil
		case http.MethodPost:
			p, err := decodePod(r.Body)
			if err != nil {
				return 0, nil, err
			}
			if err := h.pods.Add(ctx, p); err != nil {
				return 0, nil, err
			}
			return http.StatusCreated, p, nil
		case http.MethodDelete:
			uid := r.URL.Query().Get("uid")
			if err := checkUID(uid); err != nil {
				return 0, nil, fmt.Errorf("%w: uid %v", ErrPodInvalid, err)
			}
			if uid == "" {
				return 0, nil, fmt.Errorf("%w: which? DELETE %s/NAMESPACE/NAME or %[2]s?uid=UID", ErrPodInvalid, podsPath)
			}
			if err := h.pods.DeleteUID(ctx, uid); err != nil {
				return 0, nil, err
			}
			return http.StatusNoContent, nil, nil
		}
		return 0, nil, fmt.Errorf("%w: %s, use GET, POST or DELETE", errPodMethod, clip(r.Method, 16))
	}
	namespace, name, ok := splitPod(r.URL.EscapedPath())
	if !ok {
		return 0, nil, fmt.Errorf("%w: %s", errPodPath, clip(r.URL.Path, 256))
	}
	if r.Method != http.MethodDelete {
		return 0, nil, fmt.Errorf("%w: %s, use DELETE", errPodMethod, clip(r.Method, 16))
	}
	if err := cmp.Or(kubeName(namespace, 63), kubeName(name, 253)); err != nil {
		return 0, nil, fmt.Errorf("%w: %v", ErrPodInvalid, err)
	}
	if err := h.pods.Delete(ctx, namespace, name); err != nil {
		return 0, nil, err
	}
	return http.StatusNoContent, nil, nil
}

// splitPod reads /v1/pods/{namespace}/{name}.
func splitPod(path string) (namespace, name string, ok bool) {
	rest, ok := strings.CutPrefix(path, podsPath+"/")
	if !ok {
		return "", "", false
	}
	a, b, ok := strings.Cut(rest, "/")
	if !ok || strings.Contains(b, "/") {
		return "", "", false
	}
	namespace, err1 := url.PathUnescape(a)
	name, err2 := url.PathUnescape(b)
	return namespace, name, err1 == nil && err2 == nil
}

func decodePod(body io.Reader) (p PodSpec, err error) {
	d := json.NewDecoder(body)
	d.DisallowUnknownFields()
	if err := d.Decode(&p); err != nil {
		return p, fmt.Errorf("%w: %v", ErrPodRequest, err)
	}
	if _, err := d.Token(); err != io.EOF {
		return p, fmt.Errorf("%w: something follows the pod", ErrPodRequest)
	}
	for i, ip := range p.IPs {
		p.IPs[i] = ip.Unmap()
	}
	return p, p.validate(false)
}

// podCodes is the one table of errors and HTTP codes, used by both ends.
var podCodes = [...]struct {
	err  error
	code int
}{
	{ErrPodRequest, http.StatusBadRequest},
	{ErrPodInvalid, http.StatusBadRequest},
	{ErrPodNotFound, http.StatusNotFound},
	{errPodPath, http.StatusNotFound},
	{errPodMethod, http.StatusMethodNotAllowed},
	{ErrPodConflict, http.StatusConflict},
	{ErrPodUnavailable, http.StatusServiceUnavailable},
	{context.Canceled, http.StatusServiceUnavailable},
	{ErrPodTimeout, http.StatusGatewayTimeout},
	{context.DeadlineExceeded, http.StatusGatewayTimeout},
}

func podStatus(err error) int {
	for _, c := range podCodes {
		if errors.Is(err, c.err) {
			return c.code
		}
	}
	return http.StatusInternalServerError
}
