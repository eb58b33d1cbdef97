package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"ztun/admin"
	"ztun/cmd/attach"
	"ztun/proxy/rescue"
	"ztun/proxy/state"
)

// podManager attaches pods, remembers them over restarts, and lets go of those that vanish.
type podManager struct {
	c      *Config
	kind   attach.Kind // how pods are attached
	host   podHost
	panics *rescue.Panics
	log    *slog.Logger

	// op serialises changes: attaching is a sequence of steps on shared tables (routes, addresses).
	op sync.Mutex

	mu      sync.Mutex
	pods    map[string]*pod       // by uid
	pending map[string]pendingPod // by uid: known from an earlier life or a node agent, not attached yet
	closed  bool

	letGo atomic.Int64 // when the node agent last had a pod let go, in ns since 1970

	at sync.Map // attached pods by address, netip.Addr to *pod: asked for every new connection (proxyAt)

	self atomic.Pointer[selfPod] // the daemon's own; nil: there is none, or it does not stand yet

	started, stopped atomic.Uint64
	traces           atomic.Bool // something of a pod that is gone could not be removed from the node: to be swept
}

// podHost is what the pods are made of and belong to: the daemon.
type podHost interface {
	// newPod attaches a pod and starts what serves it.
	newPod(ctx context.Context, spec attach.Pod) (*pod, error)
	// podsChanged is called after a pod was attached or detached.
	podsChanged()
	// known reports whether the control side has a record of a pod.
	known(state.WorkloadInfo) bool
}

type pendingPod struct {
	savedPod
	// file is the namespace where it came as a descriptor: from a node agent, which gives it to the next daemon, too, so
	// that such a pod is not saved.
	file *os.File
	err  error
}

const (
	vanishCheck  = 2 * time.Second
	pendingRetry = 5 * time.Second // as ztunnel retries a proxy that could not start (spec controlplane 8.4)
)

func newPodManager(c *Config, kind attach.Kind, host podHost, panics *rescue.Panics, log *slog.Logger) *podManager {
	return &podManager{c: c, kind: kind, host: host, panics: panics, log: log, pods: map[string]*pod{},
		pending: map[string]pendingPod{}}
}

func refOf(s admin.PodSpec) admin.PodRef { return admin.PodRef{Namespace: s.Namespace, Name: s.Name} }

// uidOf is what a pod is known by: its uid, or where nobody gave it one namespace/name.
func uidOf(s admin.PodSpec) string {
	if s.UID != "" {
		return s.UID
	}
	return refOf(s).String()
}

// Add implements admin.PodManager.
func (m *podManager) Add(ctx context.Context, spec admin.PodSpec) error {
	if err := m.alone(); err != nil {
		return err
	}
	m.op.Lock()
	defer m.op.Unlock()
	// A name is resolved now, so that a later change of directory or of meaning cannot redirect it.
	if err := m.attach(ctx, attach.Pod{PodSpec: spec}); err != nil {
		return err
	}
	return m.save()
}

func (m *podManager) attach(ctx context.Context, spec attach.Pod) error {
	uid := uidOf(spec.PodSpec)
	spec.UID, spec.Label = uid, refOf(spec.PodSpec).String()
	m.mu.Lock()
	old, closed := m.pods[uid], m.closed
	attached, labels := make([]*pod, 0, len(m.pods)), map[string]bool{}
	addrs := map[string][]netip.Addr{}
	for _, p := range m.pods {
		attached = append(attached, p)
		labels[p.label], addrs[p.label] = true, p.spec.IPs
	}
	m.mu.Unlock()
	if closed {
		return fmt.Errorf("%w: the daemon is shutting down", admin.ErrPodUnavailable)
	}
	if old != nil {
		return fmt.Errorf("%w: pod %s is attached already (namespace %s); `ztun pod del` it first", admin.ErrPodConflict,
			spec.Label, old.spec.NetNS)
	}
	if labels[spec.Label] {
		spec.Label += "@" + uid // two of one name for a while: in messages and metrics they are told apart
	}
	if !m.c.Net.IPv6 && slices.ContainsFunc(spec.IPs, netip.Addr.Is6) {
		return fmt.Errorf("%w: it has an IPv6 address, but the daemon runs with IPV6_ENABLED=false", admin.ErrPodInvalid)
	}
	if err := m.kind.Locate(&spec); err != nil {
		return err
	}
	if len(spec.IPs) == 0 {
		return fmt.Errorf("%w: ips is empty, and they are read from a pod's namespace only if ZTUN_STEERING is steered or "+
			"redirected: a pod needs one address, or one of each family", admin.ErrPodInvalid)
	}
	if !m.kind.Shares() {
		if err := attach.CheckAddrs(spec.Label, spec.IPs, addrs); err != nil {
			return err
		}
		if owner := owner(attached, spec.Place); owner != nil {
			return fmt.Errorf("%w: network namespace %s belongs to pod %s", admin.ErrPodConflict, spec.NetNS, owner.label)
		}
	}
	p, err := m.host.newPod(ctx, spec)
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.pods[uid] = p
	m.mu.Unlock()
	m.forget(uid)
	m.enlist(p)
	m.started.Add(1)
	m.host.podsChanged()
	m.log.Info("pod attached", "pod", p.label, "netns", p.spec.NetNS, "addresses", fmt.Sprint(p.spec.IPs), "offload",
		p.att.Status().Offload.VNetHdr)
	return nil
}

// forget takes a pod out of those that wait, and says which it was.
func (m *podManager) forget(uid string) (was pendingPod, found bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if was, found = m.pending[uid]; found {
		delete(m.pending, uid)
		was.file.Close() // nothing to do where there is none
	}
	return was, found
}

// owner is which of the pods lives in a namespace, nil if none does.
func owner(pods []*pod, place attach.Place) *pod {
	for _, p := range pods {
		if p.att.Place().Same(place) {
			return p
		}
	}
	return nil
}

// Delete implements admin.PodManager: connections may finish until the termination deadline. Others may
// add and delete pods meanwhile.
func (m *podManager) Delete(ctx context.Context, namespace, name string) error {
	if err := m.alone(); err != nil {
		return err
	}
	uid, err := m.find(admin.PodRef{Namespace: namespace, Name: name})
	if err != nil {
		return err
	}
	return m.remove(ctx, uid)
}

// DeleteUID implements admin.PodManager. uid is namespace/name for a pod that nobody gave one.
func (m *podManager) DeleteUID(ctx context.Context, uid string) error {
	if err := m.alone(); err != nil {
		return err
	}
	return m.remove(ctx, uid)
}

func (m *podManager) remove(ctx context.Context, uid string) error {
	m.mu.Lock()
	p := m.pods[uid]
	agents := p != nil && p.spec.NetNS == "" || m.pending[uid].file != nil
	m.mu.Unlock()
	if agents {
		return fmt.Errorf("%w: pod %s is the node agent's: it ends with the pod or its label", admin.ErrPodConflict, uid)
	}
	ctx, cancel := context.WithTimeout(ctx, m.c.Process.TerminationDeadline)
	defer cancel()
	if p != nil {
		p.stop(ctx)
	}
	m.op.Lock()
	defer m.op.Unlock()
	if waiting, ok := m.forget(uid); ok {
		return errors.Join(m.save(), m.clean(waiting.savedPod))
	}
	if err := m.detach(ctx, uid, p); err != nil {
		return err
	}
	return m.save()
}

// find is the uid of the pod of a name, attached or pending.
func (m *podManager) find(ref admin.PodRef) (uid string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var uids []string
	for u, p := range m.pods {
		if refOf(p.spec) == ref {
			uids = append(uids, u)
		}
	}
	for u, p := range m.pending {
		if refOf(p.PodSpec) == ref {
			uids = append(uids, u)
		}
	}
	switch len(uids) {
	case 0:
		return ref.String(), nil // whoever asks says what there is none of
	case 1:
		return uids[0], nil
	}
	slices.Sort(uids)
	return "", fmt.Errorf("%w: there are %d pods %s, of uids %s", admin.ErrPodConflict, len(uids), ref,
		strings.Join(uids, ", "))
}

// detach drains a pod until ctx ends and removes every trace of it. op is held.
func (m *podManager) detach(ctx context.Context, uid string, only *pod) error {
	m.mu.Lock()
	p := m.pods[uid]
	m.mu.Unlock()
	if p == nil || only != nil && p != only {
		return fmt.Errorf("%w: no pod %s is attached", admin.ErrPodNotFound, uid)
	}
	err := p.remove(ctx)
	m.delist(p)
	m.mu.Lock()
	delete(m.pods, uid)
	m.mu.Unlock()
	m.stopped.Add(1)
	m.host.podsChanged()
	if err != nil {
		m.traces.Store(true)
		return fmt.Errorf("pod %s is detached, but traces of it may be left: %w", p.label, err)
	}
	m.log.Info("pod detached", "pod", p.label)
	return nil
}

// List implements admin.PodManager.
func (m *podManager) List() []admin.PodStatus {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]admin.PodStatus, 0, len(m.pods)+len(m.pending))
	for _, p := range m.pods {
		s := p.status()
		if s.Error == "" && !m.host.known(p.info()) {
			s.Error = fmt.Sprintf("no workload record of name %s, namespace %s, service account %s yet: its connections wait "+
				"for it for up to 5s each and are refused then", s.Name, s.Namespace, s.ServiceAccount)
		}
		out = append(out, s)
	}
	for _, p := range m.pending {
		out = append(out, admin.PodStatus{PodSpec: p.PodSpec, State: "Pending", Error: p.err.Error()})
	}
	slices.SortFunc(out, func(a, b admin.PodStatus) int {
		return strings.Compare(refOf(a.PodSpec).String(), refOf(b.PodSpec).String())
	})
	return out
}

// all is a snapshot of the attached pods.
func (m *podManager) all() []*pod {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]*pod, 0, len(m.pods))
	for _, p := range m.pods {
		out = append(out, p)
	}
	return out
}

func (m *podManager) counts() (active, pending int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.pods), len(m.pending)
}

// adopt attaches the pods of an earlier life again. A pod whose namespace is gone is dropped; one that cannot be
// attached for another reason stays pending and is tried again. A list that cannot be read is an error: it may be
// read the next time, and the next change of it would overwrite it. One that is no list, or has a pod that is none,
// is kept aside.
func (m *podManager) adopt(ctx context.Context) error {
	b, err := os.ReadFile(m.stateFile())
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("the list of pods cannot be read: %w", err)
	}
	specs, bad := readSaved(b)
	if bad != nil {
		aside := m.stateFile() + ".bad"
		m.log.Error("the list of pods cannot be read as a whole; add the pods again that are missing", "file", m.stateFile(),
			"kept_as", aside,
			"error", errors.Join(bad, os.Rename(m.stateFile(), aside)))
	}
	m.op.Lock()
	defer m.op.Unlock()
	for _, spec := range specs {
		m.retry(ctx, pendingPod{savedPod: spec})
	}
	if err := m.save(); err != nil {
		m.log.Error("saving the list of pods", "error", err)
	}
	return nil
}

// addresses are those of all pods, attached or pending.
func (m *podManager) addresses() []netip.Addr {
	var all []netip.Addr
	for _, p := range m.List() {
		all = append(all, p.IPs...)
	}
	return all
}

// retry attaches a pod of an earlier life, or keeps it pending. False says that its namespace is gone and
// the pod was dropped. op is held.
func (m *podManager) retry(ctx context.Context, s pendingPod) bool {
	uid, ref := uidOf(s.PodSpec), refOf(s.PodSpec).String()
	if err := m.kind.Gone(s.place()); err != nil && s.file == nil { // what we hold cannot go
		m.forget(uid)
		m.log.Warn("pod of an earlier run is gone", "pod", ref, "error", err)
		return false
	}
	spec := s.PodSpec
	if s.file != nil {
		spec.IPs = nil // nobody has given them: they may be others by now
	}
	if err := m.attach(ctx, attach.Pod{PodSpec: spec, File: s.file}); err != nil {
		s.err = err
		m.mu.Lock()
		m.pending[uid] = s
		m.mu.Unlock()
		m.log.Error("pod cannot be attached, will be tried again", "pod", ref, "error", err)
	}
	return true
}

// clean removes what an earlier life left of a pod that this one never attached. op is held.
func (m *podManager) clean(s savedPod) error {
	var left error
	// Its own namespace, surely: not one where we have made nothing.
	if place := s.place(); s.Ino != 0 && m.kind.Gone(place) == nil && owner(m.all(), place) == nil {
		left = m.kind.Clean(place)
	}
	if err := errors.Join(left, m.kind.Sweep(m.addresses())); err != nil {
		return fmt.Errorf("pod %s is forgotten, but traces of it may be left: %w", refOf(s.PodSpec), err)
	}
	return nil
}

// watch lets go of pods whose namespace vanishes, and retries pending ones, until ctx ends.
func (m *podManager) watch(ctx context.Context) {
	check := time.NewTicker(vanishCheck)
	defer check.Stop()
	again := time.NewTicker(pendingRetry)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-check.C:
			m.dropVanished()
		case <-again.C:
			m.retryPending(ctx)
			m.sweepTraces()
		}
	}
}

// sweepTraces tries again to remove from the node what is left of pods that are gone.
func (m *podManager) sweepTraces() {
	if !m.traces.Swap(false) {
		return
	}
	m.op.Lock()
	defer m.op.Unlock()
	if err := m.kind.Sweep(m.addresses()); err != nil {
		m.traces.Store(true)
		m.log.Warn("traces of pods that are gone may be left", "error", err)
	}
}

func (m *podManager) dropVanished() {
	for _, p := range m.all() {
		why := m.kind.Gone(p.att.Place())
		if why == nil {
			continue
		}
		m.op.Lock()
		m.log.Warn("pod has vanished, detaching it", "pod", p.label, "error", why)
		ctx, cancel := context.WithCancel(context.Background())
		cancel() // nobody is left who could finish a connection
		if err := m.detach(ctx, p.uid, p); err != nil {
			m.log.Error("detaching a vanished pod", "error", err)
		}
		if err := m.save(); err != nil {
			m.log.Error("saving the list of pods", "error", err)
		}
		m.op.Unlock()
	}
}

func (m *podManager) retryPending(ctx context.Context) {
	m.mu.Lock()
	var specs []pendingPod
	for _, p := range m.pending {
		specs = append(specs, p)
	}
	closed := m.closed
	m.mu.Unlock()
	if len(specs) == 0 || closed {
		return
	}
	m.op.Lock()
	defer m.op.Unlock()
	dropped := false
	for _, s := range specs {
		m.mu.Lock()
		now, still := m.pending[uidOf(s.PodSpec)] // not deleted, and not added anew, while we waited for op
		m.mu.Unlock()
		still = still && now.file == s.file
		dropped = still && !m.retry(ctx, s) || dropped
	}
	if !dropped {
		return
	}
	if err := errors.Join(m.save(), m.kind.Sweep(m.addresses())); err != nil {
		m.log.Error("letting go of pods of an earlier run", "error", err)
	}
}
