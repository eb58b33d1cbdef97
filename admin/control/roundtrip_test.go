package control

import (
	"bytes"
	stdcmp "cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"ztun/admin/ca"
	"ztun/admin/istiod"
	"ztun/admin/xds"
	"ztun/proxy/identity"
	"ztun/proxy/rbac"
	"ztun/proxy/state"
)

// normal is what a local file means when it comes by xDS: defaults applied, given endpoints turned around.
func normal(l *xds.Local) *xds.Local {
	byUID := map[string]*state.Workload{}
	for _, w := range l.Workloads {
		w.TrustDomain, w.ServiceAccount, w.ClusterID, w.WorkloadType = stdcmp.Or(w.TrustDomain, "cluster.local"),
			stdcmp.Or(w.ServiceAccount, "default"), stdcmp.Or(w.ClusterID, "Kubernetes"), stdcmp.Or(w.WorkloadType, "deployment")
		w.Unlisted = false
		byUID[w.UID] = w
	}
	for _, s := range l.Services {
		for _, e := range s.Endpoints {
			w := byUID[e.UID]
			allowAll := s.LoadBalancer != nil && s.LoadBalancer.HealthPolicy == state.AllowAll
			if _, own := w.PortsFor(s.Key()); !own && (e.Status == w.Status || e.Status == state.Healthy || allowAll) {
				w.Services = append(w.Services, state.WorkloadService{Service: s.Key(), Ports: e.Ports})
			}
		}
		s.Endpoints = nil
	}
	for _, w := range l.Workloads {
		slices.SortFunc(w.Services, func(a, b state.WorkloadService) int {
			return strings.Compare(a.Service.String(), b.Service.String())
		})
	}
	return l
}

// dump is a View as config_dump shows it, with what it does not show.
func dump(t *testing.T, v *state.View) string {
	t.Helper()
	var b bytes.Buffer
	check(t, xds.WriteWorkloads(&b, v))
	check(t, xds.WriteServices(&b, v))
	check(t, xds.WritePolicies(&b, v))
	check(t, xds.WriteStaged(&b, v))
	return b.String()
}

// connector is the way of a node to the control plane of a test.
func (w *world) connector(node string, byCert bool) *istiod.Connector {
	w.t.Helper()
	o := istiod.Options{Address: "https://" + w.addr, Roots: istiod.Roots{File: filepath.Join(w.creds(node), RootFile)},
		ClusterID: "Kubernetes", MaxRecv: 200 << 20}
	if byCert {
		o.ClientCert, o.ClientKey = filepath.Join(w.creds(node), CertFile), filepath.Join(w.creds(node), KeyFile)
	} else {
		o.Token = istiod.Token{File: filepath.Join(w.creds(node), TokenFile)}
	}
	c, err := istiod.New(o)
	check(w.t, err)
	return c
}

// follow runs a daemon's client and shows its newest View.
func (w *world) follow(node string, byCert bool) *atomic.Pointer[state.View] {
	w.t.Helper()
	view := &atomic.Pointer[state.View]{}
	c := xds.NewClient(xds.ClientOptions{
		Connector: w.connector(node, byCert), NodeName: node,
		Node:    xds.NewNode(xds.NodeInfo{IP: "10.0.0.9", Pod: "zt", Namespace: "istio-system", NodeName: node}),
		Publish: func(v *state.View, _ bool) { view.Store(v) },
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = c.Run(ctx)
	}()
	w.t.Cleanup(func() { cancel(); <-done })
	return view
}

// sees waits until a View is as the file says.
func sees(t *testing.T, what string, view *atomic.Pointer[state.View], l *xds.Local) {
	t.Helper()
	want, got := dump(t, normal(l).View("node-a")), ""
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if got = dump(t, view.Load()); got == want {
			return
		}
	}
	t.Fatalf("%s: got - and want +\n%s", what, cmp.Diff(strings.Split(got, "\n"), strings.Split(want, "\n")))
}

// YAML -> control -> client -> View is the View of the YAML.
func TestRoundTrip(t *testing.T) {
	text := strings.ReplaceAll(fullYAML, "10.201.0.7/24", "10.201.0.0/24")
	w := start(t, map[string]string{"a.yaml": text}, nil)
	byToken, byCert := w.follow("node-a", false), w.follow("node-b", true)
	sees(t, "by token", byToken, parse(t, text))
	sees(t, "by certificate", byCert, parse(t, text))
	rnd := rand.New(rand.NewPCG(1, 2))
	for round := range 25 {
		l := randomLocal(rnd)
		// Written as JSON of the same schema, over two files.
		cut := &xds.Local{Workloads: l.Workloads[len(l.Workloads)/2:], Services: l.Services[len(l.Services)/2:],
			Policies: l.Policies}
		rest := &xds.Local{Workloads: l.Workloads[:len(l.Workloads)/2], Services: l.Services[:len(l.Services)/2]}
		var a, b bytes.Buffer
		check(t, xds.WriteStatic(&a, cut))
		check(t, xds.WriteStatic(&b, rest))
		w.write("b.json", "{}") // so that nothing is in both for a moment
		w.write("a.yaml", a.String())
		w.write("b.json", b.String())
		all := parse(t, a.String())
		more := parse(t, b.String())
		all.Workloads, all.Services = append(more.Workloads, all.Workloads...), append(more.Services, all.Services...)
		sees(t, fmt.Sprint("round ", round), byToken, all)
	}
	eventually(t, "everything is acknowledged", func() bool {
		for _, n := range w.srv.Status().Nodes {
			for _, y := range n.Types {
				if y.Lag > 0 || y.Waiting {
					return false
				}
				equal(t, "nacks: "+y.LastNACK, y.NACKs, 0)
			}
		}
		return true
	})
	// The node comes back to another process, after a change.
	check(t, w.stop())
	w.write("b.json", "{}")
	w.write("a.yaml", text)
	w.serve(defaultLimits(), w.addr)
	t.Cleanup(func() { check(t, w.stop()) })
	sees(t, "after a restart", byToken, parse(t, text))
}

// randomLocal makes a mesh that says all kinds of things. Names refer to each other often, and sometimes to nothing.
func randomLocal(r *rand.Rand) *xds.Local {
	l := &xds.Local{}
	pick := func(l ...string) string { return l[r.IntN(len(l))] }
	coin := func() bool { return r.IntN(2) == 0 }
	ports := func() state.PortMap {
		var p []state.PortPair
		for range r.IntN(4) {
			p = append(p, state.PortPair{Service: uint16(1 + r.IntN(100)), Target: uint16(r.IntN(65536))})
		}
		return state.SortPorts(p)
	}
	ip := func() netip.Addr {
		if coin() {
			return addr4(0x0a000000 + r.IntN(4))
		}
		return netip.AddrFrom16([16]byte{0xfd, 15: byte(r.IntN(4))})
	}
	key := func() state.ServiceKey {
		return state.ServiceKey{Namespace: pick("n1", "n2"), Hostname: fmt.Sprintf("s%d.host", r.IntN(6))}
	}
	gateway := func() *state.GatewayAddress {
		switch r.IntN(3) {
		case 0:
			return nil
		case 1:
			return &state.GatewayAddress{Host: key(), Port: uint16(r.IntN(65536))}
		}
		return &state.GatewayAddress{Addr: state.NetworkAddress{Network: pick("", "edge"), Addr: ip()}, Port: 15008}
	}
	for i := range r.IntN(8) {
		s := &state.Service{
			Name: fmt.Sprint("s", i), Namespace: pick("n1", "n2"), Hostname: fmt.Sprintf("s%d.host", i), Ports: ports(),
			Waypoint:  gateway(),
			Canonical: coin(), Visibility: state.Visibility(r.IntN(2)), IPFamilies: state.IPFamilies(r.IntN(4)),
		}
		for range r.IntN(3) {
			s.VIPs = append(s.VIPs, state.NetworkAddress{Network: pick("", "edge"), Addr: ip()})
		}
		if coin() {
			s.CIDRVIPs = []state.NetworkPrefix{{Network: "edge", Prefix: netip.PrefixFrom(ip(), 8+r.IntN(20)).Masked()}}
		}
		if coin() {
			s.LoadBalancer = &state.LoadBalancer{Mode: state.LBMode(r.IntN(4)), HealthPolicy: state.HealthPolicy(r.IntN(2))}
			for range r.IntN(4) {
				s.LoadBalancer.Preferences = append(s.LoadBalancer.Preferences, state.Scope(1+r.IntN(6)))
			}
		}
		if g := gateway(); g != nil {
			s.WeightedWaypoints = []state.WeightedWaypoint{{Destination: *g, Weight: uint32(r.IntN(5))}}
		}
		if coin() {
			s.SubjectAltNames = []string{"spiffe://td/ns/a/sa/b", "other"}
		}
		l.Services = append(l.Services, s)
	}
	for i := range r.IntN(12) {
		w := &state.Workload{
			UID: fmt.Sprint("c//Pod/n/", i), Name: fmt.Sprint("w", i), Namespace: pick("n1", "n2"),
			ServiceAccount: pick("", "default", "sa"), TrustDomain: pick("", "cluster.local", "td"),
			Network: pick("", "edge"), WorkloadName: pick("", "x"), WorkloadType: pick("", "deployment", "cronjob", "pod",
				"job"), CanonicalName: pick("", "c"), CanonicalRevision: pick("", "v1"),
			Hostname: pick("", "h.example"), Node: pick("", "node-a", "node-b"), ClusterID: pick("", "Kubernetes", "c1"),
			Waypoint: gateway(), NetworkGateway: gateway(),
			Capacity: uint32(r.IntN(3)), Tunnel: state.ApplicationTunnel{Protocol: state.TunnelProtocol(r.IntN(3))},
			Protocol:    state.Protocol(r.IntN(2)),
			NetworkMode: state.NetworkMode(r.IntN(2)), Status: state.Status(r.IntN(2)), NativeTunnel: coin(), Unlisted: true,
		}
		if w.Tunnel.Protocol != state.TunnelAbsent {
			w.Tunnel.Port = uint16(r.IntN(65536))
		}
		if coin() {
			w.Locality = state.Locality{Region: "r", Zone: pick("", "z"), Subzone: pick("", "s")}
		}
		for range r.IntN(3) {
			w.Addresses = append(w.Addresses, ip())
		}
		if coin() {
			w.MeshAddresses = []netip.AddrPort{netip.AddrPortFrom(ip(), uint16(1+r.IntN(65535)))}
		}
		for range r.IntN(3) {
			if k := key(); !slices.ContainsFunc(w.Services, func(s state.WorkloadService) bool { return s.Service == k }) {
				w.Services = append(w.Services, state.WorkloadService{Service: k, Ports: ports()})
			}
		}
		for range r.IntN(3) {
			w.AuthorizationPolicies = append(w.AuthorizationPolicies, fmt.Sprint("n1/p", r.IntN(4)))
		}
		l.Workloads = append(l.Workloads, w)
		if len(l.Services) > 0 && coin() { // an endpoint that its service was given
			s := l.Services[r.IntN(len(l.Services))]
			s.Endpoints = append(s.Endpoints, state.Endpoint{UID: w.UID, Ports: ports(), Status: state.Status(r.IntN(2))})
		}
	}
	strs := func() (out []rbac.StringMatch) {
		for range r.IntN(3) {
			m := rbac.StringMatch{Kind: rbac.StringKind(1 + r.IntN(4))}
			if m.Kind != rbac.Presence {
				m.Value = pick("a", "b")
			}
			out = append(out, m)
		}
		return out
	}
	prefixes := func() (out []netip.Prefix) {
		for range r.IntN(2) {
			out = append(out, netip.PrefixFrom(ip(), r.IntN(33)).Masked())
		}
		return out
	}
	for i := range r.IntN(6) {
		p := &rbac.Policy{Name: fmt.Sprint("p", i), Namespace: "n1", Scope: rbac.Scope(r.IntN(3)),
			Action: rbac.Action(r.IntN(2)), DryRun: coin()}
		for range r.IntN(3) {
			rule := rbac.Rule{}
			for range r.IntN(3) {
				clause := rbac.Clause{}
				for range r.IntN(3) {
					m := rbac.Match{
						Namespaces: strs(), NotNamespaces: strs(), Principals: strs(), NotPrincipals: strs(),
						SourceIPs: prefixes(), NotSourceIPs: prefixes(), DestinationIPs: prefixes(), NotDestinationIPs: prefixes(),
					}
					if coin() {
						m.DestinationPorts, m.NotServiceAccounts = []uint16{80, 0}, []rbac.ServiceAccount{{Namespace: "n", Name: "sa"}}
					}
					if coin() {
						m.NotDestinationPorts, m.ServiceAccounts = []uint16{65535}, []rbac.ServiceAccount{{Namespace: "n", Name: "sa"},
							{Namespace: "m", Name: "x"}}
					}
					clause = append(clause, m)
				}
				rule = append(rule, clause)
			}
			p.Rules = append(p.Rules, rule)
		}
		l.Policies = append(l.Policies, p)
	}
	return l
}

// The daemon's certificate client gets certificates for its workloads, by token and by certificate, and no others.
func TestRemoteCA(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": workloadsYAML("x:10.0.0.1:node-a", "y:10.0.0.2:node-b")}, nil)
	for _, byCert := range []bool{false, true} {
		remote := ca.NewRemote(ca.RemoteOptions{Connector: w.connector("node-a", byCert), Impersonate: true})
		defer remote.Close()
		id := identity.ID{TrustDomain: "cluster.local", Namespace: "ns", ServiceAccount: "sa-x"}
		key, der, err := ca.NewRequest(id)
		check(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		chain, roots, err := remote.Sign(ctx, id, der, time.Hour)
		check(t, err)
		_, err = identity.New(id, key, chain, roots)
		check(t, err)
		id.ServiceAccount = "sa-y"
		_, der, err = ca.NewRequest(id)
		check(t, err)
		if _, _, err = remote.Sign(ctx, id, der, time.Hour); err == nil ||
			!strings.Contains(err.Error(), "request impersonation authentication failure") {
			t.Fatal(err)
		}
	}
}
