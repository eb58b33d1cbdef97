package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"ztun/admin"
	"ztun/admin/ca"
	"ztun/admin/fdstore"
	"ztun/admin/istiod"
	"ztun/admin/xds"
	"ztun/admin/zlog"
	"ztun/cmd/attach"
	"ztun/proxy"
	"ztun/proxy/dns"
	"ztun/proxy/fair"
	"ztun/proxy/hbone"
	"ztun/proxy/identity"
	"ztun/proxy/rescue"
	"ztun/proxy/resolve"
	"ztun/proxy/state"
)

// daemon is the composition root: everything that runs is made here, in start order.
type daemon struct {
	c        *Config
	log      *zlog.Log
	logger   *slog.Logger
	ready    *admin.Ready
	loop     *admin.Loop
	know     *knowledge
	certs    *ca.Manager
	file     *xds.File
	static   *xds.Static
	xds      atomic.Pointer[xds.Client] // nil: workloads come from a file
	remoteCA *ca.Remote                 // nil: certificates are signed here
	probeCA  func(context.Context) error
	// upstreams are the ways to control plane and CA; complete when learn is done.
	upstreams []*istiod.Connector
	lost      *serverLost // the control plane, as far as it is; nil: workloads come from a file
	caLost    *serverLost // the CA; nil: this process is of no one workload
	crl       *ca.CRLFile // nil: CRL_PATH is not set
	revoked   identity.Revocation
	metrics   *proxy.Metrics
	policies  *proxy.UnknownPolicies
	pods      *podManager
	agent     *nodeAgent // nil: nobody but `ztun pod` says which pods there are
	fds       *attach.Descriptors
	store     *fdstore.Store // of listening sockets beyond our end; nil: there is none
	kind      attach.Kind    // how pods are attached; nil as long as pods is: start has not come so far
	ports     *runPorts      // of `ztun run`; nil in others
	buffers   hbone.Buffers  // shared by the tunnels of all pods
	panics    *rescue.Panics // of the data plane
	memory    *memory        // what lies here for the pods
	report    *fair.Report   // of what bounds turned away
	// handshakes compute half of the worker threads at a time, so that the other half is left to those who move bytes.
	handshakes *fair.Turns[proxy.Crypto]

	// What hostnames of workloads resolve to, and names that the mesh does not know: in our own namespace, as ztunnel
	// does.
	resolve     *resolve.Cache
	nameservers []netip.AddrPort
	search      []string
	dnsMetrics  *dns.Metrics // nil: the DNS proxy is off
	onDemandDNS *proxy.OnDemandDNS

	started time.Time
	meter   *admin.Meter // of the page on 15000

	quit   chan string // the reason to end; capacity 1
	failed atomic.Bool // the reason is a failure of ours

	servers  []*admin.Server
	registry *prometheus.Registry // nil: nobody asks for metrics
	control  *admin.PodSocket

	work  sync.WaitGroup // everything that ends with the context of run
	tasks atomic.Int64   // how much that is
}

// newDaemon makes a daemon that does nothing yet. It logs to out.
func newDaemon(c *Config, out io.Writer) (*daemon, error) {
	filter, err := zlog.ParseFilter(c.Log.Filter)
	if err != nil {
		return nil, &configError{"RUST_LOG", c.Log.Filter, err}
	}
	log := zlog.New(zlog.Options{Writer: out, JSON: c.Log.Format == "json", Control: zlog.NewControl(filter)})
	return &daemon{c: c, log: log, logger: log.Logger("ztun"), report: fair.NewReport(log.Logger("bounds")),
		handshakes: fair.NewTurns[proxy.Crypto](c.Process.WorkerThreads/2, 250*time.Microsecond, 500*time.Microsecond),
		panics:     rescue.New(log.Logger("ztun")), quit: make(chan string, 1)}, nil
}

// runProxy runs the daemon until a signal or /quitquitquit ends it.
func runProxy(ctx context.Context, c *Config) error {
	d, err := newDaemon(c, os.Stdout)
	if err != nil {
		return err
	}
	defer d.log.Close(context.Background())
	if c.outlived() {
		d.store = fdstore.Open(d.logger)
	}

	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(signals)
	// A reader of our log that goes away must not take the daemon with it.
	signal.Ignore(syscall.SIGPIPE)

	ctx, stop := context.WithCancel(ctx)
	defer stop()
	if err := d.start(ctx); err != nil {
		d.logger.Error("cannot start", "error", err)
		d.end(0)
		stop()
		d.work.Wait()
		return err
	}
	var reason string
	select {
	case s := <-signals:
		reason = "signal " + strings.ToUpper(s.String())
		if s == syscall.SIGTERM {
			reason = "signal SIGTERM"
		}
	case reason = <-d.quit:
	}
	d.logger.Info("received "+reason+", starting shutdown", "deadline", c.Process.TerminationDeadline)
	// The operator's impatience wins: a second signal ends the process at once.
	over := make(chan struct{})
	defer close(over)
	go func() {
		select {
		case <-signals:
			os.Exit(0)
		case <-over:
		}
	}()
	d.end(c.Process.TerminationDeadline)
	stop()
	d.work.Wait()
	d.logger.Info("shutdown complete")
	if d.failed.Load() {
		return errors.New(reason) // whoever started us is to start us again
	}
	return nil
}

// start makes everything, in the order in which a failure is cheapest.
func (d *daemon) start(ctx context.Context) error {
	c := d.c
	d.started = time.Now()
	version, revision := buildVersion()
	d.logger.Info("ztun", "version", version, "revision", revision, "go", runtime.Version())
	if effective, err := json.Marshal(c.dump()); err == nil {
		d.logger.Debug("effective configuration", "config", string(effective))
	}
	// One processor more than the workers have, so that admin work never takes one of theirs.
	if !c.Process.GCSet {
		percent := gcSmall
		if c.Mode.Rootless {
			// A run's start is work, which takes a quarter less CPU time so (26 ms); processors see in a moment what is to be.
			percent = gcMost
		}
		debug.SetGCPercent(percent)
	}
	d.memory = newMemory("/", c.Memory.Limit, c.Memory.Pod)
	d.memory.tellRuntime()
	// What Go has found by now: the processors that we may run on, within the cgroup's quota.
	least, limit := planProcessors(runtime.GOMAXPROCS(0), c.Process.WorkerThreads, c.Process.AdaptiveProcessors)
	procs := &processors{least: least, limit: limit, gc: !c.Process.GCSet}
	procs.set(procs.limit)
	// Also where their number is fixed: the collector is tuned all the same, and memory returned.
	d.admin(ctx, "processors", func(ctx context.Context) error { procs.run(ctx); return nil })
	if c.Privileges.Drop {
		for _, n := range needs(c) {
			if c.Privileges.Held&capsOf(n.cap) != 0 {
				d.logger.Debug("capability held", "capability", capsOf(n.cap).String(), "for", n.why)
			}
		}
		if c.Privileges.ShutOut != "" {
			d.logger.Warn("CAP_DAC_OVERRIDE is kept: without it the daemon may not use a path of its configuration", "path",
				c.Privileges.ShutOut)
		}
	}
	for _, w := range c.Warnings {
		d.logger.Warn(w)
	}
	files := raiseFileLimit(d.logger)
	if err := makeStateDir(c.State.Dir); err != nil {
		return &configError{"ZTUN_STATE_DIR", c.State.Dir, err}
	}

	d.ready = admin.NewReady(time.Now)
	stateReady := d.ready.Register(stateManager)
	proxyReady := d.ready.Register("proxy")
	podsReady := d.ready.Register("workload proxy manager")
	certsReady := d.ready.Register("certificates")
	if err := d.bindReadiness(); err != nil {
		return err
	}
	d.admin(ctx, "readiness", func(ctx context.Context) error {
		sayReady(ctx, d.ready, d.logger.With("node", c.Node.Name))
		return nil
	})

	signer, err := d.authority(ctx)
	if err != nil {
		return err
	}
	d.revocation(ctx)
	d.metrics = proxy.NewMetrics()
	d.policies = proxy.NewUnknownPolicies(c.Proxy.DenyUnknownPolicy, d.log.Logger("proxy"))
	d.onDemandDNS = proxy.NewOnDemandDNS()
	if c.DNS.Proxy {
		d.dnsMetrics = dns.NewMetrics()
	}
	d.resolve = resolve.New(resolve.Options{IPv4Only: !c.Net.IPv6})
	resolver := resolvConf()
	d.nameservers, d.search = resolver.addrs(), c.searchDomains(resolver)
	d.know = newKnowledge(func() *state.View { return d.loop.View() })
	d.loop = admin.NewLoop(admin.LoopOptions{Published: d.know.published, Handle: d.handle, Logger: d.log.Logger("admin")})
	d.fds = attach.NewDescriptors(files, d.report)
	d.kind = d.chooseKind()
	d.pods = newPodManager(c, d.kind, d, d.panics, d.log.Logger("pods"))
	if c.Attach.NodeAgent && !c.Mode.Rootless {
		d.agent = newNodeAgent(d.pods, podsReady, c.Attach.InpodUDS, d.log.Logger("zds"), func() {
			d.letGo("the node agent has named all pods")
		})
	}
	d.admin(ctx, "admin loop", func(ctx context.Context) error { return d.loop.Run(ctx) })
	d.admin(ctx, "certificates", func(ctx context.Context) error { return d.certs.Run(ctx) })
	d.admin(ctx, "re-check", func(ctx context.Context) error { d.know.follow(ctx, d.newState); return nil })
	d.meter = admin.NewMeter(d.traffic)
	d.admin(ctx, "meter", d.meter.Run)
	d.admin(ctx, "series", func(ctx context.Context) error { d.metrics.Run(ctx, d.present); return nil })
	d.file = &xds.File{Path: c.XDS.LocalPath, Inline: c.XDS.LocalInline,
		TrustDomain: trustDomain(signer, c.Self.TrustDomain),
		Logger:      d.log.Logger("xds")}
	d.static = xds.NewStatic(d.file)
	if err := d.bindAdmin(); err != nil {
		return err
	}

	if err := d.learn(ctx, stateReady); err != nil {
		return err
	}
	if c.follows() && len(d.upstreams) > 0 {
		d.admin(ctx, "host's addresses", d.followHost)
	}

	// Bound before anything of the node or of the list of pods is touched: its lock tells two daemons with
	// one ZTUN_STATE_DIR apart. It is served last.
	d.control, err = admin.NewPodSocket(admin.PodSocketOptions{Path: c.State.Socket, Pods: d.pods,
		Connections: d.connections(),
		Handlers:    d.handlers(), Report: d.report, Logger: d.log.Logger("pods")})
	if err != nil {
		return err
	}
	if err := d.kind.Open(ctx); err != nil {
		return err
	}
	if d.registry != nil {
		d.registry.MustRegister(&dataplaneCollector{d: d, tables: newMetricTables()})
	}
	proxyReady.Done()
	if c.Mode.Dedicated && !c.Mode.Rootless {
		if err := d.pods.addOwn(ctx); err != nil {
			return err
		}
	} else {
		if err := d.pods.adopt(ctx); err != nil {
			return err
		}
		if d.agent == nil { // else it has yet to say which pods there are
			d.letGo("nobody has them now")
			if err := d.kind.Sweep(d.pods.addresses()); err != nil {
				d.logger.Warn("routes of an earlier run may be left", "error", err)
			}
		}
	}
	d.serve("control socket", d.control.Serve)
	d.admin(ctx, "memory", d.weigh)
	d.admin(ctx, "pod watch", func(ctx context.Context) error { d.pods.watch(ctx); return nil })
	d.admin(ctx, "descriptors", func(ctx context.Context) error { d.fds.Run(ctx); return nil })
	if s := d.newSelf(); s != nil {
		d.pods.self.Store(s)
		d.know.poke()
	}
	if d.agent == nil {
		podsReady.Done()
	} else {
		d.admin(ctx, "node agent", func(ctx context.Context) error { return d.agent.run(ctx, d.ready) })
		if d.store.Left() > 0 {
			d.admin(ctx, "kept listeners", d.expireKept)
		}
	}
	d.store.Ready()
	d.logger.Info("started", "node", c.Node.Name, "workers", c.Process.WorkerThreads, "offload",
		d.kind.Stats().Offload.VNetHdr)
	d.admin(ctx, "certificate check", func(ctx context.Context) error { d.checkCertificates(ctx, certsReady); return nil })
	return nil
}

// end shuts down in ztunnel's order (spec dataplane 12): listeners close, connections may finish until
// the deadline, the rest is cut.
func (d *daemon) end(deadline time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	var hangUp func()
	if d.agent != nil {
		hangUp = d.agent.leave
	}
	var wg sync.WaitGroup
	if d.control != nil {
		// Beside the rest: a `ztun pod del` under way drains a pod, which may take as long as we have.
		wg.Go(func() { d.control.Shutdown(ctx) })
	}
	for _, s := range d.servers {
		wg.Go(func() { s.Shutdown(ctx) })
	}
	if d.kind != nil {
		d.pods.shutdown(ctx, hangUp, d.store)
	}
	wg.Wait()
	d.store.Clear() // nothing is left, unless the start has failed
	for _, s := range d.servers {
		s.Close()
	}
	if d.kind != nil {
		d.kind.Close()
	}
}

// askToQuit is how /quitquitquit and failures end the process; the first reason counts.
func (d *daemon) askToQuit(reason string) {
	select {
	case d.quit <- reason:
	default:
	}
}

// raiseFileLimit lifts the soft limit of open files to the hard one, every tunnel takes one, and returns the limit.
func raiseFileLimit(log *slog.Logger) uint64 {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		log.Warn("the limit of open files is not known, 1024 is taken for it", "error", err)
		return 1024
	}
	if l.Cur == l.Max {
		// Go's runtime has done it. To do it again would keep it from giving the commands of `ztun run` what was there.
		return l.Cur
	}
	soft := l.Cur
	l.Cur = l.Max
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		log.Warn("the limit of open files could not be raised", "error", err)
		return soft
	}
	return l.Cur
}
