package dns

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"

	"ztun/proxy/state"
)

// said is what Answer makes of a question, as a reply would be rendered.
func said(view *state.View, client *state.Workload, o Options, q *dns.Msg) string {
	d := Answer(view, client, &o, q)
	if d.Forward {
		return "forward"
	}
	return render(mustReply(&d, q))
}

// mustReply is a reply after a journey through its wire format.
func mustReply(d *Decision, q *dns.Msg) *dns.Msg {
	m := new(dns.Msg)
	if err := m.Unpack(pack(d.reply(q), maxTCP)); err != nil {
		panic(err)
	}
	return m
}

const ok = "NOERROR qr aa rd ra"

func nothing(name string) string { return ok + "; " + name + " 30 SOA minimum 30" }

// Every row of spec 5.7 (checklist 60, 61) and of samples/dns.txt, and what
// belongs to them in the other family.
func TestAnswers(t *testing.T) {
	for _, world := range []struct {
		name   string
		things []any
		client *state.Workload
		rows   [][2]string
	}{
		{"spec 5.7", vectors(), blueClient, [][2]string{
			{"A cart", ok + "; cart. 30 A 10.96.0.10"},
			{"A CART.Blue.svc.cluster.local", ok + "; cart.blue.svc.cluster.local. 30 A 10.96.0.10"},
			{"A pay.green", ok + "; pay.green. 30 A 10.96.0.20"},
			{"A pay.green.svc", ok + "; pay.green.svc. 30 A 10.96.0.20"},
			{"A pay.green.svc.cluster.local", ok + "; pay.green.svc.cluster.local. 30 A 10.96.0.20"},
			{"A pay.green.blue.svc.cluster.local",
				ok + "; pay.green.blue.svc.cluster.local. 30 CNAME pay.green.; pay.green. 30 A 10.96.0.20"},
			{"A Pay.Green.blue.svc.cluster.local",
				ok + "; pay.green.blue.svc.cluster.local. 30 CNAME pay.green.; pay.green. 30 A 10.96.0.20"},
			{"A api.acme.test", ok + "; api.acme.test. 30 A 203.0.113.5"},
			{"A api.acme.test.blue.svc.cluster.local",
				ok + "; api.acme.test.blue.svc.cluster.local. 30 CNAME api.acme.test.; api.acme.test. 30 A 203.0.113.5"},
			{"A api.acme.test.svc.cluster.local",
				ok + "; api.acme.test.svc.cluster.local. 30 CNAME api.acme.test.; api.acme.test. 30 A 203.0.113.5"},
			{"A api.acme.test.cluster.local",
				ok + "; api.acme.test.cluster.local. 30 CNAME api.acme.test.; api.acme.test. 30 A 203.0.113.5"},
			{"A x.y.acme.test", ok + "; x.y.acme.test. 30 A 203.0.113.6"},
			{"A x.acme.test.blue.svc.cluster.local", ok + "; x.acme.test.blue.svc.cluster.local. 30 A 203.0.113.6"},
			{"A *.acme.test", ok + "; *.acme.test. 30 A 203.0.113.6"},
			{"A acme.test", "forward"},
			{"A acme.test.blue.svc.cluster.local", "forward"},
			{"AAAA cart.blue.svc.cluster.local", nothing("cart.blue.svc.cluster.local.")},
			{"AAAA cart", nothing("cart.")},
			{"A far.blue.svc.cluster.local", nothing("far.blue.svc.cluster.local.")},
			{"A far.blue.blue.svc.cluster.local", nothing("far.blue.blue.svc.cluster.local.")},
			{"A hl.blue", ok + "; hl.blue. 30 A 10.1.0.4; hl.blue. 30 A 10.1.0.5"},
			{"AAAA hl.blue", ok + "; hl.blue. 30 AAAA 2001:db8::4"},
			{"A nat.acme.org", "forward"},
			{"MX cart", "forward"}, // checklist 62
			{"ANY cart", "forward"},
			{"PTR 10.0.96.10.in-addr.arpa", "forward"},
			{"A secret.green.svc.cluster.local", "forward"},
			{"A secret.green", "forward"},
			{"A p0.hl.blue.svc.cluster.local", "forward"},
			{"A .", "forward"},
			{"A cart.blue.svc.cluster.local.blue.svc.cluster.local", ok +
				"; cart.blue.svc.cluster.local.blue.svc.cluster.local. 30 CNAME cart.blue.svc.cluster.local.; " +
				"cart.blue.svc.cluster.local. 30 A 10.96.0.10"},
			{`A x\.y.acme.test`, ok + `; x\.y.acme.test. 30 A 203.0.113.6`},
			{`A api\.acme.test`, "forward"}, // one label, not two
			{`A cart\.blue.svc.cluster.local`, "forward"},
		}},
		{"samples/dns.txt", samples(), samples()[0].(*state.Workload), [][2]string{
			{"A b.default.svc.cluster.local", ok + "; b.default.svc.cluster.local. 30 A 10.96.0.10"},
			// better than the sample: it has an SOA
			{"AAAA b.default.svc.cluster.local", nothing("b.default.svc.cluster.local.")},
			{"A b", ok + "; b. 30 A 10.96.0.10"},
			{"A b.default", ok + "; b.default. 30 A 10.96.0.10"},
			{"A B.DEFAULT.svc.cluster.local", ok + "; b.default.svc.cluster.local. 30 A 10.96.0.10"},
			{"A plain.default.svc.cluster.local", ok + "; plain.default.svc.cluster.local. 30 A 10.96.0.11"},
			{"A empty.default.svc.cluster.local", ok + "; empty.default.svc.cluster.local. 30 A 10.96.0.12"},
			{"A nope.default.svc.cluster.local", "forward"},
			{"MX b.default.svc.cluster.local", "forward"},
			{"ANY b.default.svc.cluster.local", "forward"},
		}},
		{"the same over IPv6", append(samples(), service("b6.default.svc.cluster.local", "default", "/fd00:96::10"),
			service("both.default.svc.cluster.local", "default", "/10.96.0.20 /fd00:96::20")), samples()[0].(*state.Workload),
			[][2]string{
				{"AAAA b6", ok + "; b6. 30 AAAA fd00:96::10"},
				{"AAAA b6.default", ok + "; b6.default. 30 AAAA fd00:96::10"},
				{"AAAA B6.DEFAULT.svc.cluster.local", ok + "; b6.default.svc.cluster.local. 30 AAAA fd00:96::10"},
				{"AAAA b6.default.default.svc.cluster.local",
					ok + "; b6.default.default.svc.cluster.local. 30 CNAME b6.default.; b6.default. 30 AAAA fd00:96::10"},
				{"A b6.default.svc.cluster.local", nothing("b6.default.svc.cluster.local.")},
				{"A both", ok + "; both. 30 A 10.96.0.20"},
				{"AAAA both", ok + "; both. 30 AAAA fd00:96::20"},
				{"AAAA nope.default.svc.cluster.local", "forward"},
			}},
	} {
		view := build(world.things...)
		for _, row := range world.rows {
			if got := said(view, world.client, Options{IPv6: true}, ask(row[0])); got != row[1] {
				t.Errorf("%s: %s\n got %s\nwant %s", world.name, row[0], got, row[1])
			}
		}
	}
}

// Names that are no network's business, whatever the mesh knows, and names that only look like them.
func TestSpecialNames(t *testing.T) {
	view := build(append(vectors(), service("localhost", "blue", "n1/10.96.0.66"),
		service("*.invalid", "blue", "n1/10.96.0.67"))...)
	const reverse = "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.ip6.arpa"
	missing := func(name string) string {
		return "NXDOMAIN qr aa rd ra; " + name + " 30 SOA minimum 30"
	}
	for _, tc := range [][2]string{
		{"A localhost", ok + "; localhost. 30 A 127.0.0.1"},
		{"A LocalHost", ok + "; localhost. 30 A 127.0.0.1"},
		{"AAAA localhost", ok + "; localhost. 30 AAAA ::1"},
		{"A a.b.localhost", ok + "; a.b.localhost. 30 A 127.0.0.1"},
		{"ANY localhost", ok + "; localhost. 30 A 127.0.0.1; localhost. 30 AAAA ::1"},
		{"MX localhost", nothing("localhost.")},
		{"A invalid", missing("invalid.")},
		{"MX x.invalid", missing("x.invalid.")},
		{"PTR 1.0.0.127.in-addr.arpa", ok + "; 1.0.0.127.in-addr.arpa. 30 PTR localhost."},
		{"A 1.0.0.127.in-addr.arpa", nothing("1.0.0.127.in-addr.arpa.")},
		{"PTR 2.0.0.127.in-addr.arpa", missing("2.0.0.127.in-addr.arpa.")},
		{"SOA 127.in-addr.arpa", nothing("127.in-addr.arpa.")},
		{"PTR " + reverse, ok + "; " + reverse + ". 30 PTR localhost."},
		{"PTR 0" + reverse[1:], "forward"},
		{"A notlocalhost", "forward"},
		{`A x\.localhost`, "forward"},
		{"A localhost.acme.org", "forward"},
		{"PTR 1.0.0.128.in-addr.arpa", "forward"},
	} {
		if got := said(view, blueClient, Options{IPv6: true}, ask(tc[0])); got != tc[1] {
			t.Errorf("%s\n got %s\nwant %s", tc[0], got, tc[1])
		}
	}
	if got := said(view, blueClient, Options{}, ask("AAAA localhost")); got != nothing("localhost.") {
		t.Errorf("without IPv6: %s", got)
	}
	q := ask("A localhost")
	q.Question[0].Qclass = dns.ClassCHAOS
	if d := Answer(view, blueClient, &Options{}, q); !d.Forward {
		t.Errorf("class CHAOS: %+v", d)
	}
}

// Search domains besides the cluster's three are stripped after those, with a CNAME as they are.
func TestExtraSearch(t *testing.T) {
	view := build(vectors()...)
	o := Options{IPv6: true, ExtraSearch: []string{"Corp.Example.", "lab"}}
	for _, tc := range [][2]string{
		{"A api.acme.test.corp.example",
			ok + "; api.acme.test.corp.example. 30 CNAME api.acme.test.; api.acme.test. 30 A 203.0.113.5"},
		{"A pay.green.svc.cluster.local.lab",
			ok + "; pay.green.svc.cluster.local.lab. 30 CNAME pay.green.svc.cluster.local.; pay.green.svc.cluster.local. 30 A " +
				"10.96.0.20"},
		{"A pay.green.blue.svc.cluster.local",
			ok + "; pay.green.blue.svc.cluster.local. 30 CNAME pay.green.; pay.green. 30 A 10.96.0.20"},
		{"A cart.corp.example", ok + "; cart.corp.example. 30 CNAME cart.; cart. 30 A 10.96.0.10"},
		{"A corp.example", "forward"},
		{"A api.acme.test.other.example", "forward"},
	} {
		if got := said(view, blueClient, o, ask(tc[0])); got != tc[1] {
			t.Errorf("%s\n got %s\nwant %s", tc[0], got, tc[1])
		}
	}
}

// The question comes back letter by letter, also where owners are lower case.
func TestQuestionVerbatim(t *testing.T) {
	q := ask("A CART.Blue.svc.cluster.local")
	d := Answer(build(vectors()...), blueClient, &Options{}, q)
	if m := mustReply(&d, q); m.Question[0].Name != "CART.Blue.svc.cluster.local." || m.Id != q.Id {
		t.Errorf("got %v", m)
	}
}

// What a service must be like, and which families it has (checklist 64).
func TestFamiliesAndKinds(t *testing.T) {
	only := func(s *state.Service, f state.IPFamilies) *state.Service { s.IPFamilies = f; return s }
	cidr := service("range.acme.org", "blue", "")
	cidr.CIDRVIPs = []state.NetworkPrefix{{Network: "n1", Prefix: netip.MustParsePrefix("203.0.113.0/24")}}
	view := build(blueClient,
		service("dual.blue.svc.cluster.local", "blue", "n1/10.96.0.1 n1/fd00::1 n2/10.96.0.2 n1/10.96.0.3"),
		only(service("v4.blue.svc.cluster.local", "blue", "n1/10.96.0.1 n1/fd00::1"), state.FamiliesIPv4),
		only(service("v6.blue.svc.cluster.local", "blue", "n1/10.96.0.1 n1/fd00::1"), state.FamiliesIPv6),
		only(service("both.blue.svc.cluster.local", "blue", "n1/10.96.0.1 n1/fd00::1"), state.FamiliesDual),
		only(service("hl4.blue.svc.cluster.local", "blue", ""), state.FamiliesIPv4),
		pod("h", "blue", "n1", "10.1.0.1 10.1.0.2 2001:db8::1", "hl4.blue.svc.cluster.local"),
		pod("far", "blue", "n2", "10.1.0.3", "hl4.blue.svc.cluster.local"),
		pod("bare", "blue", "n1", "", "hl4.blue.svc.cluster.local"),
		service("nobody.blue.svc.cluster.local", "blue", ""),
		service("Upper.Blue.SVC.Cluster.Local", "blue", ""),
		pod("u", "blue", "n1", "10.1.0.7", "Upper.Blue.SVC.Cluster.Local"),
		service("Upper.Acme.Test", "blue", "n1/203.0.113.9"),
		cidr,
		&state.Workload{UID: "c/vm", Name: "vm", Namespace: "blue", Hostname: "vm.acme.test", Addresses: addrs("10.1.0.8")},
	)
	on, off := Options{IPv6: true}, Options{}
	for _, tc := range []struct {
		q    string
		o    Options
		want string
	}{
		{"A dual", on, ok + "; dual. 30 A 10.96.0.1; dual. 30 A 10.96.0.3"},
		{"AAAA dual", on, ok + "; dual. 30 AAAA fd00::1"},
		{"AAAA dual", off, nothing("dual.")},
		{"AAAA nowhere", off, "forward"},
		{"A v4", on, ok + "; v4. 30 A 10.96.0.1"},
		{"AAAA v4", on, nothing("v4.")},
		{"A v6", on, nothing("v6.")},
		{"AAAA v6", on, ok + "; v6. 30 AAAA fd00::1"},
		{"A both", on, ok + "; both. 30 A 10.96.0.1"},
		{"AAAA both", on, ok + "; both. 30 AAAA fd00::1"},
		// Headless: the first address of the family of each endpoint that is known
		// and has one, whatever its network.
		{"A hl4", on, ok + "; hl4. 30 A 10.1.0.3; hl4. 30 A 10.1.0.1"},
		{"AAAA hl4", on, nothing("hl4.")},
		{"A nobody", on, nothing("nobody.")},
		// Better than ztunnel (12.27): a hostname with capitals is found.
		{"A upper", on, ok + "; upper. 30 A 10.1.0.7"},
		{"A UPPER.acme.TEST", on, ok + "; upper.acme.test. 30 A 203.0.113.9"},
		// A range is no address to answer with, a workload is not found by name (12.6).
		{"A range.acme.org", on, "forward"},
		{"A vm.acme.test", on, "forward"},
	} {
		if got := said(view, blueClient, tc.o, ask(tc.q)); got != tc.want {
			t.Errorf("%s, %+v\n got %s\nwant %s", tc.q, tc.o, got, tc.want)
		}
	}
}

// Which of several services of one hostname (checklist 68), and which alias.
func TestChoice(t *testing.T) {
	in := func(ns, ip string, canonical bool, v state.Visibility) *state.Service {
		s := service("api.acme.test", ns, "n1/"+ip)
		s.Canonical, s.Visibility = canonical, v
		return s
	}
	pub, own := state.Public, state.NamespaceOnly
	noVIP := service("api.acme.test", "blue", "")
	for _, tc := range []struct {
		name      string
		preferred string
		services  []any
		want      string
	}{
		{"own namespace before canonical", "",
			[]any{in("red", "203.0.113.1", true, pub), in("blue", "203.0.113.2", false, pub)}, "203.0.113.2"},
		{"the last canonical", "", []any{in("a", "203.0.113.1", false, pub), in("b", "203.0.113.2", true, pub),
			in("c", "203.0.113.3", true, pub)}, "203.0.113.3"},
		{"canonical before preferred", "p", []any{in("p", "203.0.113.1", false, pub), in("b", "203.0.113.2", true, pub)},
			"203.0.113.2"},
		{"preferred before first", "p", []any{in("a", "203.0.113.1", false, pub), in("p", "203.0.113.2", false, pub)},
			"203.0.113.2"},
		{"first", "p", []any{in("a", "203.0.113.1", false, pub), in("b", "203.0.113.2", false, pub)}, "203.0.113.1"},
		{"what is not visible does not count", "a",
			[]any{in("a", "203.0.113.1", true, own), in("b", "203.0.113.2", false, pub)}, "203.0.113.2"},
		{"own and for itself", "", []any{in("a", "203.0.113.1", true, pub), in("blue", "203.0.113.2", false, own)},
			"203.0.113.2"},
		{"what has no address does not count", "", []any{noVIP, in("b", "203.0.113.2", false, pub)}, "203.0.113.2"},
	} {
		got := said(build(append(tc.services, blueClient)...), blueClient, Options{PreferredNamespace: tc.preferred},
			ask("A api.acme.test"))
		if want := ok + "; api.acme.test. 30 A " + tc.want; got != want {
			t.Errorf("%s: got %s, want %s", tc.name, got, want)
		}
	}

	view := build(blueClient,
		service("*.green.svc.cluster.local", "green", "n1/10.96.0.1"),
		service("web.green.blue.svc.cluster.local", "blue", "n1/10.96.0.2"),
		service("*.local", "blue", "n1/10.96.0.3"),
		service("solo", "blue", "n1/10.96.0.4"),
		service("solo.blue.svc.cluster.local", "blue", "n1/10.96.0.5"),
	)
	for q, want := range map[string]string{
		// A wildcard match of an earlier alias beats an exact one of a later.
		"A web.green": "web.green. 30 A 10.96.0.1",
		// The exact one of the same alias, and the longer wildcard, come first.
		"A web.green.blue.svc.cluster.local": "web.green.blue.svc.cluster.local. 30 A 10.96.0.2",
		"A a.green.svc.cluster.local":        "a.green.svc.cluster.local. 30 A 10.96.0.1",
		"A a.red.svc.cluster.local":          "a.red.svc.cluster.local. 30 A 10.96.0.3",
		"A solo":                             "solo. 30 A 10.96.0.4",
	} {
		if got := said(view, blueClient, Options{}, ask(q)); got != ok+"; "+want {
			t.Errorf("%s: got %s, want %s", q, got, want)
		}
	}
}

// Domains other than Kubernetes' own defaults.
func TestDomains(t *testing.T) {
	view := build(blueClient, service("cart.blue.svc.corp.test", "blue", "n1/10.96.0.1"),
		service("hl.blue.svc.corp.test", "blue", ""),
		pod("h", "blue", "n1", "10.1.0.1", "hl.blue.svc.corp.test"), service("api.acme.test", "blue", "n1/203.0.113.5"))
	for _, tc := range []struct {
		q    string
		o    Options
		want string
	}{
		{"A cart", Options{ClusterDomain: "Corp.Test."}, ok + "; cart. 30 A 10.96.0.1"},
		{"A hl", Options{ClusterDomain: "corp.test"}, ok + "; hl. 30 A 10.1.0.1"},
		{"A cart", Options{}, "forward"},
		{"A api.acme.test.example.org", Options{}, "forward"},
		{"A api.acme.test.example.org", Options{SearchDomains: []string{"other.org", "Example.ORG."}}, ok +
			"; api.acme.test.example.org. 30 CNAME api.acme.test.; api.acme.test. 30 A 203.0.113.5"},
		{"A api.acme.test.cluster.local", Options{SearchDomains: []string{}}, "forward"}, // none, rather than the default
		{"A example.org", Options{SearchDomains: []string{"example.org"}}, "forward"},    // nothing would be left
	} {
		if got := said(view, blueClient, tc.o, ask(tc.q)); got != tc.want {
			t.Errorf("%s, %+v\n got %s\nwant %s", tc.q, tc.o, got, tc.want)
		}
	}
}

// Header bits and EDNS (checklist 62, 67).
func TestMessageDetails(t *testing.T) {
	view := build(vectors()...)
	edns := func(q *dns.Msg, size uint16, do bool) *dns.Msg { return q.SetEdns0(size, do) }
	change := func(q *dns.Msg, f func(*dns.Msg)) *dns.Msg { f(q); return q }
	for _, tc := range []struct {
		name string
		q    *dns.Msg
		want string
		opt  string
	}{
		{"plain", ask("A cart"), ok + "; cart. 30 A 10.96.0.10", ""},
		{"EDNS", edns(ask("A cart"), 1232, false), ok + "; cart. 30 A 10.96.0.10", "1232 false v0"},
		{"small EDNS", edns(ask("A cart"), 400, true), ok + "; cart. 30 A 10.96.0.10", "512 true v0"},
		{"large EDNS", edns(ask("A cart"), 65535, false), ok + "; cart. 30 A 10.96.0.10", "65535 false v0"},
		{"no RD, but AD and CD", change(ask("A cart"), func(q *dns.Msg) {
			q.RecursionDesired, q.AuthenticatedData, q.CheckingDisabled = false, true, true
		}),
			"NOERROR qr aa ra cd; cart. 30 A 10.96.0.10", ""},
		{"negative with DO", edns(ask("AAAA cart"), 1232, true), nothing("cart."), "1232 true v0"},
		{"EDNS version", change(edns(ask("A cart"), 1232, true), func(q *dns.Msg) {
			q.IsEdns0().SetVersion(1)
		}), "BADVERS qr rd ra", "1232 true v0"},
		{"EDNS version, not ours", change(edns(ask("A elsewhere.test"), 1232, true), func(q *dns.Msg) {
			q.IsEdns0().SetVersion(1)
		}), "forward", ""},
		{"two OPT", edns(edns(ask("A cart"), 1232, true), 1400, false), "FORMERR qr rd ra", "1400 false v0"},
		{"class CHAOS", change(ask("A cart"), func(q *dns.Msg) { q.Question[0].Qclass = dns.ClassCHAOS }), "forward", ""},
		{"class ANY", change(ask("A cart"), func(q *dns.Msg) {
			q.Question[0].Qclass = dns.ClassANY
		}), ok + "; cart. 30 A 10.96.0.10", ""},
		{"two questions", change(ask("A cart"), func(q *dns.Msg) {
			q.Question = append(q.Question, q.Question[0])
		}), "SERVFAIL qr rd ra", ""},
		{"no question, EDNS", change(edns(ask("A cart"), 1232, false), func(q *dns.Msg) {
			q.Question = nil
		}), "SERVFAIL qr rd ra", "1232 false v0"},
		// better than ztunnel's NOTIMP: issue 5
		{"UPDATE", change(ask("SOA cart"), func(q *dns.Msg) { q.Opcode = dns.OpcodeUpdate }), "forward", ""},
	} {
		d := Answer(view, blueClient, &Options{IPv6: true}, tc.q)
		if d.Forward {
			if tc.want != "forward" {
				t.Errorf("%s: forwarded", tc.name)
			}
			continue
		}
		m := mustReply(&d, tc.q)
		opt := ""
		if o := m.IsEdns0(); o != nil {
			opt = fmt.Sprint(o.UDPSize(), o.Do(), " v", o.Version())
			opt = strings.Replace(opt, "true v ", "true v", 1)
			opt = strings.Replace(opt, "false v ", "false v", 1)
		}
		if got := render(m); got != tc.want || strings.ReplaceAll(opt, " ", "") != strings.ReplaceAll(tc.opt, " ", "") {
			t.Errorf("%s:\n got %s, OPT %q\nwant %s, OPT %q", tc.name, got, opt, tc.want, tc.opt)
		}
	}
}

// What does not fit is left out by whole records, and TC says so (checklist 66).
func TestTruncation(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		var l []string
		for i := range 256 {
			if v6 {
				l = append(l, fmt.Sprintf("n1/fd00::%x", i+1))
			} else {
				l = append(l, fmt.Sprintf("n1/10.9.%d.1", i))
			}
		}
		view := build(blueClient, service("test.com", "blue", strings.Join(l, " ")))
		typ, size := "A", 16
		if v6 {
			typ, size = "AAAA", 28
		}
		for _, tc := range []struct{ edns, limit, want int }{
			{0, 512, (512 - 26) / size}, // RFC 1035, where ztunnel has 4096
			{400, 512, (512 - 26 - 11) / size},
			{1232, 1232, (1232 - 26 - 11) / size}, // 74 of IPv4
			{8192, 8192, 256},
		} {
			q := ask(typ + " test.com.")
			if tc.edns > 0 {
				q.SetEdns0(uint16(tc.edns), false)
			}
			d := Answer(view, blueClient, &Options{IPv6: true}, q)
			if n := udpLimit(q); n != tc.limit {
				t.Errorf("EDNS %d: limit %d", tc.edns, n)
			}
			raw := pack(d.reply(q), udpLimit(q))
			m := mustUnpack(t, raw)
			if len(raw) > tc.limit || len(m.Answer) != tc.want || m.Truncated != (tc.want < 256) ||
				(m.IsEdns0() != nil) != (tc.edns > 0) {
				t.Errorf("%s, EDNS %d: %d bytes, %d answers of %d, truncated %v", typ, tc.edns, len(raw), len(m.Answer), tc.want,
					m.Truncated)
			}
		}
		d := Answer(view, blueClient, &Options{IPv6: true}, ask(typ+" test.com."))
		if m := mustReply(&d, ask(typ+" test.com.")); len(m.Answer) != 256 || m.Truncated {
			t.Errorf("by TCP: %d answers", len(m.Answer))
		}
	}
}

// The order is that of the given shuffle, which is given all addresses.
func TestShuffle(t *testing.T) {
	view := build(blueClient, service("many.test", "blue", "n1/10.0.0.1 n1/10.0.0.2 n1/10.0.0.3"))
	reverse := func(n int, swap func(i, j int)) {
		for i := range n / 2 {
			swap(i, n-1-i)
		}
	}
	d := Answer(view, blueClient, &Options{Shuffle: reverse}, ask("A many.test"))
	if !slices.Equal(d.Addrs, addrs("10.0.0.3 10.0.0.2 10.0.0.1")) {
		t.Errorf("got %v", d.Addrs)
	}
	if s := view.ServicesByHost("many.test")[0]; s.VIPs[0].Addr != netip.MustParseAddr("10.0.0.1") {
		t.Error("the View was changed")
	}
}
