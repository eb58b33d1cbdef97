package cni

import (
	"bytes"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

// TestMain: with CNI_COMMAND in its environment this program is the plugin, as a runtime runs it.
func TestMain(m *testing.M) {
	if os.Getenv("CNI_COMMAND") != "" {
		os.Exit(Main("the plugin under test"))
	}
	goleak.VerifyTestMain(m)
}

// prev is a result as a runtime hands it on; the field of nobody's has to survive.
const prev = `{"cniVersion":"1.0.0","interfaces":[{"name":"veth1"},{"name":"eth0","sandbox":"/run/netns/x"}],` +
	`"ips":[{"interface":1,"address":"10.1.2.3/24","gateway":"10.1.2.1"},{"address":"fd00::3/64"}],"dns":{},"x":[1e3]}`

// agent is a node agent that answers what it is told to, and keeps what it was asked last.
type agent struct {
	socket string
	asked  chan []byte
}

func newAgent(t *testing.T, handle http.HandlerFunc) agent {
	t.Helper()
	a := agent{filepath.Join(t.TempDir(), "s"), make(chan []byte, 100)}
	l, err := net.Listen("unix", a.socket)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		if r.Method != http.MethodPost || r.URL.Path != AddPath {
			t.Errorf("%s %s", r.Method, r.URL)
		}
		a.asked <- b
		handle(w, r)
	})}
	served := make(chan struct{})
	go func() { defer close(served); s.Serve(l) }()
	t.Cleanup(func() { s.Close(); <-served })
	return a
}

func answer(status int, text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { http.Error(w, text, status) }
}

// stdin is what a runtime writes to the plugin.
func stdin(e Entry, version, prevResult string) []byte {
	b, err := json.Marshal(map[string]any{"cniVersion": version, "name": "n", "type": PluginType, "socket": e.Socket,
		"enrolled": e.Enrolled, "own": e.Own, "prevResult": json.RawMessage(prevResult)})
	if err != nil {
		panic(err)
	}
	return b
}

const podArgs = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0;K8S_POD_INFRA_CONTAINER_ID=abc;K8S_POD_UID=u-1;X=y"

func enrolledFile(t *testing.T, e Enrolled) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "enrolled.json")
	if err := os.WriteFile(path, e.encode(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// run runs the plugin as a program of its own.
func run(t *testing.T, command, args string, in []byte) (stdout string, ok bool) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{"CNI_COMMAND=" + command, "CNI_CONTAINERID=abc", "CNI_NETNS=/run/netns/x", "CNI_IFNAME=eth0",
		"CNI_PATH=/opt/cni/bin", "CNI_ARGS=" + args,
		"GORACE=atexit_sleep_ms=0"}
	cmd.Stdin = bytes.NewReader(in)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if errs.Len() > 0 {
		t.Errorf("%s: stderr %s", command, errs.String())
	}
	return out.String(), err == nil
}

// TestProgram runs the plugin as a runtime does, through each of CNI's commands.
func TestProgram(t *testing.T) {
	yes := newAgent(t, answer(http.StatusOK, `{"enrolled":true}`))
	e := Entry{Socket: yes.socket, Enrolled: enrolledFile(t, Enrolled{})}
	if out, ok := run(t, "ADD", podArgs, stdin(e, "1.0.0", prev)); !ok || out != prev {
		t.Errorf("ADD: %v, %s; want what came: %s", ok, out, prev)
	}
	// As istio-cni's agent reads it (its types have no names of their own in JSON), and the uid.
	var got struct {
		Netns, PodName, PodNamespace, PodUID string
		IPs                                  []struct {
			Interface *int
			Address   net.IPNet
			Gateway   net.IP
		}
	}
	if err := json.Unmarshal(<-yes.asked, &got); err != nil {
		t.Fatal(err)
	}
	if got.Netns != "/run/netns/x" || got.PodName != "cart-0" || got.PodNamespace != "shop" || got.PodUID != "u-1" ||
		len(got.IPs) != 2 || *got.IPs[0].Interface != 1 || got.IPs[0].Address.String() != "10.1.2.3/24" ||
		got.IPs[0].Gateway.String() != "10.1.2.1" || got.IPs[1].Interface != nil || got.IPs[1].Address.String() != "fd00::3/64" {
		t.Errorf("asked %+v", got)
	}

	no := newAgent(t, answer(http.StatusServiceUnavailable, "no proxy\non this node"))
	out, ok := run(t, "ADD", podArgs, stdin(Entry{Socket: no.socket, Enrolled: e.Enrolled}, "1.0.0", prev))
	var cniErr types.Error
	if err := json.Unmarshal([]byte(out), &cniErr); err != nil || ok {
		t.Fatalf("refused: %v, %v, %s", ok, err, out)
	}
	want := types.Error{Code: 100, Msg: "ztun: pod shop/cart-0 is not captured: the node agent refuses it",
		Details: "no proxy\non this node (status 503)"}
	if diff := cmp.Diff(want, cniErr); diff != "" {
		t.Error(diff)
	}

	// Nobody is asked, and nothing fails because of that.
	away := Entry{Socket: "/nonexistent", Enrolled: "/nonexistent"}
	for _, command := range []string{"DEL", "CHECK", "GC", "STATUS"} {
		if out, ok := run(t, command, podArgs, stdin(away, "1.1.0", strings.Replace(prev, "1.0.0", "1.1.0", 1))); !ok || out != "" {
			t.Errorf("%s: %v, %s", command, ok, out)
		}
	}
	if out, ok := run(t, "VERSION", "", nil); !ok || !strings.Contains(out, `"1.1.0"`) || !strings.Contains(out, `"0.3.1"`) {
		t.Errorf("VERSION: %v, %s", ok, out)
	}
	if out, ok := run(t, "ADD", "", stdin(away, "0.4.0", `{"cniVersion":"0.4.0"}`)); !ok || out != `{"cniVersion":"0.4.0"}` {
		t.Errorf("not a pod: %v, %s", ok, out)
	}
}

// TestConfigurationOfNobody: what is not what we have written is refused with what is wrong.
func TestConfigurationOfNobody(t *testing.T) {
	e := Entry{Socket: "/s", Enrolled: "/e"}
	for _, c := range []struct {
		name, args string
		in         []byte
		code       uint
		want       string
	}{
		{"no result", podArgs, stdin(e, "1.0.0", "null"), types.ErrInvalidNetworkConfig, "there is no prevResult"},
		{"a result of another form", podArgs, stdin(e, "1.0.0", `{"ips":3}`), types.ErrInvalidNetworkConfig, "prevResult cannot be read"},
		{"no socket", podArgs, stdin(Entry{Enrolled: "/e"}, "1.0.0", prev), types.ErrInvalidNetworkConfig, `lacks "socket"`},
		{"not JSON", podArgs, []byte("{"), types.ErrInvalidNetworkConfig, "cannot be read"},
		{"arguments", "K8S_POD_NAME", stdin(e, "1.0.0", prev), types.ErrInvalidEnvironmentVariables, "CNI_ARGS cannot be read"},
	} {
		var out bytes.Buffer
		err := plugin{out: &out}.add(&skel.CmdArgs{Args: c.args, StdinData: c.in})
		te, ok := err.(*types.Error)
		if !ok || te.Code != c.code || !strings.Contains(te.Error(), c.want) || out.Len() > 0 {
			t.Errorf("%s: %v, wrote %q; want code %d and %q", c.name, err, out.String(), c.code, c.want)
		}
	}
}

// TestAgentAway: pods of the mesh wait for the agent and then fail, by what it last knew; all others start.
func TestAgentAway(t *testing.T) {
	known := enrolledFile(t, Enrolled{Namespaces: []string{"shop", "bank"}, Except: []string{"shop/debug"}})
	torn := filepath.Join(t.TempDir(), "torn")
	if err := os.WriteFile(torn, []byte(`{"namespaces":["sh`), 0o600); err != nil {
		t.Fatal(err)
	}
	release := make(chan struct{})
	hangs := newAgent(t, func(http.ResponseWriter, *http.Request) { <-release })
	t.Cleanup(func() { close(release) })
	unsure := newAgent(t, answer(http.StatusGatewayTimeout, "the API server is away"))
	stale := filepath.Join(t.TempDir(), "stale")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	brief := patience{answer: 50 * time.Millisecond, enrol: 0, again: time.Millisecond}
	for _, c := range []struct {
		name, socket, enrolled, namespace, pod, want string
		p                                            patience
	}{
		{"another namespace", "/nonexistent", known, "infra", "dns", "", brief},
		{"known not to be", "/nonexistent", known, "shop", "debug", "", brief},
		{"the same name elsewhere", "/nonexistent", known, "bank", "debug", "pods of namespace bank are the mesh's", brief},
		{"the mesh's", "/nonexistent", known, "shop", "cart-0", "pods of namespace shop are the mesh's", brief},
		{"a socket of a killed agent", stale, known, "shop", "cart-0", "connection refused", brief},
		{"an agent that hangs", hangs.socket, known, "shop", "cart-0", "deadline exceeded", brief},
		{"an agent that hangs, another namespace", hangs.socket, known, "infra", "dns", "", brief},
		{"an agent that cannot tell", unsure.socket, known, "shop", "cart-0", "the API server is away", patience{answer: time.Minute}},
		{"an agent that cannot tell, another namespace", unsure.socket, known, "infra", "dns", "", patience{answer: time.Minute}},
		{"no file", "/nonexistent", "/nonexistent.json", "infra", "dns", "/nonexistent.json: no such file", brief},
		{"half a file", "/nonexistent", torn, "infra", "dns", "unexpected EOF", brief},
		{"our own", "/nonexistent", torn, "istio-system", "ztun-agent-x7k2p", "", brief},
		{"our own's neighbour", "/nonexistent", torn, "istio-system2", "ztun-agent-x7k2p", "unexpected EOF", brief},
	} {
		e := Entry{Socket: c.socket, Enrolled: c.enrolled, Own: []string{"istio-system/ztun-agent-"}}
		args := "K8S_POD_NAMESPACE=" + c.namespace + ";K8S_POD_NAME=" + c.pod
		var out bytes.Buffer
		err := plugin{&out, c.p}.add(&skel.CmdArgs{Args: args, StdinData: stdin(e, "1.0.0", prev)})
		if c.want == "" {
			if err != nil || out.String() != prev {
				t.Errorf("%s: %v, %s", c.name, err, out.String())
			}
			continue
		}
		te, ok := err.(*types.Error)
		if !ok || te.Code != types.ErrTryAgainLater || !strings.Contains(te.Error(), c.want) || out.Len() > 0 {
			t.Errorf("%s: %v, wrote %q; want code 11 and %q", c.name, err, out.String(), c.want)
		}
	}
}

// TestAgentComesBack: a pod of the mesh that starts while the agent is restarted starts when it is back.
func TestAgentComesBack(t *testing.T) {
	tries := 0
	a := newAgent(t, func(w http.ResponseWriter, r *http.Request) {
		if tries++; tries < 3 { // one request at a time
			answer(http.StatusGatewayTimeout, "starting")(w, r)
		}
	})
	e := Entry{Socket: a.socket, Enrolled: enrolledFile(t, Enrolled{Namespaces: []string{"shop"}})}
	var out bytes.Buffer
	p := patience{answer: time.Minute, enrol: time.Minute, again: time.Millisecond}
	if err := (plugin{&out, p}).add(&skel.CmdArgs{Args: podArgs, StdinData: stdin(e, "1.0.0", prev)}); err != nil {
		t.Fatal(err)
	}
	if out.String() != prev || len(a.asked) != 3 {
		t.Errorf("asked %d times, wrote %s", len(a.asked), out.String())
	}
}

// TestLongRefusal: what an agent says may be of any length and of any bytes, and an event of a pod is not.
func TestLongRefusal(t *testing.T) {
	a := newAgent(t, answer(http.StatusBadRequest, strings.Repeat("\xff", 1<<20)))
	e := Entry{Socket: a.socket, Enrolled: "/e"}
	err := plugin{io.Discard, usual}.add(&skel.CmdArgs{Args: podArgs, StdinData: stdin(e, "1.0.0", prev)})
	if err == nil || len(err.Error()) > 4*maxReason || !strings.Contains(err.Error(), "status 400") {
		t.Errorf("%.200v", err)
	}
}

// FuzzEnrolled: whatever the file has become, reading it fails or says what writing it again says.
func FuzzEnrolled(f *testing.F) {
	f.Add(Enrolled{Namespaces: []string{"a"}, Except: []string{"a/b"}}.encode())
	f.Add([]byte(`{"namespaces":null}`))
	f.Add([]byte(`{"namespaces":[]} {}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := parseEnrolled(b)
		if err != nil {
			return
		}
		again, err := parseEnrolled(e.encode())
		if err != nil || !bytes.Equal(again.encode(), e.encode()) {
			t.Fatalf("%q: %v, %v", b, err, again)
		}
	})
}
