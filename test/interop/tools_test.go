package interop

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"ztun/test/interop/rig"
)

// bulk and large are what transfers carry, in bytes: large where the end of the transfer is the point, rather than
// the transfer.
const (
	bulk  = 64 * rig.MiB
	large = 16 * rig.MiB
)

// limit is how long one run of a foreign program may take.
const limit = 2 * rig.Wait

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// curl is the program to test with.
func curl(t testing.TB) string {
	t.Helper()
	path := os.Getenv("ZTUN_CURL")
	if path == "" {
		path = "../../bin/interop/curl"
		if _, err := os.Stat(path); err != nil {
			if path, err = exec.LookPath("curl"); err != nil {
				t.Fatal("no curl: run test/interop/get-curl bin/interop")
			}
		}
	}
	path, err := filepath.Abs(path)
	must(t, err)
	help, err := exec.Command(path, "--help", "all").CombinedOutput()
	if err != nil || !bytes.Contains(help, []byte("--proxy-http2")) {
		t.Fatalf("%s cannot speak HTTP/2 to a proxy (8.1 or newer can): run test/interop/get-curl bin/interop, or set "+
			"ZTUN_CURL (%v)", path, err)
	}
	return path
}

// node is the program to test with.
func node(t testing.TB) string {
	t.Helper()
	path, err := exec.LookPath("node")
	if err != nil {
		t.Fatal("no node: apt-get install nodejs (18 or newer)")
	}
	return path
}

// environment is without what would change a proxy's user: proxies, certificate stores, options.
func environment() []string {
	var env []string
	for _, e := range os.Environ() {
		name, _, _ := strings.Cut(e, "=")
		if l := strings.ToLower(name); strings.HasSuffix(l, "_proxy") || strings.HasPrefix(l, "ssl") ||
			strings.HasPrefix(l, "node_") || strings.HasPrefix(l, "curl") {
			continue
		}
		env = append(env, e)
	}
	return append(env, "HOME=/nonexistent") // no .curlrc
}

// command is a program that ends with ctx.
func command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = environment()
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// object is a JSON object.
type object map[string]any

// nodeClient runs testdata/client.mjs in the mode that opts names and reads its answer into result.
func nodeClient(t testing.TB, r *rig.Rig, pem rig.PEM, mode string, opts object, result any) error {
	t.Helper()
	all := object{"addr": r.Mesh(), "pem": pem, "mode": mode}
	for k, v := range opts {
		all[k] = v
	}
	arg, err := json.Marshal(all)
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	cmd := command(ctx, node(t), "testdata/client.mjs", string(arg))
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err = cmd.Run()
	if stdout.Len() == 0 {
		return fmt.Errorf("node: %v: %s", err, stderr.Bytes())
	}
	var failed struct{ Error string }
	if err := json.Unmarshal(stdout.Bytes(), &failed); err != nil {
		return fmt.Errorf("node: %v: %s", err, stdout.Bytes())
	}
	if failed.Error != "" {
		return fmt.Errorf("node: %s", failed.Error)
	}
	return json.Unmarshal(stdout.Bytes(), result)
}

// nodeServer is a running testdata/server.mjs.
type nodeServer struct {
	t     testing.TB
	cmd   *exec.Cmd
	stdin io.Closer
	in    io.Writer
	stop  context.CancelFunc
	ended chan struct{}

	mu    sync.Mutex
	said  []nodeLine
	lines chan struct{} // replaced at every line
}

// nodeLine is what testdata/server.mjs prints.
type nodeLine struct {
	Listening    bool
	Headers      map[string]any
	SAN          string
	Closed       string
	Code         int
	Sessions     *int
	StreamError  string
	SessionError string
}

// serveNode starts Node as the rig's peer pod.
func serveNode(t testing.TB, r *rig.Rig, account string, opts object) *nodeServer {
	t.Helper()
	all := object{"host": r.Peer.String(), "port": rig.Port, "pem": rig.WritePEM(t, r.Identity(account))}
	for k, v := range opts {
		all[k] = v
	}
	return startNode(t, nil, all)
}

// startNode starts testdata/server.mjs, by way of another command (prefix) if that is to put it somewhere.
func startNode(t testing.TB, prefix []string, opts object) *nodeServer {
	t.Helper()
	arg, err := json.Marshal(opts)
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	s := &nodeServer{t: t, cmd: command(ctx, append(prefix, node(t), "testdata/server.mjs", string(arg))...), stop: cancel,
		ended: make(chan struct{}), lines: make(chan struct{})}
	stdin, err := s.cmd.StdinPipe()
	must(t, err)
	s.stdin, s.in = stdin, stdin
	stdout, err := s.cmd.StdoutPipe()
	must(t, err)
	var stderr bytes.Buffer
	s.cmd.Stderr = &stderr
	must(t, s.cmd.Start())
	go func() {
		defer close(s.ended)
		sc := bufio.NewScanner(stdout)
		for sc.Scan() {
			var l nodeLine
			if err := json.Unmarshal(sc.Bytes(), &l); err != nil {
				l.SessionError = "not JSON: " + sc.Text()
			}
			s.mu.Lock()
			s.said = append(s.said, l)
			close(s.lines)
			s.lines = make(chan struct{})
			s.mu.Unlock()
		}
		s.cmd.Wait()
	}()
	t.Cleanup(func() {
		s.kill()
		if t.Failed() && stderr.Len() > 0 {
			t.Logf("node: %s", stderr.Bytes())
		}
	})
	s.await(func(l nodeLine) bool { return l.Listening })
	return s
}

// kill ends the server without a word.
func (s *nodeServer) kill() {
	s.stop()
	s.stdin.Close()
	<-s.ended
}

// tell sends it a command.
func (s *nodeServer) tell(command string) {
	s.t.Helper()
	_, err := io.WriteString(s.in, command+"\n")
	must(s.t, err)
}

// await is the first line that f accepts, waited for.
func (s *nodeServer) await(f func(nodeLine) bool) nodeLine {
	s.t.Helper()
	timer := time.NewTimer(rig.Wait)
	defer timer.Stop()
	for i := 0; ; {
		s.mu.Lock()
		for ; i < len(s.said); i++ {
			if f(s.said[i]) {
				defer s.mu.Unlock()
				return s.said[i]
			}
		}
		more := s.lines
		s.mu.Unlock()
		select {
		case <-more:
		case <-s.ended:
			s.t.Fatalf("node ended; it had said %+v", s.said)
		case <-timer.C:
			s.t.Fatalf("node does not say what is waited for; it said %+v", s.said)
		}
	}
}

// complaints are the protocol errors that Node found.
func (s *nodeServer) complaints() (all []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.said {
		if l.SessionError != "" {
			all = append(all, l.SessionError)
		}
	}
	return all
}

// requests are the authorities asked for so far.
func (s *nodeServer) requests() (all []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.said {
		if l.Headers != nil {
			all = append(all, fmt.Sprint(l.Headers[":authority"]))
		}
	}
	return all
}

// at is a port of an address.
func at(ip netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(ip, port) }
