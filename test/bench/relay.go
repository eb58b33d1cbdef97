package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"time"

	"ztun/test/bench/report"
	"ztun/test/lab"
)

// The subjects of the relay suite besides the bare veth.
const (
	relayName = "tun+netstack" // ztrelay
	slirpName = "slirp4netns"
	singName  = "sing-box"
)

// relayWorld is a server namespace with a bare veth to one client, in which relays run that serve one more client
// namespace each:
//
//	rbare 10.92.0.1 ---veth--- 10.92.0.2 rserver
//	rtun  10.92.1.2 ---TUN---- ztrelay in rserver, and likewise for the others
//
// A relay's connections go to 10.92.0.2 over rserver's loopback.
type relayWorld struct {
	lab     *lab.World
	server  end
	clients []relayClient
}

// ztrelay is the one relay that can be asked.
func (r *relayWorld) ztrelay() []target { return []target{{"ztrelay", r.server.ns}} }

type relayClient struct {
	name   string
	client end
	relay  *lab.Process // nil for the bare veth
}

// newRelayWorld makes the namespaces, starts the relays and proves each with one byte. A foreign relay that cannot be
// started is a note in the report and no error.
func (b *bench) newRelayWorld(ctx context.Context) (_ *relayWorld, err error) {
	r := &relayWorld{}
	if r.lab, err = lab.New(lab.Options{Prefix: "ztr", Logf: b.logf}); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.lab.Close())
		}
	}()
	server, err := r.lab.AddNS("rserver")
	if err != nil {
		return nil, err
	}
	bare, err := r.lab.AddNS("rbare")
	if err != nil {
		return nil, err
	}
	if err := r.lab.IP(ctx, server,
		"link set lo up", "link add eth0 mtu 1500 type veth peer name eth0 netns "+bare.Name,
		"addr add 10.92.0.2/24 dev eth0", "addr add fd92::2/64 dev eth0 nodad", "link set eth0 up"); err != nil {
		return nil, err
	}
	if err := r.lab.IP(ctx, bare,
		"link set lo up", "addr add 10.92.0.1/24 dev eth0", "addr add fd92::1/64 dev eth0 nodad",
		"link set eth0 mtu 1500 up"); err != nil {
		return nil, err
	}
	ips := []netip.Addr{netip.MustParseAddr("10.92.0.2"), netip.MustParseAddr("fd92::2")}
	r.server = b.end(server, ips)
	if err := b.serve(ctx, r.lab, r.server); err != nil {
		return nil, err
	}
	r.clients = []relayClient{{name: bareVeth, client: end{ns: bare}}}
	c, err := b.startZtrelay(ctx, r)
	if err != nil {
		return nil, fmt.Errorf("ztrelay: %w", err)
	}
	r.clients = append(r.clients, c)
	for _, foreign := range []struct {
		name  string
		start func(context.Context, *relayWorld) (relayClient, error)
	}{{slirpName, b.startSlirp}, {singName, b.startSingBox}} {
		if _, err := exec.LookPath(foreign.name); err != nil {
			b.note("%s is not installed: left out of the relay suite", foreign.name)
			continue
		}
		c, err := foreign.start(ctx, r)
		if err == nil {
			err = b.proves(ctx, r, c)
		}
		if err != nil {
			b.note("%s is installed but could not be used: %v", foreign.name, err)
			continue
		}
		r.clients = append(r.clients, c)
	}
	return r, nil
}

func (b *bench) note(format string, args ...any) {
	b.r.rep.Notes = append(b.r.rep.Notes, fmt.Sprintf(format, args...))
}

// proves asks the server through a relay who it sees, until it answers, at most for five seconds: relays have no
// common way to say that they are ready.
func (b *bench) proves(ctx context.Context, r *relayWorld, c relayClient) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for {
		_, err := r.lab.Run(ctx, c.client.ns, b.tool("ztload"), "whoami", "-to", at(r.server.ip, echoPort), "-timeout", "2s")
		if err == nil || ctx.Err() != nil {
			return err
		}
		settle(ctx, 100*time.Millisecond)
	}
}

// Close takes it all down; none is no error.
func (r *relayWorld) Close() error {
	if r == nil || r.lab == nil {
		return nil
	}
	return r.lab.Close()
}

// startZtrelay starts the tool of this folder and configures the device that it makes.
func (b *bench) startZtrelay(ctx context.Context, r *relayWorld) (relayClient, error) {
	ns, err := r.lab.AddNS("rtun")
	if err != nil {
		return relayClient{}, err
	}
	lines := newLines()
	var errOut lockedBuffer
	p, err := r.lab.Start(r.server.ns, lab.Cmd{
		Args: []string{b.tool("ztrelay"), "-netns", ns.Path(), "-name", "ztun0", "-addr", "10.92.1.2,fd92:1::2",
			"-http", fmt.Sprintf("127.0.0.1:%d", lab.AdminPort)},
		Stdout: lines, Stderr: &errOut,
	})
	if err != nil {
		return relayClient{}, err
	}
	select {
	case <-lines.c:
	case <-p.Done():
		return relayClient{}, fmt.Errorf("%w: %s", p.Err(), errOut.String())
	case <-time.After(10 * time.Second):
		return relayClient{}, fmt.Errorf("not ready after 10 s: %s", errOut.String())
	}
	if err := r.lab.IP(ctx, ns,
		"link set lo up", "addr add 10.92.1.2/32 dev ztun0", "addr add fd92:1::2/128 dev ztun0 nodad", "link set ztun0 up",
		"route add default dev ztun0", "route add ::/0 dev ztun0"); err != nil {
		return relayClient{}, err
	}
	c := relayClient{relayName, end{ns: ns}, p}
	return c, b.proves(ctx, r, c)
}

// startSlirp starts slirp4netns with its largest MTU, at which it is fastest.
func (b *bench) startSlirp(_ context.Context, r *relayWorld) (relayClient, error) {
	if b.o.V6 {
		return relayClient{}, errors.New("not measured with IPv6")
	}
	ns, err := r.lab.AddNS("rslirp")
	if err != nil {
		return relayClient{}, err
	}
	var errOut lockedBuffer
	p, err := r.lab.Start(r.server.ns, lab.Cmd{
		Args:   []string{slirpName, "--configure", "--mtu=65520", "--disable-dns", "--netns-type=path", ns.Path(), "tap0"},
		Stdout: &errOut, Stderr: &errOut,
	})
	return relayClient{slirpName, end{ns: ns}, p}, err
}

// startSingBox starts sing-box with its own netstack at MTU 1500, and moves its device into the client's namespace.
func (b *bench) startSingBox(ctx context.Context, r *relayWorld) (relayClient, error) {
	if b.o.V6 {
		return relayClient{}, errors.New("not measured with IPv6")
	}
	ns, err := r.lab.AddNS("rsing")
	if err != nil {
		return relayClient{}, err
	}
	const conf = `{"log":{"level":"error"},
"inbounds":[{"type":"tun","tag":"in","interface_name":"sbtun0","address":["172.19.0.1/30"],"mtu":1500,"auto_route":false,"stack":"gvisor"}],
"outbounds":[{"type":"direct","tag":"out"}]}`
	file := r.lab.Path("sing-box.json")
	if err := os.WriteFile(file, []byte(conf), 0o644); err != nil {
		return relayClient{}, err
	}
	var errOut lockedBuffer
	p, err := r.lab.Start(r.server.ns, lab.Cmd{Args: []string{singName, "run", "-c", file}, Dir: r.lab.Dir,
		Stdout: &errOut, Stderr: &errOut})
	if err != nil {
		return relayClient{}, err
	}
	for deadline := time.Now().Add(5 * time.Second); ; settle(ctx, 100*time.Millisecond) {
		if err = r.lab.IP(ctx, r.server.ns, "link set sbtun0 netns "+ns.Name); err == nil {
			break
		}
		if time.Now().After(deadline) {
			return relayClient{}, fmt.Errorf("no device: %w: %s", err, strings.TrimSpace(errOut.String()))
		}
	}
	return relayClient{singName, end{ns: ns}, p}, r.lab.IP(ctx, ns,
		"link set lo up", "addr add 172.19.0.1/30 dev sbtun0", "link set sbtun0 mtu 1500 up", "route add default dev sbtun0")
}

// relayCases are bulk transfers over a relay and nothing else, and over one daemon to a destination outside the mesh.
func (b *bench) relayCases(ctx context.Context) ([]kase, error) {
	var err error
	if b.relay, err = b.newRelayWorld(ctx); err != nil {
		return nil, err
	}
	var ks []kase
	for _, streams := range []int{1, 8} {
		for _, dir := range dirs() {
			k := kase{
				suite: "relay", name: streamsText(streams) + " " + dir, lasts: b.length() + 100*time.Millisecond,
				rows: []report.Row{
					{Metric: "throughput", Unit: "Gb/s", Subject: relayName, Target: &report.Target{OfRatio: true, Value: 0.5}},
					{Metric: "CPU-s/GB, relay"}, {Metric: "CPU-s/GB, all"},
				},
			}
			k.profile = func() (string, []target) { return relayName, b.relay.ztrelay() }
			for _, c := range b.relay.clients {
				k.subjects = append(k.subjects, subject{c.name, func(ctx context.Context, _ int) (outcome, error) {
					return b.relayTransfer(ctx, c, streams, dir)
				}})
			}
			ks = append(ks, k)
		}
	}
	if b.o.NoDaemon {
		return ks, nil
	}
	for _, streams := range []int{1, 8} {
		for _, dir := range dirs() {
			ks = append(ks, kase{
				suite: "relay", name: "daemon, passthrough, " + streamsText(streams) + " " + dir, lasts: b.length() +
					100*time.Millisecond,
				rows: []report.Row{{Metric: "throughput", Unit: "Gb/s"}, {Metric: "CPU-s/GB, n1"}, {Metric: "CPU-s/GB, all"}},
				subjects: b.over(func(w *world) path {
					return w.barePass
				}, func(w *world) path { return w.ztunPass }, b.transfer(streams, dir)),
			})
		}
	}
	return ks, nil
}

func (b *bench) relayTransfer(ctx context.Context, c relayClient, streams int, dir string) (outcome, error) {
	spent := func() (time.Duration, error) {
		if c.relay == nil {
			return 0, nil
		}
		st, err := b.r.proc.Stat(c.relay.Pid())
		return st.CPU, err
	}
	before, err := spent()
	if err != nil {
		return nil, fmt.Errorf("the relay has ended: %w", err)
	}
	var gb float64
	work := func() (outcome, error) {
		return b.meter(path{}, func() (float64, outcome, error) {
			r, err := b.bulk(ctx, b.relay.lab, c.client, b.relay.server, streams, dir, b.length())
			if err != nil {
				return 0, nil, err
			}
			gb = float64(r.Bytes) / 1e9
			return gb, outcome{"throughput": r.Gbps}, nil
		})
	}
	var ask []target
	if c.name == relayName {
		ask = b.relay.ztrelay()
	}
	o, err := watched(ctx, ask, lab.AdminPort, []*lab.NS{c.client.ns, b.relay.server.ns}, work)
	if err != nil {
		return nil, err
	}
	if c.relay != nil {
		after, err := spent()
		if err != nil {
			return nil, fmt.Errorf("the relay has ended: %w", err)
		}
		o["CPU-s/GB, relay"] = (after - before).Seconds() / gb
	}
	return o, nil
}
