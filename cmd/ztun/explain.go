package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"ztun/admin"
	"ztun/proxy"
	"ztun/proxy/identity"
	"ztun/proxy/state"
)

// explainPath of the control socket; its query is pod and to, and for inbound connections from.
const explainPath = "/v1/explain"

// explainTime bounds an explanation: look-ups, and with a probe as long as a connection may take.
const explainTime = 45 * time.Second

// handlers are what the control socket answers beside pods and connections.
func (d *daemon) handlers() map[string]admin.PodHandler {
	return map[string]admin.PodHandler{explainPath: d.explainHandler, capturePath: d.captureHandler}
}

func (d *daemon) explainHandler(_ http.ResponseWriter, r *http.Request) (any, error) {
	ctx, cancel := context.WithTimeout(r.Context(), explainTime)
	defer cancel()
	return d.explain(ctx, r.URL.Query())
}

// explain answers a question to the control socket.
func (d *daemon) explain(ctx context.Context, v url.Values) (*proxy.Explanation, error) {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("%w: %w", admin.ErrPodInvalid, fmt.Errorf(format, a...))
	}
	p, err := d.pods.attached(v.Get("pod"))
	if err != nil {
		return nil, err
	}
	q := proxy.ExplainQuestion{Probe: v.Get("probe") != "", Certificate: d.certificateText}
	host, port, err := splitTarget(v.Get("to"))
	if err != nil {
		return nil, bad("%w", err)
	}
	if v.Get("inbound") == "" {
		to, err := d.target(ctx, p, host, v.Get("workload") != "")
		if err != nil {
			return nil, bad("%w", err)
		}
		q.Dst = netip.AddrPortFrom(to, port)
		if q.Src = sameFamily(p.spec.IPs, to); !q.Src.IsValid() {
			q.Src = p.spec.IPs[0]
		}
		return p.proxy.ExplainOutbound(ctx, q), nil
	}
	if err := d.caller(&q, v); err != nil {
		return nil, bad("%w", err)
	}
	at := sameFamily(p.spec.IPs, q.Src)
	if !at.IsValid() {
		return nil, bad("pod %s has no address of %s's family", p.label, q.Src)
	}
	q.Dst = netip.AddrPortFrom(at, port)
	return p.proxy.ExplainInbound(ctx, q), nil
}

// attached is the pod called namespace/name.
func (m *podManager) attached(name string) (*pod, error) {
	namespace, rest, _ := strings.Cut(name, "/")
	uid, err := m.find(admin.PodRef{Namespace: namespace, Name: rest})
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if p := m.pods[uid]; p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("%w: no pod %s is attached", admin.ErrPodNotFound, name)
}

// splitTarget reads HOST:PORT; the host may be missing.
func splitTarget(s string) (host string, port uint16, err error) {
	host, text, err := net.SplitHostPort(s)
	if err != nil {
		return "", 0, fmt.Errorf("%q is not HOST:PORT: %w", s, err)
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil || n == 0 {
		return "", 0, fmt.Errorf("%q is not a port from 1 to 65535", text)
	}
	return host, uint16(n), nil
}

// target is the address that a host stands for: an address, a workload, or a name as the pod resolves it.
func (d *daemon) target(ctx context.Context, p *pod, host string, workload bool) (netip.Addr, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		return a.Unmap(), nil
	}
	if workload || strings.Contains(host, "/") {
		w, err := d.workload(host, p.spec.Namespace)
		if err != nil {
			return netip.Addr{}, err
		}
		if len(w.Addresses) == 0 {
			return netip.Addr{}, fmt.Errorf("workload %s has no address", w.UID)
		}
		if a := sameFamily(w.Addresses, p.spec.IPs[0]); a.IsValid() {
			return a, nil
		}
		return w.Addresses[0], nil
	}
	if p.dns == nil {
		return netip.Addr{}, fmt.Errorf("%q is a name, and DNS capture is off: give an address", host)
	}
	addrs, err := p.dns.Lookup(ctx, host)
	if err != nil {
		return netip.Addr{}, err
	}
	return addrs[0], nil
}

// workload is one by name, in a namespace unless it has one in front.
func (d *daemon) workload(name, namespace string) (*state.Workload, error) {
	if ns, rest, ok := strings.Cut(name, "/"); ok {
		namespace, name = ns, rest
	}
	for _, w := range d.loop.View().WorkloadsPausing(func() { time.Sleep(100 * time.Microsecond) }) {
		if w.Namespace == namespace && w.Name == name {
			return w, nil
		}
	}
	return nil, fmt.Errorf("no workload %s/%s is known here", namespace, name)
}

// caller reads who an inbound connection comes from: a workload or an address, and what identity it proves.
func (d *daemon) caller(q *proxy.ExplainQuestion, v url.Values) (err error) {
	from := v.Get("from")
	if from == "" {
		return errors.New("from whom? Give an address or a workload with --from")
	}
	view := d.loop.View()
	var w *state.Workload
	if q.Src, err = netip.ParseAddr(from); err == nil {
		q.Src = q.Src.Unmap()
		w = view.WorkloadByAddr(d.c.Node.Network, q.Src)
	} else {
		if w, err = d.workload(from, "default"); err != nil {
			return err
		}
		if len(w.Addresses) == 0 {
			return fmt.Errorf("workload %s has no address", w.UID)
		}
		q.Src = w.Addresses[0]
	}
	switch id := v.Get("identity"); {
	case v.Get("plaintext") != "":
	case id != "":
		if q.ID, err = identity.Parse(id); err != nil {
			return err
		}
		q.HasID = true
	case w != nil && w.Protocol == state.HBONE:
		q.ID, q.HasID = w.Identity(), true
	}
	return nil
}

func sameFamily(all []netip.Addr, as netip.Addr) netip.Addr {
	for _, a := range all {
		if a.Is4() == as.Is4() {
			return a
		}
	}
	return netip.Addr{}
}

// certificateText says what there is of an identity's certificate.
func (d *daemon) certificateText(id identity.ID) (string, bool) {
	for _, c := range d.certs.Dump() {
		if c.Identity != id {
			continue
		}
		if len(c.Chain) > 0 {
			return "valid until " + c.Chain[0].NotAfter.UTC().Format(time.RFC3339), true
		}
		return c.State, c.State == "Initializing"
	}
	return "none yet: one is asked for", true
}
