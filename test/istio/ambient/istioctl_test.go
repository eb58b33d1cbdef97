package ambient

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"istio.io/istio/istioctl/pkg/cli"
	"istio.io/istio/istioctl/pkg/ztunnelconfig"
	"istio.io/istio/pkg/kube"

	"ztun/test/lab"
	"ztun/test/load"
)

// istioctl runs `istioctl ztunnel-config ARGS -f dump`.
func istioctl(t *testing.T, dump string, args ...string) string {
	t.Helper()
	return execute(t, ztunnelconfig.ZtunnelConfig(cli.NewFakeContext(nil)), append(args, "-f", dump))
}

func execute(t *testing.T, cmd *cobra.Command, args []string) string {
	t.Helper()
	var out bytes.Buffer
	cmd.SetOut(&out)
	cmd.SetErr(&out)
	cmd.SetArgs(args)
	cmd.SilenceUsage = true
	if err := cmd.Execute(); err != nil {
		t.Fatalf("istioctl ztunnel-config %v: %v\n%s", args, err, &out)
	}
	return out.String()
}

// commands are all that read a dump.
var commands = []string{"all", "workload", "service", "policy", "certificate", "connections"}

// istioctlAll runs them on what a node's daemon dumps now.
func istioctlAll(t *testing.T, w *lab.World, ctx context.Context, n *lab.Node) map[string]string {
	t.Helper()
	status, body, err := n.Daemon.Get(ctx, lab.AdminPort, "/config_dump")
	must(t, err)
	if status != 200 {
		t.Fatalf("/config_dump says %d: %s", status, body)
	}
	file := filepath.Join(t.TempDir(), "dump.json")
	must(t, os.WriteFile(file, []byte(body), 0o644))
	out := map[string]string{}
	for _, c := range commands {
		out[c] = istioctl(t, file, c)
	}
	return out
}

func match(t *testing.T, command, out, pattern string) {
	t.Helper()
	if !regexp.MustCompile(pattern).MatchString(out) {
		t.Errorf("istioctl ztunnel-config %s: no line %s in\n%s", command, pattern, out)
	}
}

// settled is the output without what is an accident of a run: ports that the kernel chose, serial numbers, times, the
// widths of columns.
func settled(out string) string {
	for _, r := range [][2]string{
		{`:[3-6]\d{4}\b`, ":PORT"},
		{`\b[0-9a-f]{24,40}\b`, "SERIAL"},
		{`\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ`, "TIME"},
		{`(?m)[ \t]+$`, ""},
		{`[ \t]{2,}`, " "},
	} {
		out = regexp.MustCompile(r[0]).ReplaceAllString(out, r[1])
	}
	return out
}

// TestIstioctl: istioctl shows the same of our daemons as of two real ztunnels in the same world with the same
// connections.
func TestIstioctl(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	w := lab.ForTest(t, lab.Options{Bin: ztun, Prefix: "zi"})
	world, err := os.ReadFile("../../../docs/samples/workloads.yaml")
	must(t, err)
	must(t, w.WriteWorldBytes(world))
	for i, n := range w.Nodes() {
		_, err := w.StartDaemon(ctx, n, lab.DaemonOptions{})
		must(t, err)
		p, err :=
			w.AddPod(n,
				lab.Pod{Name: []string{"a", "b"}[i], IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 91, byte(i + 1), 2})}})
		must(t, err)
		must(t, w.Attach(ctx, p))
		serve(t, p.NS)
	}
	a, b := w.Pods()[0], w.Pods()[1]
	// The connections of the samples: b's node first, then a twice over one tunnel.
	hold := func(ns *lab.NS, from string, n int) *load.IdleConns {
		src := netip.MustParseAddr(from)
		ic, err := load.Idle(ctx,
			load.Target{Addr: "10.91.2.2:9000", Dial: func(ctx context.Context, network, addr string) (net.Conn, error) {
				return ns.DialFrom(ctx, src, network, addr)
			}}, n)
		must(t, err)
		t.Cleanup(ic.Close)
		return ic
	}
	plain, tunnelled := hold(w.N2.NS, "10.91.2.1", 1), hold(a.NS, "10.91.1.2", 2)

	for i, n := range w.Nodes() {
		pod := []*lab.Pod{a, b}[i].Name
		got := istioctlAll(t, w, ctx, n)
		for _, c := range commands {
			want := settled(istioctl(t, "testdata/ztunnel-"+pod+".json", c))
			if lines := strings.Count(want, "\n"); lines < 2 {
				t.Fatalf("the sample has %d lines of %s", lines, c)
			}
			want = strings.ReplaceAll(want, " Available false ", " Available true ") // theirs have expired
			if g := settled(got[c]); !sameRows(g, want) {
				t.Errorf("istioctl ztunnel-config %s at %s shows\n%s\nof a real ztunnel\n%s", c, n.Name, g, want)
			}
		}
		match(t, "certificate", got["certificate"],
			fmt.Sprintf(
				`(?m)^spiffe://cluster\.local/ns/default/sa/%s +Leaf +Available +true +[0-9a-f]+ +\d{4}-\S+Z +\d{4}-\S+Z$`, pod))
	}
	must(t, plain.Check())
	must(t, tunnelled.Check())

	// Without a file istioctl asks the daemon itself: the same rows, and the log's levels.
	match(t, "connections", liveIstioctl(t, ctx, w.N1, "connections", "ztunnel-n1"),
		`(?m)^a\.default +Outbound +a\.default:\d+ +b\.default:15008 +b\.default:9000 +HBONE$`)
	for _, row := range [][2]string{
		{"", "hickory_server::server=off,info"},
		// as istioctl's help writes it, which ztunnel itself refuses
		{"access:debug", "hickory_server::server=off,access=debug,info"},
		{"access=info,warn", "hickory_server::server=off,access=info,warn"},
	} {
		if out := liveIstioctl(t, ctx, w.N1, "log", "ztunnel-n1", "--level", row[0]); !strings.Contains(out,
			"current log level is "+row[1]+"\n") {
			t.Errorf("istioctl ztunnel-config log --level %q: %s", row[0], out)
		}
	}
}

// sameRows compares two outputs, the connections of one pod in any order.
func sameRows(a, b string) bool {
	rows := func(s string) []string {
		l := strings.Split(strings.TrimSpace(s), "\n")
		slices.Sort(l)
		return l
	}
	return slices.Equal(rows(a), rows(b))
}

// atNode is istioctl's cluster where every pod that is asked for is the daemon of one node, as over a port-forward.
type atNode struct {
	cli.Context
	ctx  context.Context
	node *lab.Node
}

func (c atNode) CLIClient() (kube.CLIClient, error) {
	client, err := c.Context.CLIClient()
	return forward{client, c}, err
}

func (c atNode) InferPodInfoFromTypedResource(string, string) (pod, ns string, err error) {
	return "ztunnel-" + c.node.Name, "istio-system", nil
}

type forward struct {
	kube.CLIClient
	at atNode
}

func (f forward) EnvoyDoWithPort(_ context.Context, _, _, method, path string, port int) ([]byte, error) {
	status, body, err := f.at.node.Daemon.Request(f.at.ctx, method, port, "/"+path)
	if err == nil && status != 200 {
		err = fmt.Errorf("%d: %s", status, body)
	}
	return []byte(body), err
}

// liveIstioctl runs `istioctl ztunnel-config ARGS` against a running daemon.
func liveIstioctl(t *testing.T, ctx context.Context, n *lab.Node, args ...string) string {
	t.Helper()
	return execute(t, ztunnelconfig.ZtunnelConfig(atNode{cli.NewFakeContext(nil), ctx, n}), args)
}
