package proxy

import (
	"context"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"ztun/proxy/rbac"
	"ztun/proxy/state"
)

// DatagramQuestion is a UDP flow that is to pass in the clear, as all do: HBONE carries none.
type DatagramQuestion struct {
	Network  string // of this node
	ClientNS string // namespace of who asks, which decides what services it sees
	Src, Dst netip.AddrPort
}

// DatagramVerdict is what policy says about it.
type DatagramVerdict struct {
	// Known: the destination is the mesh's, by Workload or as a service.
	Known    bool
	Workload *state.Workload // whose policies decided; nil: nobody's
	rbac.Verdict
}

// JudgeDatagram asks the policies of a flow's destination what they ask of a plaintext connection: whether one that
// proves no identity may come to this port. A destination with strict mutual TLS refuses it, one that is open to all,
// or on that port, or that is not the mesh's, does not. Of a service's endpoints all must agree: which of them it
// will be, the network decides. A workload that is called has to be judged by its caller as well as by its own node,
// which may be another's (ztunnel captures no UDP).
func JudgeDatagram(v *state.View, q DatagramQuestion) DatagramVerdict {
	w, svc := v.FindAddress(q.Network, q.Dst.Addr(), q.ClientNS)
	switch {
	case w != nil:
		return judgeDatagram(v, w, q.Src.Addr(), q.Dst)
	case svc == nil:
		return DatagramVerdict{Verdict: rbac.Verdict{Allowed: true}}
	}
	all := DatagramVerdict{Known: true, Verdict: rbac.Verdict{Allowed: true}}
	for i := range svc.Endpoints {
		e := &svc.Endpoints[i]
		w := v.EndpointWorkload(e)
		if w == nil || len(w.Addresses) == 0 {
			continue
		}
		port, mapped := e.Ports.Lookup(q.Dst.Port())
		if !mapped {
			if port, _ = svc.Ports.Lookup(q.Dst.Port()); port == 0 {
				port = q.Dst.Port()
			}
		}
		if d := judgeDatagram(v, w, q.Src.Addr(), netip.AddrPortFrom(w.Addresses[0], port)); !d.Allowed {
			return d
		} else if len(d.Missing) > 0 {
			all.Missing, all.Workload = append(all.Missing, d.Missing...), d.Workload
		}
	}
	return all
}

func judgeDatagram(v *state.View, w *state.Workload, src netip.Addr, dst netip.AddrPort) DatagramVerdict {
	return DatagramVerdict{Known: true, Workload: w,
		Verdict: rbac.Evaluate(v.PoliciesFor(w), rbac.Question{Src: src, Dst: dst})}
}

// AllowDatagram judges a UDP flow of the pod's by what is known now, without waiting: inbound is one that src begins
// with the pod, else the pod begins it. What connections would wait for (the pod's own record, a policy that is
// listed and not loaded, an on-demand look-up) is no until it is there; a sender of datagrams tries again. A refusal
// is logged, within the budget of its source.
func (p *Proxy) AllowDatagram(inbound bool, src, dst netip.AddrPort) bool {
	view := p.o.Knowledge.View()
	local := view.WorkloadByInfo(p.o.Info)
	if local == nil {
		p.refuseDatagram(inbound, src, dst, slog.String("reason", "the pod's own record is not known yet"))
		return false
	}
	var d DatagramVerdict
	if inbound {
		d = judgeDatagram(view, local, src.Addr(), dst)
	} else {
		d = JudgeDatagram(view, DatagramQuestion{Network: p.o.Config.NetworkName, ClientNS: local.Namespace, Src: src,
			Dst: dst})
	}
	if !d.Known && !p.knownAbsent(state.NetworkAddress{Network: p.o.Config.NetworkName, Addr: dst.Addr()}.String()) {
		return false // asked for
	}
	v := d.Verdict
	if len(v.Missing) > 0 {
		if p.o.Policies.patience(v.Missing, d.Workload.UID) > 0 {
			return false
		}
		v = p.o.Policies.decide(v)
	}
	if !v.Allowed {
		p.refuseDatagram(inbound, src, dst, slog.String("reason", v.Err().Error()))
	}
	return v.Allowed
}

func (p *Proxy) refuseDatagram(inbound bool, src, dst netip.AddrPort, why slog.Attr) {
	p.bounds.warnings.Log(context.Background(), slog.LevelWarn, sourceOf(src), "UDP dropped: it would go in the clear",
		slog.String("direction", direction(!inbound)), slog.Any("src", src), slog.Any("dst", dst), why)
}

const (
	maxDatagramAsks = 256              // names that are remembered
	datagramAskSpan = 10 * time.Second // for so long, as admin/xds remembers what is not there
)

// datagramAsks are the on-demand look-ups for destinations of datagrams. The zero value is ready.
type datagramAsks struct {
	mu sync.Mutex
	by map[string]time.Time // until when the key is known not to be in the mesh; zero: it is being asked for
}

// knownAbsent reports whether it is known that the mesh has no such key, and asks for it if it is not.
func (p *Proxy) knownAbsent(key string) bool {
	if p.o.Demand == nil {
		return true
	}
	now := time.Now()
	a := &p.asks
	a.mu.Lock()
	defer a.mu.Unlock()
	until, asked := a.by[key]
	switch {
	case asked && until.IsZero():
		return false
	case now.Before(until):
		return true
	}
	if len(a.by) >= maxDatagramAsks {
		for k, until := range a.by {
			if !until.IsZero() && !now.Before(until) {
				delete(a.by, k)
			}
		}
		if len(a.by) >= maxDatagramAsks {
			p.bounds.turned.Add(1)
			p.bounds.report.Turned("look-ups for datagrams", p.bounds.pod, key, false)
			return false
		}
	}
	if !p.begin() {
		return false
	}
	if a.by == nil {
		a.by = map[string]time.Time{}
	}
	a.by[key] = time.Time{}
	go p.o.Panics.Func("a look-up for a datagram", func() {
		defer p.work.Done()
		ctx, cancel := context.WithTimeout(p.ctx, demandWait)
		defer cancel()
		err := p.o.Demand(ctx, key)
		a.mu.Lock()
		defer a.mu.Unlock()
		if err != nil {
			delete(a.by, key)
		} else {
			a.by[key] = time.Now().Add(datagramAskSpan)
		}
	}, nil)()
	return false
}
