package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"sort"
	"strings"
	"syscall"
	"time"
	"ztun/proxy/ports"
)

// The ports of a daemon in its node's namespace.
const (
	AdminPort = ports.Admin
	StatsPort = ports.Stats
	ReadyPort = ports.Readiness
	HBONEPort = ports.HBONE
)

// DaemonOptions of one start.
type DaemonOptions struct {
	Env       map[string]string // added to, or replacing, what StartDaemon sets; a value of Unset removes the variable
	Bin       string            // default: the world's
	Wrap      []string          // a program that executes the daemon in its own place, and its arguments: prlimit, setpriv
	NoWait    bool              // do not wait for readiness
	ReadyWait time.Duration     // default 30 s
}

// Unset as a value of DaemonOptions.Env removes a variable.
const Unset = "\x00unset"

// Daemon is a running (or ended) `ztun proxy` of one node.
type Daemon struct {
	*Process
	Node     *Node
	StateDir string
	Socket   string
	LogPath  string // standard output and error; starts of the same node append
	w        *World
	logStart int64
}

// Ztun runs the ztun command line inside ns (nil: outside) to its end.
func (w *World) Ztun(ctx context.Context, ns *NS, args ...string) (string, error) {
	if w.opt.Bin == "" {
		return "", errors.New("lab: Options.Bin is not set")
	}
	return w.Run(ctx, ns, append([]string{w.opt.Bin}, args...)...)
}

// Bin is the ztun binary of the world.
func (w *World) Bin() string { return w.opt.Bin }

// CADir makes the local CA on first use (`ztun ca init`) and returns its directory.
func (w *World) CADir(ctx context.Context) (string, error) {
	dir := w.Path("ca")
	if _, err := os.Stat(dir + "/root-cert.pem"); err == nil {
		return dir, nil
	}
	_, err := w.Ztun(ctx, nil, "ca", "init", dir)
	return dir, err
}

// DaemonEnv is what StartDaemon gives the daemon of a node, before DaemonOptions.Env.
func (w *World) DaemonEnv(n *Node) map[string]string {
	return map[string]string{
		"NODE_NAME":      n.Name,
		"LOCAL_XDS_PATH": w.WorldPath(),
		"XDS_ADDRESS":    "",
		"LOCAL_CA_DIR":   w.Path("ca"),
		"CA_ADDRESS":     "", // without a directory there is no CA then, and not istiod
		"ZTUN_STATE_DIR": w.Path("state-" + n.Name),
		"ZTUN_MTU":       fmt.Sprint(w.opt.MTU),
	}
}

// StartDaemon starts `ztun proxy` in the node's namespace and waits until it is ready; on failure the error holds the
// end of its log. Without a world file one is written from the pods and hosts that exist. The state directory stays
// the same from start to start.
func (w *World) StartDaemon(ctx context.Context, n *Node, o DaemonOptions) (*Daemon, error) {
	if _, err := w.CADir(ctx); err != nil {
		return nil, err
	}
	if _, err := os.Stat(w.WorldPath()); err != nil {
		if err := w.WriteWorld(w.DefaultWorld()); err != nil {
			return nil, err
		}
	}
	env := w.DaemonEnv(n)
	for k, v := range o.Env {
		env[k] = v
		if v == Unset {
			delete(env, k)
		}
	}
	state := env["ZTUN_STATE_DIR"]
	if state != "" {
		if err := os.MkdirAll(state, 0o700); err != nil {
			return nil, err
		}
	}
	d := &Daemon{Node: n, StateDir: state, Socket: state + "/ztun.sock", LogPath: w.Path(n.Name + ".log"), w: w}
	if s := env["ZTUN_SOCKET"]; s != "" {
		d.Socket = s
	}
	logf, err := os.OpenFile(d.LogPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	defer logf.Close() // the child has its own
	if st, err := logf.Stat(); err == nil {
		d.logStart = st.Size()
	}
	keys := make([]string, 0, len(env))
	for k := range env {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	envv := BaseEnv()
	for _, k := range keys {
		envv = append(envv, k+"="+env[k])
	}
	bin := o.Bin
	if bin == "" {
		bin = w.opt.Bin
	}
	if d.Process, err = w.Start(n.NS, Cmd{Args: append(slices.Clone(o.Wrap), bin, "proxy"), Env: envv, Dir: w.Dir,
		Stdout: logf, Stderr: logf}); err != nil {
		return nil, err
	}
	n.Daemon = d
	if o.NoWait {
		return d, nil
	}
	if o.ReadyWait == 0 {
		o.ReadyWait = 30 * time.Second
	}
	return d, d.WaitReady(ctx, o.ReadyWait)
}

// WaitReady polls /healthz/ready until it says 200, the daemon ends or the time is over; the error holds the last
// answer and the end of the log.
func (d *Daemon) WaitReady(ctx context.Context, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	last := "no answer yet"
	for {
		status, body, err := d.Get(ctx, ReadyPort, "/healthz/ready")
		switch {
		case err != nil:
			last = err.Error()
		case status == 200:
			return nil
		default:
			last = fmt.Sprintf("%d %s", status, strings.TrimSpace(body))
		}
		select {
		case <-d.Done():
			return fmt.Errorf("the daemon of %s ended before it was ready (%v)\nlog:\n%s", d.Node.Name, d.Err(),
				tail(d.Log(), 6000))
		case <-ctx.Done():
			return fmt.Errorf("the daemon of %s is not ready after %v: %s\nlog:\n%s", d.Node.Name, limit, last,
				tail(d.Log(), 6000))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Get does an HTTP GET on one of the daemon's ports, from inside the node's namespace on 127.0.0.1.
func (d *Daemon) Get(ctx context.Context, port int, path string) (int, string, error) {
	return d.Request(ctx, http.MethodGet, port, path)
}

// Request is Get with a method.
func (d *Daemon) Request(ctx context.Context, method string, port int, path string) (int, string, error) {
	req, err := http.NewRequestWithContext(ctx, method, fmt.Sprintf("http://127.0.0.1:%d%s", port, path), nil)
	if err != nil {
		return 0, "", err
	}
	resp, err := d.Node.NS.HTTP(20 * time.Second).Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

// Metrics scrapes /metrics.
func (d *Daemon) Metrics(ctx context.Context) (*Metrics, error) {
	status, body, err := d.Get(ctx, StatsPort, "/metrics")
	if err != nil {
		return nil, err
	}
	if status != 200 {
		return nil, fmt.Errorf("/metrics says %d: %s", status, tail(body, 500))
	}
	return ParseMetrics(body)
}

// Log is everything that this start of the daemon has printed.
func (d *Daemon) Log() string {
	f, err := os.Open(d.LogPath)
	if err != nil {
		return ""
	}
	defer f.Close()
	if _, err := f.Seek(d.logStart, io.SeekStart); err != nil {
		return ""
	}
	b, _ := io.ReadAll(f)
	return string(b)
}

// Stop sends SIGTERM and waits for the end; past the limit it kills and says so.
func (d *Daemon) Stop(limit time.Duration) (exit int, err error) {
	if err := d.Signal(syscall.SIGTERM); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	exit, err = d.Wait(ctx)
	if err != nil {
		d.Kill()
		return exit, fmt.Errorf("the daemon of %s did not end within %v of SIGTERM\nlog:\n%s", d.Node.Name, limit,
			tail(d.Log(), 6000))
	}
	return exit, nil
}

// Running tells whether the process is there.
func (d *Daemon) Running() bool {
	select {
	case <-d.Done():
		return false
	default:
		return true
	}
}

// RSS is the resident memory in bytes, from /proc/PID/status.
func (d *Daemon) RSS() (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.Pid()))
	if err != nil {
		return 0, err
	}
	for _, line := range strings.Split(string(b), "\n") {
		var kb int64
		if n, _ := fmt.Sscanf(line, "VmRSS: %d kB", &kb); n == 1 {
			return kb << 10, nil
		}
	}
	return 0, errors.New("no VmRSS")
}

// Attach runs `ztun pod add` for the pod at its node's daemon.
func (w *World) Attach(ctx context.Context, p *Pod) error {
	ips := make([]string, len(p.IPs))
	for i, ip := range p.IPs {
		ips[i] = ip.String()
	}
	args := []string{"--name", p.Name, "--namespace", p.Namespace, "--service-account", p.ServiceAccount, "--netns",
		p.NS.Path(), "--ip", strings.Join(ips, ",")}
	if p.MTU != 0 {
		args = append(args, "--mtu", fmt.Sprint(p.MTU))
	}
	_, err := w.PodCmd(ctx, p.Node, "add", args...)
	return err
}

// Detach runs `ztun pod del`.
func (w *World) Detach(ctx context.Context, p *Pod) error {
	_, err := w.PodCmd(ctx, p.Node, "del", "--name", p.Name, "--namespace", p.Namespace)
	return err
}

// PodCmd runs `ztun pod VERB ARGS` against a node's daemon. It runs outside the node's namespace, as an operator would.
func (w *World) PodCmd(ctx context.Context, n *Node, verb string, args ...string) (string, error) {
	if n.Daemon == nil {
		return "", fmt.Errorf("no daemon was started on %s", n.Name)
	}
	return w.Ztun(ctx, nil, append([]string{"pod", verb, "--socket", n.Daemon.Socket}, args...)...)
}

// HostPort joins an address and a port, with brackets around IPv6.
func HostPort(ip netip.Addr, port uint16) string { return netip.AddrPortFrom(ip, port).String() }
