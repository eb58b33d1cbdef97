package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ztun/test/bench/report"
	"ztun/test/lab"
	"ztun/test/load"
)

// The subjects of the rootless suite besides slirp4netns.
const (
	runName      = "ztun run"
	otherRunName = "other ztun run" // of --versus and --versus-env
	pastaName    = "pasta"
)

// rootlessWorld is two hosts, h1 - n1 - n2 - h2, and what an ordinary user of h1 needs. Each measurement starts its
// way anew, as the user, with the generator as its command.
type rootlessWorld struct {
	lab            *lab.World
	client, server end
	dir            string             // which the user may read: programs, a CA, a node of the TUN device
	runs           map[string]variant // by subject; their programs are those in dir
	// What HBONE is measured between: the pods of two daemons, and by subject users' workloads on the nodes of those, so
	// that the way between is the same one.
	isolated  path
	peers     map[string]lab.Workload // who is called
	near, far *lab.NS                 // where the caller runs, and where who is called does
}

// Close takes it down; none is no error.
func (r *rootlessWorld) Close() error {
	if r == nil || r.lab == nil {
		return nil
	}
	return errors.Join(r.lab.Close(), os.RemoveAll(r.dir))
}

func (b *bench) newRootlessWorld(ctx context.Context) (_ *rootlessWorld, err error) {
	r := &rootlessWorld{runs: map[string]variant{}, peers: map[string]lab.Workload{}}
	if r.lab, err = lab.New(lab.Options{Prefix: "ztu", Bin: b.tool("ztun"), Logf: b.logf}); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Close())
		}
	}()
	if r.dir, err = os.MkdirTemp("", "ztun-bench-user-"); err != nil {
		return nil, err
	}
	h1, err := r.lab.AddHost(r.lab.N1, "h1")
	if err != nil {
		return nil, err
	}
	h2, err := r.lab.AddHost(r.lab.N2, "h2")
	if err != nil {
		return nil, err
	}
	r.client, r.server = b.end(h1.NS, h1.IPs), b.end(h2.NS, h2.IPs)
	r.near, r.far = r.lab.N1.NS, r.lab.N2.NS
	for _, v := range b.variants() {
		name := map[string]string{ztunName: runName, otherName: otherRunName}[v.name]
		program := filepath.Join(r.dir, strings.ReplaceAll(name, " ", "-"))
		if out, err := exec.CommandContext(ctx, "cp", v.bin, program).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("%w: %s", err, out)
		}
		r.runs[name] = variant{name: name, bin: program, env: v.env}
	}
	if len(r.runs) > 0 {
		one, err := r.lab.AddPod(r.lab.N1, lab.Pod{Name: "a"})
		if err != nil {
			return nil, err
		}
		two, err := r.lab.AddPod(r.lab.N2, lab.Pod{Name: "b"})
		if err != nil {
			return nil, err
		}
		r.isolated = path{name: isolatedName, lab: r.lab, client: b.end(one.NS, one.IPs), server: b.end(two.NS, two.IPs)}
	}
	f := r.lab.DefaultWorld()
	f.Workloads = append(f.Workloads, r.served(r.lab.N2.Addr4, r.lab.N2.Addr6)...)
	f.Workloads = append(f.Workloads, lab.Workload{UID: "lab//v1/Pod/default/user", Name: "user", Namespace: "default",
		ServiceAccount: "user", TrustDomain: "cluster.local", WorkloadIPs: []string{"10.91.66.4", "fd91:0:0:66::4"},
		Protocol: "TCP", Services: map[string]map[uint16]uint16{}})
	if err = r.lab.WriteWorld(f); err != nil {
		return nil, err
	}
	ca, err := r.lab.CADir(ctx)
	if err != nil {
		return nil, err
	}
	tun := filepath.Join(r.dir, "tun")
	// The CA is this world's alone.
	if out, err := exec.CommandContext(ctx, "sh", "-ec", `cp -r "$1" "$2/ca" && cp "$3" "$2" && chmod -R a+rX "$2"`,
		"sh", ca, r.dir, b.tool("ztload")).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, out)
	}
	if err = unix.Mknod(tun, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 200))); err != nil {
		return nil, err
	}
	if err = os.Chmod(tun, 0o666); err != nil {
		return nil, err
	}
	if err = b.serve(ctx, r.lab, r.server); err != nil {
		return nil, err
	}
	if _, err = r.lab.Start(r.server.ns, lab.Cmd{Args: []string{"iperf3", "-s"}}); err != nil {
		return nil, err
	}
	if err = b.serveQUIC(ctx, r); err != nil {
		return nil, err
	}
	if err = b.isolatedPair(ctx, r); err != nil {
		return nil, err
	}
	for subject := range r.runs {
		if err = b.serveAsUser(ctx, r, subject); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// slirpScript runs the rest of its arguments behind slirp4netns: $1 is an address to be routed before they start.
const slirpScript = `to=$1; shift
unshare -Urn sh -c 'until ip route get '$to' >/dev/null 2>&1; do sleep 0.02; done; exec "$@"' sh "$@" &
pid=$!
sleep 0.1
slirp4netns --configure --mtu=1500 --disable-dns $pid tap0 >/dev/null 2>&1 &
wait $pid; status=$?
kill $!; exit $status`

// run runs a generator as the user by a subject's way, and decodes what it prints.
func (b *bench) rootlessRun(ctx context.Context, r *rootlessWorld, subject string, into any, args ...string) error {
	return b.rootlessRunIn(ctx, r, r.client.ns, subject, into, args...)
}

// rootlessRunIn is rootlessRun in another host's namespace.
func (b *bench) rootlessRunIn(ctx context.Context, r *rootlessWorld, ns *lab.NS, subject string, into any,
	args ...string) error {
	switch subject {
	case runName, otherRunName:
		args = append([]string{r.runs[subject].bin, "run", "--name", "user", "--service-account", "user", "--ip",
			"10.91.66.4,fd91:0:0:66::4", "--"}, args...)
	case pastaName:
		args = append([]string{pastaName, "--config-net", "-q", "-m", "1500", "--"}, args...)
	case slirpName:
		args = append([]string{"sh", "-c", slirpScript, "sh", r.server.ip.String()}, args...)
	}
	cmd, err := r.asUser(subject, args)
	if err != nil {
		return err
	}
	out, err := r.lab.RunCmd(ctx, ns, cmd)
	if out = strings.TrimSpace(out); out == "" || err != nil && lab.ExitCode(err) != 1 {
		return fmt.Errorf("no result: %w", err)
	}
	if jerr := json.Unmarshal([]byte(out), into); jerr != nil {
		return fmt.Errorf("%w in %.200q (%w)", jerr, out, err)
	}
	return nil
}

// asUser is a program as the user has it, with what a subject's ztun needs to know.
func (r *rootlessWorld) asUser(subject string, args []string) (lab.Cmd, error) {
	world, err := os.ReadFile(r.lab.WorldPath())
	if err != nil {
		return lab.Cmd{}, err
	}
	script := "mount --bind " + r.dir + `/tun /dev/net/tun && cd / && exec setpriv --reuid 65534 --regid 65534 ` +
		`--clear-groups "$@"`
	return lab.Cmd{Args: append([]string{"unshare", "-m", "sh", "-c", script, "sh"}, args...),
		Env: append(append(lab.BaseEnv(), "LOCAL_XDS="+string(world), "XDS_ADDRESS=", "CA_ADDRESS=",
			"LOCAL_CA_DIR="+r.dir+"/ca", "TMPDIR=/tmp"), r.runs[subject].env...)}, nil
}

// rootlessCases are what a user's workload does with a plain destination, by ztun and by what others have.
func (b *bench) rootlessCases(ctx context.Context) ([]kase, error) {
	var err error
	if b.user, err = b.newRootlessWorld(ctx); err != nil {
		return nil, err
	}
	r := b.user
	names := []string{bareVeth}
	for _, other := range []string{pastaName, slirpName} {
		if _, err := exec.LookPath(other); err != nil {
			b.note("%s is not installed: left out of the rootless suite", other)
			continue
		}
		names = append(names, other)
	}
	for _, name := range []string{runName, otherRunName} {
		if _, ok := r.runs[name]; ok {
			names = append(names, name)
		}
	}
	over := func(f func(ctx context.Context, subject string) (outcome, error)) (s []subject) {
		for _, name := range names {
			if name != slirpName || !b.o.V6 {
				s = append(s, subject{name, func(ctx context.Context, _ int) (outcome, error) { return f(ctx, name) }})
			}
		}
		return s
	}
	var ks []kase
	for _, streams := range []int{1, 8} {
		for _, dir := range dirs() {
			ks = append(ks, kase{suite: "rootless", name: streamsText(streams) + " " + dir, lasts: b.length() + time.Second,
				rows: []report.Row{{Metric: "throughput", Unit: "Gb/s", Subject: runName,
					Target: &report.Target{OfRatio: true, Value: 1.5}}},
				subjects: over(func(ctx context.Context, subject string) (outcome, error) {
					var got load.BulkResult
					err := b.rootlessRun(ctx, r, subject, &got, r.dir+"/ztload", "bulk", "-to", at(r.server.ip, echoPort),
						"-streams", fmt.Sprint(streams), "-dir", dir, "-t", b.length().String())
					if err == nil && (got.Failed > 0 || got.Bytes == 0) {
						err = fmt.Errorf("%d of %d streams failed: %s", got.Failed, got.N, strings.Join(got.Errors, "; "))
					}
					return outcome{"throughput": got.Gbps}, err
				})})
		}
	}
	ks = append(ks, kase{suite: "rootless", name: "connections, 16 at a time", lasts: b.length() + time.Second,
		rows: []report.Row{{Metric: "rate", Unit: "per s"}, {Metric: "p50", Unit: "ms"}},
		subjects: over(func(ctx context.Context, subject string) (outcome, error) {
			var got load.RateResult
			err := b.rootlessRun(ctx, r, subject, &got, r.dir+"/ztload", "rate", "-to", at(r.server.ip, bytePort), "-par",
				"16", "-t", b.length().String())
			if err == nil && got.OK == 0 {
				err = fmt.Errorf("no connection succeeded: %s", strings.Join(got.Errors, "; "))
			}
			return outcome{"rate": got.PerSecond, "p50": got.Latency.P50}, err
		})})
	for _, dir := range dirs() {
		ks = append(ks, kase{suite: "rootless", name: "UDP " + dir, lasts: b.length() + time.Second,
			rows: []report.Row{{Metric: "arrives", Unit: "Gb/s"}},
			subjects: over(func(ctx context.Context, subject string) (outcome, error) {
				var got struct {
					Error string
					End   struct {
						Sum struct {
							Bytes, Seconds float64
							Lost           float64 `json:"lost_percent"`
						}
					}
				}
				args := []string{"iperf3", "-u", "-b", "2G", "-l", "1400", "-J", "-t", fmt.Sprint(max(1, int(b.o.Seconds))),
					"-c", r.server.ip.String()}
				if dir == "down" {
					args = append(args, "-R")
				}
				if err := b.rootlessRun(ctx, r, subject, &got, args...); err != nil || got.Error != "" {
					return nil, fmt.Errorf("iperf3: %s %w", got.Error, err)
				}
				s := got.End.Sum
				return outcome{"arrives": s.Bytes * 8 / s.Seconds / 1e9 * (1 - s.Lost/100), "lost": s.Lost}, nil
			})})
	}
	ks = append(append(ks, b.quicCase(r, over)), b.rootlessMeshCases(r)...)
	if !b.o.NoDaemon {
		starts, err := b.crowdCases(ctx, r)
		if err != nil {
			return nil, err
		}
		ks = append(ks, starts...)
	}
	return ks, nil
}
