package steered

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"

	"ztun/admin"
	"ztun/cmd/attach"
	"ztun/netstack"
	"ztun/proxy/ports"
	"ztun/tun"
	"ztun/tun/netns"
	"ztun/tun/sandwich"
)

// pod is one attached pod.
type pod struct {
	attach.KernelTCP
	attach.Loopback
	node     *Node
	spec     attach.Pod
	h        attach.Handler
	ns, s    *netns.NS // the pod's, and S
	uplink   *netstack.Uplink
	mesh     *attach.Listener // in S
	live     tun.Device       // sandwich.Live
	unlisted func()           // has the node forget mesh
	fds      []*attach.Share  // what the pod itself takes of the daemon's descriptors
	log      *slog.Logger

	mu      sync.Mutex // of what watch changes
	record  sandwich.Record
	failure error

	checking sync.Mutex // held while watch puts things back
	stopping bool

	stop    sync.Once
	whole   bool
	removed sync.Once
}

// Attach implements attach.Kind. Until Capture nothing changes in the pod's namespace.
func (n *Node) Attach(ctx context.Context, spec attach.Pod, h attach.Handler) (_ attach.Attachment, err error) {
	o := n.o // a copy: what is native is not netstack's
	if n.native {
		o.Stack.Datagrams = nil
	}
	p := &pod{node: n, spec: spec, h: h, log: o.Logger("pods")}
	var undo []func()
	defer func() {
		if err != nil {
			for _, f := range slices.Backward(undo) {
				f()
			}
		}
	}()
	for range 2 { // S, its TUNs and its listener beside what every pod has
		share := o.Descriptors.ForPod(spec.Label)
		if share == nil {
			return nil, fmt.Errorf("%w: %w", admin.ErrPodUnavailable, attach.ErrNoDescriptor)
		}
		p.fds = append(p.fds, share)
		undo = append(undo, share.Release)
	}
	if p.ns, err = attach.OpenApart(spec, n.ns); err != nil {
		return nil, err
	}
	undo = append(undo, func() { p.ns.Close() })
	p.Loopback = attach.Loopback{NS: p.ns, Options: &n.o}
	fresh, err := p.recall(ctx)
	if err != nil {
		return nil, err
	}
	p.record.DNS, p.record.Native = o.DNS, n.native
	name, facts := p.record.Name(), p.record.Facts
	if p.s, err = netns.Create(name); err != nil {
		return nil, err
	}
	undo = append(undo, func() {
		p.s.Close()
		if fresh {
			if err := p.record.Restore(context.WithoutCancel(ctx), n.records); err != nil {
				p.log.Error("a pod is not given back", "pod", spec.Label, "error", err)
			}
		}
	})
	if p.mesh, err = o.ListenMesh(ctx, p.s, ports.HBONE, o.Socket); err != nil {
		return nil, fmt.Errorf("port %d (HBONE) in %s: %w", ports.HBONE, name, err)
	}
	p.unlisted = n.listens(p.mesh.TCPListener)
	undo = append(undo, func() { p.unlisted(); p.mesh.Close() })
	var devs [3]tun.Device
	// Live comes after the listener: of a killed process the kernel closes the higher descriptors first (its task work is
	// a stack).
	for i, dev := range []string{sandwich.App, sandwich.Net, sandwich.Live} {
		d, err := tun.Open(tun.Options{Name: dev, NetNS: p.s, MTU: facts.MTU, Persistent: dev != sandwich.Live,
			Plain: o.Plain})
		if err != nil {
			return nil, err
		}
		undo = append(undo, func() { d.Close() })
		devs[i] = d
	}
	p.live = devs[2]
	p.uplink = netstack.NewUplink(devs[1], o.Panics, p.log)
	undo = append(undo, func() { p.uplink.Close() })
	p.KernelTCP = attach.KernelTCP{Descriptors: o.Descriptors, Label: spec.Label, Socket: o.Socket, Pod: p.ns, Mesh: p.s}
	if p.Stack, err = attach.NewStack(&o, spec, facts.MTU, devs[0], p.uplink, prober{h, n, p}); err != nil {
		return nil, err
	}
	return p, nil
}

// recall finds what an earlier life has left of the pod, or reads what there is. fresh: nothing is captured.
func (p *pod) recall(ctx context.Context) (fresh bool, err error) {
	dev, ino := p.ns.ID()
	was, err := sandwich.Find(p.node.records, dev, ino)
	if err != nil {
		p.log.Warn("records of pods cannot be read", "directory", p.node.records, "error", err)
	}
	if was != nil {
		if was.Captured() {
			p.record = *was
			return false, p.agree()
		}
		// Killed half way, or the pod's end is gone.
		if err := was.Restore(ctx, p.node.records); err != nil {
			return false, err
		}
	}
	facts, err := sandwich.Read(p.ns, podDevice)
	if errors.Is(err, sandwich.ErrUnfit) {
		return false, fmt.Errorf("%w: %w", admin.ErrPodInvalid, err)
	}
	if err != nil {
		return false, fmt.Errorf("%w: %w", admin.ErrPodUnavailable, err)
	}
	p.record = sandwich.Record{Dev: dev, Ino: ino, Path: p.spec.NetNS, Facts: facts, Rules: p.node.rules}
	if _, err := p.record.Plan(); err != nil {
		return false, fmt.Errorf("%w: %w", admin.ErrPodInvalid, err)
	}
	found, err := attach.Unfinished(p.ns, p.spec.IPs)
	if err != nil {
		return false, fmt.Errorf("%w: the pod's connections cannot be listed: %w", admin.ErrPodUnavailable, err)
	}
	var left int
	if p.record.Keep, left = sandwich.Keep(facts, conns(found)); len(found) > 0 {
		p.log.Info("connections that the pod has already go on beside the mesh", "pod", p.spec.Label,
			"count", len(p.record.Keep), "beyond_the_bound", left)
	}
	return true, p.agree()
}

// agree says why the pod's device is not that of the pod that was asked for.
func (p *pod) agree() error {
	own := p.record.Facts.Own()
	for _, a := range p.spec.IPs {
		if !slices.Contains(own, a) {
			return fmt.Errorf("%w: %s is no address of the pod's %s, which has %v", admin.ErrPodInvalid, a, podDevice, own)
		}
	}
	if len(own) != len(p.spec.IPs) {
		return fmt.Errorf("%w: the pod's %s has %v, not only %v: traffic of the others would go past the mesh",
			admin.ErrPodInvalid, podDevice, own, p.spec.IPs)
	}
	return nil
}

func conns(found []attach.Conn) (out []sandwich.Conn) {
	for _, o := range found {
		out = append(out, sandwich.Conn(o))
	}
	return out
}

// plan is what shall be true of the pod now.
func (p *pod) plan() (sandwich.Plan, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.record.Plan()
}

func (p *pod) namespaces() sandwich.Namespaces { return sandwich.Namespaces{S: p.s, Pod: p.ns} }

// Capture implements attach.Attachment.
func (p *pod) Capture(ctx context.Context) error {
	left, err := attach.Orphans(p.ns, p.spec.IPs)
	if err != nil {
		p.log.Warn("the pod's connections of an earlier run cannot be listed", "pod", p.spec.Label, "error", err)
	}
	left = slices.DeleteFunc(left, func(o attach.Orphan) bool {
		return slices.ContainsFunc(p.record.Keep, func(c sandwich.Conn) bool {
			return c.Local == o.Local && c.Remote == o.Remote
		})
	})
	if err := p.record.Save(p.node.records); err != nil {
		return err
	}
	p.Run()
	p.Go("a pod's uplink", func(ctx context.Context) {
		if err := p.uplink.Run(ctx); err != nil && ctx.Err() == nil {
			p.fail(fmt.Errorf("device %s in %s: %w", sandwich.Net, p.record.Name(), err))
		}
	})
	p.Go("a pod's mesh port", func(context.Context) { attach.Accept(p.mesh, p.log, p.serveMesh) })
	plan, err := p.plan()
	if err != nil {
		return err
	}
	if _, err := sandwich.Apply(ctx, plan, p.namespaces()); err != nil {
		return fmt.Errorf("capturing the pod: %w", err)
	}
	p.Go("a pod's watch", p.watch)
	if len(left) > 0 {
		p.Go("a pod's connections of an earlier run", func(ctx context.Context) { p.EndOrphans(ctx, p.ns, left) })
	}
	return nil
}

func (p *pod) fail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.failure == nil {
		p.failure = err
		p.log.Error("the pod is cut off", "pod", p.spec.Label, "error", err)
	}
}

// Status implements attach.Attachment.
func (p *pod) Status() attach.Status {
	st := p.Stack.Status()
	st.Device = p.record.Name() + "/" + st.Device
	p.mu.Lock()
	defer p.mu.Unlock()
	if st.Err == nil {
		st.Err = p.failure
	}
	return st
}

// Place implements attach.Attachment.
func (p *pod) Place() attach.Place { return attach.PlaceOf(p.spec, p.ns) }

// serveMesh serves a connection to 15008.
func (p *pod) serveMesh(conn *net.TCPConn) {
	if serve := p.node.o.Admit(attach.Door{Label: p.spec.Label, Serve: p.h.ServeMesh}, conn); serve != nil {
		go p.node.o.Panics.Func("a connection to port 15008", serve, nil)()
	}
}

// Stop implements attach.Attachment. S stays, with devices that nobody reads.
func (p *pod) Stop() bool {
	p.stop.Do(func() {
		p.checking.Lock()
		p.stopping = true
		p.checking.Unlock()
		p.unlisted()
		p.live.Close() // before the listener, without which peers would be refused
		p.mesh.Close()
		p.whole = p.Stack.Stop()
		p.uplink.Close()
	})
	return p.whole
}

// Remove implements attach.Attachment.
func (p *pod) Remove() (err error) {
	p.removed.Do(func() {
		p.Stop()
		err = errors.Join(p.s.Close(), p.record.Restore(context.Background(), p.node.records), p.ns.Close())
		for _, s := range p.fds {
			s.Release()
		}
		p.node.o.Descriptors.Forget(p.spec.Label)
	})
	return err
}
