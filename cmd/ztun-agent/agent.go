package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"ztun/admin/agent"
	"ztun/admin/guard"
	"ztun/admin/zds"
	"ztun/cmd/agentcmd"
	"ztun/cmd/cni"
)

// node is the agent of one node.
type node struct {
	o        agentcmd.Options
	cluster  *cluster
	proxies  *zds.Server
	enroller *agent.Enroller
	plugin   *cni.Installer // nil: not our business
	serving  atomic.Bool    // the sockets are there
	failed   atomic.Uint64  // pods that were looked at in vain
	log      *slog.Logger
}

// workers is how many pods are looked at at one time: the API server is waited for meanwhile.
const workers = 4

func newNode(o agentcmd.Options, config *rest.Config, logger func(string) *slog.Logger) (*node, error) {
	c, err := newCluster(config, o.Node, o.MeshNamespace, o.DaemonSet)
	if err != nil {
		return nil, err
	}
	n := &node{o: o, cluster: c, log: logger("agent")}
	n.proxies = zds.NewServer(zds.ServerOptions{Path: o.ZDSSocket, Logger: logger("zds"),
		Answered: func(uid string) { n.enroller.Answered(uid) }})
	n.enroller = agent.New(agent.Options{Cluster: c, Proxies: n.proxies, Namespaces: agent.NewProcs(o.Proc),
		Rules: n.rules(), Logger: n.log})
	if o.CNIConfDir == "" || o.PluginSocket == "" {
		return n, nil
	}
	n.plugin, err = cni.NewInstaller(cni.Options{ConfDir: o.CNIConfDir, BinDir: o.CNIBinDir, Socket: o.PluginSocket,
		Program: o.Ztun, Log: logger("cni"),
		Own: []string{o.MeshNamespace + "/" + o.DaemonSet + "-", o.MeshNamespace + "/ztunnel-"}})
	return n, err
}

// flushTime is how long the proxies are waited for at the end, when they have been told to let go of all pods.
const flushTime = 5 * time.Second

// run works until ctx ends, or until a socket fails.
func (n *node) run(ctx context.Context) error {
	// The parts outlive ctx: what was asked of the proxies has to reach them.
	working, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	var parts sync.WaitGroup
	// part runs until working ends; its failure is everybody's end.
	part := func(f func(context.Context) error) {
		parts.Go(func() {
			if err := f(working); err != nil && working.Err() == nil {
				cancel(err)
			}
		})
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	defer context.AfterFunc(working, stop)()
	err := n.start(ctx, part)
	if err != nil {
		stop()
	}
	n.stay(ctx, context.WithoutCancel(working))
	cancel(err)
	n.cluster.queue.ShutDown()
	parts.Wait()
	n.cluster.broadcaster.Shutdown()
	if err = context.Cause(working); errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// stay waits for the end of ctx. If the DaemonSet goes, before that or with it, new pods start uncaptured from then on,
// and those that run are let go. Where nobody says so any more they stay as they are, and only the plugin goes: without
// it no pod of the mesh would start.
func (n *node) stay(ctx, working context.Context) {
	select {
	case <-ctx.Done():
	case <-n.cluster.set.gone:
	}
	fate := going
	select {
	case <-n.cluster.set.gone:
	default:
		fate = n.cluster.fate(working, n.o.MeshNamespace, n.o.DaemonSet)
	}
	if fate == stays {
		return
	}
	n.uninstall()
	if fate == untold {
		return
	}
	n.log.Info("the agent's DaemonSet is being deleted: pods that run are let go")
	n.enroller.Leave()
	pods, _ := n.cluster.all()
	for _, p := range pods {
		n.cluster.queue.Add(p.Ref())
	}
	<-ctx.Done()
	n.flush(working)
}

// flush waits until the proxies have let go of all pods.
func (n *node) flush(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, flushTime)
	defer cancel()
	look := time.NewTicker(10 * time.Millisecond)
	defer look.Stop()
	for n.enroller.Stats().Held > 0 && ctx.Err() == nil { // a pod was being looked at
		select {
		case <-look.C:
		case <-ctx.Done():
		}
	}
	if left := n.proxies.Flush(ctx); left > 0 {
		n.log.Warn("no proxy has let go of these pods: they stay captured, and have no network until they are made anew",
			"pods", left)
	}
}

func (n *node) uninstall() {
	if n.plugin == nil {
		return
	}
	n.log.Info("the agent's DaemonSet is being deleted: the CNI plugin goes with it")
	if err := n.plugin.Uninstall(); err != nil {
		n.log.Error("the CNI plugin cannot be removed", "error", err)
	}
}

// start brings the parts up in their order.
func (n *node) start(ctx context.Context, part func(func(context.Context) error)) error {
	if n.o.Listen != "" {
		l, err := net.Listen("tcp", n.o.Listen)
		if err != nil {
			return fmt.Errorf("--listen: %w", err)
		}
		part(func(ctx context.Context) error { return serve(ctx, l, n.visible(), "agent_http") })
	}
	c := n.cluster
	c.broadcaster.StartRecordingToSink(sink{ctx, c.api})
	for _, i := range []cache.SharedIndexInformer{c.namespaces, c.pods, c.set.informer} {
		part(func(ctx context.Context) error {
			i.Run(ctx.Done())
			return nil
		})
	}
	n.log.Info("waiting for the API server to say which pods there are", "node", n.o.Node)
	if !cache.WaitForCacheSync(ctx.Done(), c.namespaces.HasSynced, c.pods.HasSynced) {
		return ctx.Err()
	}
	pods, _ := c.all()
	for _, p := range pods {
		n.look(ctx, p.Ref())
	}
	n.log.Info("the pods of this node are known", "pods", len(pods), "of the mesh", n.enroller.Stats().Held)
	if err := n.proxies.Listen(); err != nil {
		return err
	}
	part(n.proxies.Run)
	if n.o.PluginSocket != "" {
		l, err := zds.ListenUnix("unix", n.o.PluginSocket)
		if err != nil {
			return fmt.Errorf("--plugin-socket: %w", err)
		}
		part(func(ctx context.Context) error { return serve(ctx, l, n.enroller.Plugin(n.o.HostRoot), "agent_plugin") })
	}
	for range workers {
		part(func(ctx context.Context) error {
			for {
				ref, over := c.queue.Get()
				if over {
					return nil
				}
				n.look(ctx, ref)
				c.queue.Done(ref)
			}
		})
	}
	if n.plugin != nil {
		part(func(ctx context.Context) error {
			n.plugin.Run(ctx)
			return nil
		})
		part(n.know)
	}
	n.serving.Store(true)
	return nil
}

// knowEvery bounds how often what is known is written down.
const knowEvery = time.Second

// know keeps what the CNI plugin goes by while no agent answers.
func (n *node) know(ctx context.Context) error {
	for {
		pods, namespaces := n.cluster.all()
		k := agent.Sum(pods, namespaces, n.rules())
		if err := n.plugin.Know(cni.Enrolled{Namespaces: k.Namespaces, Except: k.Except}); err != nil {
			n.log.Error("what is known of the mesh cannot be written down for the CNI plugin", "error", err)
			n.cluster.change()
		}
		select {
		case <-time.After(knowEvery):
		case <-ctx.Done():
			return nil
		}
		select {
		case <-n.cluster.changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// ready is nil when the node's new pods can be captured; else it says what is missing.
func (n *node) ready() error {
	switch {
	case !n.serving.Load():
		return errors.New("the API server has not said yet which pods there are")
	case n.plugin != nil && !n.plugin.Installed():
		return fmt.Errorf("the CNI plugin is not in place (%s)", n.o.CNIConfDir)
	}
	return nil
}

func (n *node) rules() agent.Rules {
	return agent.Rules{MeshNamespace: n.o.MeshNamespace, ExcludeNamespaces: n.o.ExcludeNamespaces}
}

// look has a pod looked at, and again later if that fails.
func (n *node) look(ctx context.Context, ref agent.Ref) {
	err := n.enroller.Reconcile(ctx, ref)
	if err == nil {
		n.cluster.queue.Forget(ref)
		return
	}
	if ctx.Err() != nil {
		return
	}
	n.failed.Add(1)
	n.log.Warn("a pod is not as it should be, will be tried again", "error", err)
	n.cluster.Later(ref)
}

// serve serves HTTP until ctx ends.
func serve(ctx context.Context, l net.Listener, h http.Handler, resource string) error {
	bounds := guard.NewConns(guard.ConnsOptions{Resource: resource, KeepBusy: true})
	s := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
		WriteTimeout: 15 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10, ConnState: bounds.Change,
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)}
	stopped := make(chan struct{})
	defer func() { <-stopped }()
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		end, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if s.Shutdown(end) != nil {
			s.Close()
		}
	})
	err := s.Serve(l)
	if stop() {
		close(stopped)
		return err
	}
	return nil
}
