package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ztun/admin"
	"ztun/admin/zds"
	"ztun/cmd/attach"
)

// nodeAgent is where pods come from if not from `ztun pod`: an agent of the node (istio-cni) names them over ZDS, gives
// their namespaces, and says when they end. The node is ready when the agent has named all of them and each of them
// stands (spec controlplane 8.4).
type nodeAgent struct {
	client *zds.Client
	pods   agentPods
	task   *admin.Task // of readiness

	mu       sync.Mutex
	complete bool // the snapshot is
	left     bool // this daemon is about to end
	stop     context.CancelFunc
}

// newNodeAgent makes a client of the agent at socket; known is called each time that it has named all pods.
func newNodeAgent(m *podManager, task *admin.Task, socket string, log *slog.Logger, known func()) *nodeAgent {
	a := &nodeAgent{task: task}
	a.pods = agentPods{m, a.settle, a.leave}
	a.client = zds.New(zds.Options{Path: socket, Pods: a.pods, Failed: task.Fail, Random: rand.Int64N, Logger: log,
		Snapshot: func() {
			m.traces.Store(true) // of pods that have ended while no daemon ran: nobody has known before which those are
			known()
			a.named(true)
		},
		Lost: func() {
			task.Again()
			a.named(false)
		}})
	return a
}

// run keeps the connection to the agent, from the time on that the mesh is known: the agent takes an answer for a pod
// that can work.
func (a *nodeAgent) run(ctx context.Context, ready *admin.Ready) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	a.mu.Lock()
	a.stop = cancel
	if a.left {
		cancel()
	}
	a.mu.Unlock()
	for {
		pending, changed := ready.State()
		if !slices.ContainsFunc(pending, func(p admin.PendingTask) bool { return p.Name == stateManager }) {
			return a.client.Run(ctx)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// leave hangs up: new pods are for the next daemon, which the agent may have beside this one already. Where nobody but
// this daemon can let go of a pod (attach.Kind's Outlives), that is after its connections have finished, or with the
// first new pod.
func (a *nodeAgent) leave() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.left = true
	if a.stop != nil {
		a.stop()
	}
}

func (a *nodeAgent) named(complete bool) {
	a.mu.Lock()
	a.complete = complete
	a.mu.Unlock()
	a.settle()
}

// settle looks whether this node is ready as far as its pods go. As in ztunnel a pod that fails later makes it unready
// only with the next thing that goes well.
func (a *nodeAgent) settle() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.complete {
		return
	}
	if err := a.pods.waiting(); err != nil {
		a.task.Again()
		a.task.Fail(err)
		return
	}
	a.task.Done()
}

// agentPods are the pods of the pod manager that an agent has named. They are known from others by having come as a
// descriptor, without a path.
type agentPods struct {
	m      *podManager
	settle func()
	leave  func()
}

var _ zds.Pods = agentPods{}

// Attach implements zds.Pods.
func (p agentPods) Attach(ctx context.Context, w zds.Workload, netns *os.File) error {
	m := p.m
	m.op.Lock()
	defer m.op.Unlock()
	spec := attach.Pod{File: netns, PodSpec: admin.PodSpec{UID: w.UID, Name: w.Name, Namespace: w.Namespace,
		ServiceAccount: w.ServiceAccount}}
	err := m.kind.Locate(&spec)
	if err == nil {
		m.mu.Lock()
		old, closed := m.pods[w.UID], m.closed
		m.mu.Unlock()
		switch {
		case old != nil && old.att.Place().Same(spec.Place):
			p.settle()
			return nil // also where it has another name now: ztunnel leaves it at that
		case closed:
			p.leave() // without an answer: the agent waits for the next daemon's
			return errors.New("this daemon is about to end")
		case old != nil && old.spec.NetNS != "":
			return fmt.Errorf("%w: pod %s was added by hand under the uid %s", admin.ErrPodConflict, old.label, w.UID)
		case old != nil:
			if err := m.detach(ended(), w.UID, old); err != nil {
				m.log.Error("a pod that has another network namespace now", "error", err)
			}
		}
		err = m.attach(ctx, spec)
	}
	if err != nil {
		m.forget(w.UID)
		if kept, dupErr := duplicate(netns); dupErr == nil {
			m.mu.Lock()
			m.pending[w.UID] = pendingPod{savedPod: savedPod{PodSpec: spec.PodSpec}, file: kept, err: err}
			m.mu.Unlock()
		} else {
			m.log.Error("a pod that cannot be attached cannot be kept either", "pod", refOf(spec.PodSpec).String(), "error", dupErr)
		}
		return err
	}
	p.settle()
	return nil
}

// duplicate is f for a longer life.
func duplicate(f *os.File) (*os.File, error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd := -1
	var inner error
	if err := rc.Control(func(old uintptr) {
		fd, inner = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0)
	}); err != nil {
		return nil, err
	}
	if inner != nil {
		return nil, os.NewSyscallError("fcntl", inner)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// Detach implements zds.Pods.
func (p agentPods) Detach(uid string) error {
	m := p.m
	m.op.Lock()
	defer m.op.Unlock()
	m.mu.Lock()
	pod, waits := m.pods[uid], m.pending[uid].file != nil
	m.mu.Unlock()
	if waits {
		m.forget(uid)
		m.traces.Store(true) // of an earlier life
	}
	var err error
	if pod != nil && pod.spec.NetNS == "" {
		err = m.detach(ended(), uid, pod)
		m.letGo.Store(time.Now().UnixNano())
	}
	p.settle()
	return err
}

// Known implements zds.Pods.
func (p agentPods) Known() (all []string) {
	p.m.mu.Lock()
	defer p.m.mu.Unlock()
	for uid, pod := range p.m.pods {
		if pod.spec.NetNS == "" {
			all = append(all, uid)
		}
	}
	for uid, pod := range p.m.pending {
		if pod.file != nil {
			all = append(all, uid)
		}
	}
	return all
}

// waiting says why a pod does not stand; nil: all do.
func (p agentPods) waiting() error {
	p.m.mu.Lock()
	defer p.m.mu.Unlock()
	for _, pod := range p.m.pending {
		if pod.file != nil {
			return fmt.Errorf("pod %s: %w", refOf(pod.PodSpec), pod.err)
		}
	}
	return nil
}
