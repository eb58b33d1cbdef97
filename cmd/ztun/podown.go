package main

import (
	"context"
	"fmt"
	"net/netip"

	"ztun/admin"
	"ztun/cmd/attach"
	"ztun/proxy/state"
)

// alone refuses changes of the pods of a process that is one workload.
func (m *podManager) alone() error {
	if m.c.Mode.Workload == (state.WorkloadInfo{}) {
		return nil
	}
	return fmt.Errorf("%w: this is the proxy of %s alone (PROXY_MODE=dedicated, or `ztun run`)", admin.ErrPodConflict,
		m.c.Mode.Workload)
}

// addOwn attaches the workload of dedicated mode. Its address is INSTANCE_IP, or what the namespace has.
func (m *podManager) addOwn(ctx context.Context) error {
	w := m.c.Mode.Workload
	spec := admin.PodSpec{Namespace: w.Namespace, Name: w.Name, ServiceAccount: w.ServiceAccount}
	if a, err := netip.ParseAddr(m.c.Self.InstanceIP); err == nil {
		spec.IPs = []netip.Addr{a.Unmap()}
	}
	m.op.Lock()
	defer m.op.Unlock()
	return m.attach(ctx, attach.Pod{PodSpec: spec})
}
