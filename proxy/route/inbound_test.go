package route_test

import (
	"errors"
	"net/netip"
	"testing"

	meshports "ztun/proxy/ports"
	"ztun/proxy/route"
	"ztun/proxy/state"
)

// TestInboundOwnPorts: no CONNECT reaches one of the proxy's own ports, by address or by a service whose port ends
// there.
func TestInboundOwnPorts(t *testing.T) {
	b := state.NewBuilder("")
	key := state.ServiceKey{Namespace: "n", Hostname: "s"}
	ports := state.SortPorts([]state.PortPair{{Service: 80, Target: 8080}, {Service: 81, Target: meshports.HBONE},
		{Service: 82, Target: 15001}})
	b.InsertService(&state.Service{Name: "s", Namespace: "n", Hostname: "s", Ports: ports})
	local := &state.Workload{UID: "w", Name: "w", Namespace: "n", Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")},
		Services: []state.WorkloadService{{Service: key, Ports: ports}}}
	b.InsertWorkload(local)
	v := b.Build()
	for authority, refused := range map[string]bool{
		"10.0.0.1:8080": false, "10.0.0.1:15008": true, "10.0.0.1:15006": true, "s:80": false, "s:81": true, "s:82": true,
	} {
		d, err := route.Inbound(v, route.InboundQuestion{Local: local, LocalAddr: local.Addresses[0], Authority: authority,
			Illegal: route.IllegalPorts(false)})
		if refused != errors.Is(err, &route.Error{Code: route.SelfCall}) || !refused && (err != nil || d.App.Port() != 8080) {
			t.Errorf("%s: %v, %v", authority, d.App, err)
		}
	}
}

// TestInboundElsewhere: a tunnel that arrived at none of the workload's addresses is for whichever of them is named;
// one that arrived at one of them is for that one.
func TestInboundElsewhere(t *testing.T) {
	v4, v6 := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")
	w := &state.Workload{UID: "w", Addresses: []netip.Addr{v4, v6}}
	b := state.NewBuilder("")
	b.InsertWorkload(w)
	v := b.Build()
	for _, test := range []struct {
		anyOwn    bool
		authority string
		want      netip.Addr // not valid: refused
	}{
		{true, "10.0.0.1:80", v4}, {true, "[fd00::1]:80", v6}, {true, "10.0.0.2:80", netip.Addr{}},
		{false, "10.0.0.1:80", v4}, {false, "[fd00::1]:80", netip.Addr{}},
	} {
		d, err := route.Inbound(v, route.InboundQuestion{Local: w, LocalAddr: v4, AnyOwn: test.anyOwn,
			Authority: test.authority})
		if d.App.Addr() != test.want || (err == nil) != test.want.IsValid() {
			t.Errorf("%+v: %v, %v", test, d.App, err)
		}
	}
}

// TestInboundForAnother: a workload is served by its own waypoint, and by no other workload that the mesh knows.
func TestInboundForAnother(t *testing.T) {
	b := state.NewBuilder("")
	add := func(uid, addr string, change func(*state.Workload)) *state.Workload {
		w := &state.Workload{UID: uid, Name: uid, Namespace: "n", Addresses: []netip.Addr{netip.MustParseAddr(addr)}}
		if change != nil {
			change(w)
		}
		b.InsertWorkload(w)
		return w
	}
	waypoint, other := add("waypoint", "10.0.0.1", nil), add("other", "10.0.0.2", nil)
	add("target", "10.0.0.3", func(w *state.Workload) {
		w.Waypoint = &state.GatewayAddress{Addr: state.NetworkAddress{Addr: netip.MustParseAddr("10.0.0.1")},
			Port: meshports.HBONE}
	})
	v := b.Build()
	for w, want := range map[*state.Workload]bool{waypoint: true, other: false} {
		_, err := route.Inbound(v, route.InboundQuestion{Local: w, LocalAddr: w.Addresses[0], Authority: "10.0.0.3:80"})
		if (err == nil) != want || err != nil && !errors.Is(err, &route.Error{Code: route.IPMismatch}) {
			t.Errorf("%s asked for a workload of waypoint's: %v", w.UID, err)
		}
	}
}
