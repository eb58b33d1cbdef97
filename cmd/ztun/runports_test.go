package main

import (
	"net/netip"
	"strings"
	"testing"

	"ztun/cmd/attach/rootless"
	"ztun/proxy/state"
)

func TestRunPublishes(t *testing.T) {
	p := func(at string, to uint16) rootless.Published {
		if strings.HasPrefix(at, ":") {
			return rootless.Published{At: netip.AddrPortFrom(netip.Addr{}, netip.MustParseAddrPort("0.0.0.0"+at).Port()), To: to}
		}
		return rootless.Published{At: netip.MustParseAddrPort(at), To: to}
	}
	udp := func(p rootless.Published) rootless.Published { p.UDP = true; return p }
	for s, want := range map[string]rootless.Published{
		"8080": p(":8080", 8080), "8080:80": p(":8080", 80), "127.0.0.1:8080": p("127.0.0.1:8080", 8080),
		"127.0.0.1:8080:80": p("127.0.0.1:8080", 80), "[::1]:8080": p("[::1]:8080", 8080),
		"[::1]:8080:80": p("[::1]:8080", 80), "8080:80/tcp": p(":8080", 80), "0.0.0.0:80": p("0.0.0.0:80", 80),
		"[::]:80": p(":80", 80), "53/udp": udp(p(":53", 53)), "127.0.0.1:5353:53/udp": udp(p("127.0.0.1:5353", 53)),
	} {
		if got, err := parsePublished(s); err != nil || got != want {
			t.Errorf("%s: %+v, %v", s, got, err)
		}
	}
	for s, want := range map[string]string{
		"": "want a port", "0": "want a port", "80:0": "want a port", "65536": "want a port", "80:80:80": "want an IP address",
		"host:80": "want an IP address", "::1:80": "want an IP address", "[::1]": "want an IP address", "80/sctp": "not sctp",
		"127.0.0.1:0:80": "want a port", "1.2.3.4:80:80:80": "want an IP address", "80:": "want a port", "]80": "want",
	} {
		if got, err := parsePublished(s); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %+v, %v; want %q", s, got, err, want)
		}
	}
	for _, test := range []struct{ first, second, want string }{
		{"80", "80:81", "-p 80:81: this port is published twice"}, {"80", "80/udp", ""},
		{"80/udp", "80:81/udp", "published twice"}, {"80", "81:80", ""},
		{"80/udp", "127.0.0.1:81:80/udp", "the command's UDP port 80 is published at another port already"},
		{"127.0.0.1:80/udp", "[::1]:80/udp", ""},
	} {
		r := runPorts{publish: []string{test.first, test.second}}
		if err := r.resolve(); (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s and %s: %v, want %q", test.first, test.second, err, test.want)
		}
	}
}

// A mesh port that peers do not find is said to be one, with what the record lacks.
func TestRunUnannounced(t *testing.T) {
	own, host := netip.MustParseAddr("10.0.0.7"), netip.MustParseAddr("192.0.2.1")
	mesh := func(port uint16) []netip.AddrPort { return []netip.AddrPort{netip.AddrPortFrom(host, port)} }
	for _, test := range []struct {
		w     state.Workload
		asked uint16
		want  string // "": no warning
	}{
		{state.Workload{Protocol: state.HBONE, MeshAddresses: mesh(15018)}, 15018, ""},
		{state.Workload{Protocol: state.HBONE, MeshAddresses: mesh(15018)}, 0, ""},
		{state.Workload{Protocol: state.HBONE, MeshAddresses: mesh(15018)}, 15019, "sends them to [192.0.2.1:15018]"},
		{state.Workload{Protocol: state.HBONE}, 15018, "port 15018 that is listened at: the workload's record sends them to " +
			"port 15008 of its own addresses; give it meshAddresses: [\"ADDRESS-OF-THIS-HOST:15018\"]"},
		{state.Workload{Protocol: state.HBONE}, 0, "port 15008 that is listened at"},
		{state.Workload{Protocol: state.HBONE, Addresses: []netip.Addr{host}}, 0, ""},
		{state.Workload{Protocol: state.HBONE, Addresses: []netip.Addr{host}}, 15008, ""},
		{state.Workload{Protocol: state.HBONE, Addresses: []netip.Addr{own}}, 15008, "do not find the mesh port 15008"},
		{state.Workload{}, 0, ""},
		{state.Workload{MeshAddresses: mesh(15018)}, 0, ""}, // it only calls
		{state.Workload{}, 15018, "has not protocol HBONE"},
	} {
		got := unannounced(&test.w, test.asked, []netip.Addr{host})
		if called := announced(&test.w); len(called) > 0 && test.w.Protocol != state.HBONE {
			t.Errorf("%+v: listens at %v", test.w, called)
		}
		if (got == "") != (test.want == "") || !strings.Contains(got, test.want) {
			t.Errorf("%+v at %d: %q", test.w, test.asked, got)
		}
	}
}

// A record that announces an address that the host has lost is said to, once it was seen there; one that announces a
// router's is not.
func TestRunDeparted(t *testing.T) {
	old, next := netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("192.0.2.8")
	router := netip.MustParseAddr("198.51.100.1")
	at := func(hosts ...netip.Addr) (out []netip.AddrPort) {
		for _, h := range hosts {
			out = append(out, netip.AddrPortFrom(h, 15018))
		}
		return out
	}
	var had []netip.Addr
	for i, step := range []struct {
		announced []netip.AddrPort
		host      []netip.Addr
		want      string
	}{
		{at(old, router), []netip.Addr{old}, ""},
		{at(old, router), nil, "sends them to 192.0.2.7:15018"},
		{at(old, router), []netip.Addr{next}, "sends them to 192.0.2.7:15018"},
		{at(next, router), []netip.Addr{next}, ""},
		{at(next, router), []netip.Addr{old}, "sends them to 192.0.2.8:15018"},
		{at(next, router), []netip.Addr{next}, ""},
		{at(old), []netip.Addr{next}, ""}, // it was announced by an earlier record: this one knows better
	} {
		var text string
		had, text = departed(step.announced, had, step.host)
		if (text == "") != (step.want == "") || !strings.Contains(text, step.want) {
			t.Errorf("step %d: %q, want %q", i, text, step.want)
		}
	}
}
