package control

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"ztun/admin/pb/discoverypb"
	"ztun/admin/xds"
	"ztun/proxy/state"
)

func addr4(n int) netip.Addr {
	return netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
}

const meshYAML = `
workloads:
- {uid: u/front, name: front, namespace: shop, workloadIps: [10.0.0.1], node: node-a, services: {}}
- {uid: u/stock, name: stock, namespace: shop, workloadIps: [10.0.0.2, "fd00::2"], node: node-b, services: {"shop/stock.host": {80: 8080}}}
- {uid: u/extra, name: extra, namespace: shop, workloadIps: [10.0.0.3], network: edge, node: node-b, services: {}}
- {uid: u/host, name: host, namespace: shop, workloadIps: [10.0.0.1], networkMode: HostNetwork, node: node-b, services: {}}
services:
- {name: stock, namespace: shop, hostname: stock.host, vips: [/10.9.0.1], cidrVips: [{network: "", cidr: 10.10.0.0/16}], ports: {80: 8080}}
policies:
- {name: p, namespace: shop, scope: Namespace, action: Allow, dryRun: false, rules: []}
`

// step is a request of a table test and what has to come back.
type step struct {
	req  *discoverypb.DeltaDiscoveryRequest // nil: the snapshot changes to publish
	ack  bool                               // before anything else the message under way is ACKed
	yaml string                             // published before
	want string                             // "+name ..." and "-name ..." of the next message, "" for an empty one, "none"
}

func describe(m *message) string {
	if m == nil {
		return "none"
	}
	var l []string
	for _, it := range m.items {
		s := "+" + it.name
		for _, e := range it.extra {
			s += "(" + e + ")"
		}
		l = append(l, s)
	}
	slices.Sort(l)
	for _, name := range m.removed {
		l = append(l, "-"+name)
	}
	return strings.Join(l, " ")
}

func request(subscribe, unsubscribe string, initial ...string) *discoverypb.DeltaDiscoveryRequest {
	r := &discoverypb.DeltaDiscoveryRequest{
		ResourceNamesSubscribe: strings.Fields(subscribe), ResourceNamesUnsubscribe: strings.Fields(unsubscribe),
		InitialResourceVersions: map[string]string{},
	}
	for _, s := range initial {
		name, version, _ := strings.Cut(s, "=")
		r.InitialResourceVersions[name] = version
	}
	return r
}

func TestSubscription(t *testing.T) {
	base := snapshotOf(t, nil, fromLocal(t, "a.yaml", parse(t, meshYAML)))
	version := func(name string) string { return name + "=" + base.addresses.get(name).version }
	const all = "+shop/stock.host +u/extra +u/front +u/host +u/stock"
	for _, test := range []struct {
		name  string
		url   string
		steps []step
	}{
		{"no names is everything", typeAddress, []step{{req: request("", ""), want: all}, {want: "none"},
			{ack: true, want: "none"}}},
		{"so is *", typeAddress, []step{{req: request("*", ""), want: all}}},
		{"policies", typeAuthorization, []step{{req: request("", ""), want: "+shop/p"}}},
		{"an unknown type is answered, empty", "type.googleapis.com/x",
			[]step{{req: request("", ""), want: ""}, {ack: true, want: "none"}}},
		{"reconnect with everything: nothing is sent again, but an answer", typeAddress, []step{
			{req: request("", "", version("shop/stock.host"), version("u/extra"), version("u/front"), version("u/host"),
				version("u/stock")), want: ""}}},
		{"reconnect with empty versions: all are sent again", typeAddress, []step{
			{req: request("", "", "shop/stock.host=", "u/extra=", "u/front=", "u/host=", "u/stock="), want: all}}},
		{"reconnect: what is gone is removed, what is old is sent", typeAddress, []step{
			{req: request("", "", "gone/service=1", "u/gone=2", version("u/front"), "u/host=old", version("u/extra"),
				version("u/stock"), version("shop/stock.host")),
				want: "+u/host -gone/service -u/gone"}}},
		{"while a message is under way nothing is sent, then the newest", typeAddress, []step{
			{req: request("", ""), want: all},
			{yaml: meshYAML + "# 1", want: "none"},
			{yaml: strings.ReplaceAll(meshYAML, "10.0.0.1]", "10.0.0.100]"), want: "none"},
			{yaml: strings.ReplaceAll(meshYAML, "10.0.0.1]", "10.0.0.101]"), want: "none"},
			{ack: true, want: "+u/front +u/host"},
			{yaml: meshYAML, ack: true, want: "+u/front +u/host"}}},
		{"removal", typeAddress, []step{
			{req: request("", ""), want: all},
			{ack: true, yaml: workloadsYAML("front:10.0.0.1:node-a"),
				want: "+u/front -shop/stock.host -u/extra -u/host -u/stock"}}},
		{"on demand: the node's own workloads, then what is asked for", typeAddress, []step{
			{req: request("*", "*"), want: "+u/front"},
			{ack: true, req: request("/10.0.0.2", ""), want: "+u/stock"},
			{ack: true, req: request("/10.9.0.1", ""), want: "+shop/stock.host"},
			{ack: true, req: request("edge/10.0.0.3", ""), want: "+u/extra"},
			{ack: true, req: request("edge/10.0.0.4", ""), want: "-edge/10.0.0.4"},
			{ack: true, req: request("u/front", ""), want: "+u/front"}, // implied before, asked for now
			{ack: true, req: request("/10.0.0.2", ""), want: "+u/stock"},
			{ack: true, want: "none"}}},
		{"on demand: a service brings its workloads", typeAddress, []step{
			{req: request("*", "*"), want: "+u/front"},
			{ack: true, req: request("/10.9.0.1", ""), want: "+shop/stock.host +u/stock"},
			{ack: true, yaml: strings.ReplaceAll(meshYAML, "network: edge, node: node-b, services: {}",
				`network: edge, node: node-b, services: {"shop/stock.host": {}}`), want: "+u/extra"}}},
		{"on demand: an address in a range is answered by that name", typeAddress, []step{
			{req: request("* /10.10.3.4", "*"), want: "+shop/stock.host(/10.10.3.4) +u/front +u/stock"}}},
		{"on demand: a workload on its host's network is not found by address", typeAddress, []step{
			{req: request("* /10.0.0.1", "*"), want: "+u/front"}}},
		{"on demand: what was asked for and comes later is sent", typeAddress, []step{
			{req: request("* /10.0.0.77", "*"), want: "+u/front -/10.0.0.77"},
			{ack: true, yaml: meshYAML + "- {name: q, namespace: shop, scope: Global, action: Deny, dryRun: false, rules: []}\n",
				want: "none"},
			{yaml: strings.ReplaceAll(meshYAML, "10.0.0.3]", "10.0.0.77]"), want: "none"},
			{yaml: strings.ReplaceAll(meshYAML, "10.0.0.3], network: edge", "10.0.0.77]"), want: "+u/extra"},
			{ack: true, yaml: meshYAML, want: "-u/extra"}}},
		{"on demand reconnect: names of the last stream are asked for again", typeAddress, []step{
			{req: request("*", "*", "/10.0.0.2=", version("u/stock"), version("u/front"), "shop/stock.host=old", "/10.0.0.99=",
				"u/gone=1"),
				want: "+shop/stock.host -/10.0.0.99 -u/gone"},
			{ack: true, yaml: strings.ReplaceAll(meshYAML, "fd00::2", "fd00::3"), want: "+u/stock"}}},
		{"giving up a name: its end is not told", typeAddress, []step{
			{req: request("* u/extra", "*"), want: "+u/extra +u/front"},
			{ack: true, req: request("", "u/extra"), want: "none"},
			{yaml: workloadsYAML("front:10.0.0.1:node-a"), want: "+u/front"}}},
		{"from on demand to everything", typeAddress, []step{
			{req: request("*", "*"), want: "+u/front"},
			{ack: true, req: request("*", ""), want: "+shop/stock.host +u/extra +u/host +u/stock"},
			{ack: true, req: request("", "*"), want: "none"},
			{yaml: workloadsYAML("x:10.0.0.1:node-b"), want: "-u/front"}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := newSubscription(test.url, "node-a")
			d.publish(base)
			snap := base
			for i, s := range test.steps {
				if s.ack && d.flight != nil {
					check(t, d.request(&discoverypb.DeltaDiscoveryRequest{ResponseNonce: d.flight.nonce}, time.Now()))
				}
				if s.yaml != "" {
					snap = snapshotOf(t, snap, fromLocal(t, "a.yaml", parse(t, s.yaml)))
				}
				d.publish(snap)
				if s.req != nil {
					check(t, d.request(s.req, time.Now()))
				}
				m := d.next(3 << 20)
				if got := describe(m); got != s.want {
					t.Fatalf("step %d: got %q, want %q", i, got, s.want)
				}
				if m != nil {
					d.sent(m, time.Now())
				}
			}
		})
	}
}

// A stale nonce is neither ACK nor NACK, a NACK is not answered and is remembered.
func TestReplies(t *testing.T) {
	snap := snapshotOf(t, nil, fromLocal(t, "a.yaml", parse(t, meshYAML)))
	d := newSubscription(typeAddress, "node-a")
	reply := func(nonce, problem string) {
		r := &discoverypb.DeltaDiscoveryRequest{ResponseNonce: nonce}
		if problem != "" {
			r.ErrorDetail = &discoverypb.Status{Message: problem}
		}
		check(t, d.request(r, time.Now()))
	}
	check(t, d.request(request("", ""), time.Now()))
	equal(t, "without a snapshot", describe(d.next(1<<20)), "none")
	d.publish(snap)
	m := d.next(1 << 20)
	d.sent(m, time.Now())
	reply("v1-77", "")
	reply("", "without a nonce")
	equal(t, "stale", d.stats.stale, 2)
	equal(t, "under way", d.flight != nil, true)
	reply(m.nonce, "u/front: bad")
	equal(t, "nacks", d.stats.nacks, 1)
	equal(t, "text", d.stats.lastNACK, "u/front: bad")
	equal(t, "after the NACK", describe(d.next(1<<20)), "none")
	reply(m.nonce, "") // a second reply to the same
	equal(t, "stale", d.stats.stale, 3)
	equal(t, "acks", d.stats.acks, 0)
	next := snapshotOf(t, snap, fromLocal(t, "a.yaml", parse(t, strings.ReplaceAll(meshYAML, "10.0.0.3]", "10.0.0.5]"))))
	d.publish(next)
	m = d.next(1 << 20)
	equal(t, "the next change", describe(m), "+u/extra")
	d.sent(m, time.Now())
	reply(m.nonce, "")
	equal(t, "acked", d.stats.acked.nonce, m.nonce)
	equal(t, "synced", d.stats.synced, 2)
}

func TestBounds(t *testing.T) {
	d := newSubscription(typeAddress, "node-a")
	err := d.request(request(strings.Repeat("x", maxNameLength+1), ""), time.Now())
	if err == nil || !strings.Contains(err.Error(), "longer than 1024 bytes") {
		t.Fatal(err)
	}
	many := &discoverypb.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"*"},
		ResourceNamesUnsubscribe: []string{"*"}}
	for i := range maxNames + 1 {
		many.ResourceNamesSubscribe = append(many.ResourceNamesSubscribe, fmt.Sprint("u/", i))
	}
	if err := newSubscription(typeAddress, "node-a").request(many, time.Now()); err == nil ||
		!strings.Contains(err.Error(), "more than 20000 names") {
		t.Fatal(err)
	}
	// The same name over and over, while no reply comes.
	d = newSubscription(typeAddress, "node-a")
	again := &discoverypb.DeltaDiscoveryRequest{ResourceNamesSubscribe: slices.Repeat([]string{"u/1"}, maxNames)}
	for err = nil; err == nil && len(d.asked) <= 3*maxNames; err = d.request(again, time.Now()) {
	}
	if err == nil || !strings.Contains(err.Error(), "waiting for an answer") {
		t.Fatal(err)
	}
}

// A workload that changes its uid is never missing: removals come after all additions, also over several messages.
func TestRemovalsLast(t *testing.T) {
	var before, after []string
	for i := range 300 {
		before = append(before, fmt.Sprintf("old-%d:10.0.%d.%d:n", i, i/250, i%250))
		after = append(after, fmt.Sprintf("new-%d:10.0.%d.%d:n", i, i/250, i%250))
	}
	snap := snapshotOf(t, nil, fromLocal(t, "a", parse(t, workloadsYAML(before...))))
	d := newSubscription(typeAddress, "")
	d.publish(snap)
	check(t, d.request(request("", ""), time.Now()))
	d.sent(d.next(1<<20), time.Now())
	d.publish(snapshotOf(t, snap, fromLocal(t, "a", parse(t, workloadsYAML(after...)))))
	added, removed, messages := 0, 0, 0
	for {
		check(t, d.request(&discoverypb.DeltaDiscoveryRequest{ResponseNonce: d.flight.nonce}, time.Now()))
		m := d.next(4000)
		if m == nil {
			break
		}
		d.sent(m, time.Now())
		messages++
		added += len(m.items)
		if len(m.removed) > 0 && added != 300 {
			t.Fatalf("removed after %d of 300 additions", added)
		}
		removed += len(m.removed)
	}
	if added != 300 || removed != 300 || messages < 10 {
		t.Fatal(added, removed, messages)
	}
}

// Whatever happens, a client that applies what it gets ends up with what it should have, and no message is too large.
func TestSubscriptionConverges(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const limit = 600
		var snap *snapshot
		publish := func() {
			l := &xds.Local{}
			for _, i := range rapid.SliceOfNDistinct(rapid.IntRange(0, 11), 0, 12, rapid.ID).Draw(t, "workloads") {
				w := &state.Workload{UID: fmt.Sprint("u/", i), Namespace: "ns", Node: fmt.Sprint("n", i%3),
					Capacity: uint32(rapid.IntRange(1, 2).Draw(t, "capacity"))}
				w.Addresses = append(w.Addresses, addr4(0x0a000000+rapid.IntRange(0, 5).Draw(t, "address")))
				if rapid.Bool().Draw(t, "backs") {
					w.Services = append(w.Services, state.WorkloadService{Service: state.ServiceKey{Namespace: "ns", Hostname: "s0"}})
				}
				l.Workloads = append(l.Workloads, w)
			}
			for _, i := range rapid.SliceOfNDistinct(rapid.IntRange(0, 1), 0, 2, rapid.ID).Draw(t, "services") {
				l.Services = append(l.Services, &state.Service{Namespace: "ns", Hostname: fmt.Sprint("s", i),
					VIPs: []state.NetworkAddress{{Addr: addr4(0x0a000100 + rapid.IntRange(0, 1).Draw(t, "vip"))}}})
			}
			f := &file{local: l}
			if err := f.encode(""); err != nil {
				t.Fatal(err)
			}
			next, errs, _ := build([]*file{f}, snap, "", 1<<20, nil)
			if errs.count > 0 {
				t.Fatal(errs.list)
			}
			snap = next
		}
		has := map[string]string{} // the client's resources
		asked := map[string]bool{} // names that it waits for
		d := (*subscription)(nil)
		wildcard := rapid.Bool().Draw(t, "wildcard")
		connect := func() {
			d = newSubscription(typeAddress, "n1")
			initial := maps.Clone(has)
			first := &discoverypb.DeltaDiscoveryRequest{InitialResourceVersions: initial}
			if !wildcard {
				for name := range asked {
					initial[name] = has[name]
				}
				first.ResourceNamesSubscribe, first.ResourceNamesUnsubscribe = []string{"*"}, []string{"*"}
			}
			if rapid.Bool().Draw(t, "snapshot first") {
				d.publish(snap)
			}
			if err := d.request(first, time.Now()); err != nil {
				t.Fatal(err)
			}
		}
		receive := func() bool {
			d.publish(snap)
			m := d.next(limit)
			if m == nil {
				return false
			}
			d.sent(m, time.Now())
			size := 0
			for _, it := range m.items {
				has[it.name] = it.version
				size += it.size()
			}
			if size > limit && len(m.items) > 1 {
				t.Fatalf("a message of %d bytes with %d resources", size, len(m.items))
			}
			for _, name := range m.removed {
				delete(has, name)
			}
			return true
		}
		reply := func() {
			if d.flight == nil {
				return
			}
			req := &discoverypb.DeltaDiscoveryRequest{ResponseNonce: d.flight.nonce}
			if rapid.Bool().Draw(t, "nack") {
				req.ErrorDetail = &discoverypb.Status{Message: "no"}
			}
			if err := d.request(req, time.Now()); err != nil {
				t.Fatal(err)
			}
		}
		publish()
		connect()
		t.Repeat(map[string]func(*rapid.T){
			"publish": func(*rapid.T) { publish() },
			"receive": func(*rapid.T) { receive() },
			"reply":   func(*rapid.T) { reply() },
			"release": func(*rapid.T) { d.release() },
			"again":   func(*rapid.T) { connect() },
			"ask": func(t *rapid.T) {
				name := rapid.SampledFrom([]string{"u/3", "ns/s0", "/10.0.0.1", "/10.0.1.0", "/10.0.1.1", "u/nobody"}).Draw(
					t, "name")
				asked[name] = true
				d.publish(snap)
				if err := d.request(&discoverypb.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{name}},
					time.Now()); err != nil {
					t.Fatal(err)
				}
			},
		})
		for range 1000 {
			reply()
			if !receive() {
				break
			}
		}
		want := map[string]string{}
		names := make(map[string]struct{})
		for name := range d.names {
			names[name] = struct{}{}
		}
		target := snap.addresses
		if !wildcard {
			target = snap.wanted(typeAddress, snap.own("n1", ""), names, nil)
		}
		for _, r := range target.all() {
			want[r.name] = r.version
		}
		if !maps.Equal(has, want) {
			t.Fatalf("has %v\nwant %v", has, want)
		}
		if d.stats.synced != snap.version {
			t.Fatalf("synced %d of %d", d.stats.synced, snap.version)
		}
	})
}

// all lists a table.
func (t *table) all() []*resource {
	out := make([]*resource, 0, t.count)
	for _, s := range t.shards {
		if s != nil {
			out = append(out, *s...)
		}
	}
	return out
}

// All responses but the last of a state say that more follows; the last one comes even if what was left has gone by
// then.
func TestMoreFollows(t *testing.T) {
	first := snapshotOf(t, nil,
		fromLocal(t, "a.yaml", parse(t, workloadsYAML("a:10.0.0.1:n", "b:10.0.0.2:n", "c:10.0.0.3:n"))))
	d := newSubscription(typeAddress, "n")
	d.publish(first)
	check(t, d.request(&discoverypb.DeltaDiscoveryRequest{TypeUrl: typeAddress}, time.Now()))
	step := func() (n int, more bool) {
		t.Helper()
		m := d.next(1) // one resource
		if m == nil {
			t.Fatal("nothing to say")
		}
		d.sent(m, time.Now())
		check(t, d.request(&discoverypb.DeltaDiscoveryRequest{TypeUrl: typeAddress, ResponseNonce: m.nonce}, time.Now()))
		return len(m.items), strings.HasSuffix(m.encode(typeAddress).SystemVersionInfo, xds.MoreFollows)
	}
	for range 2 {
		n, more := step()
		equal(t, "resources", n, 1)
		equal(t, "more", more, true)
	}
	has := ""
	for _, name := range []string{"a", "b", "c"} {
		i := shardOf("u/" + name)
		if d.known[i].get("u/"+name) != nil {
			has += " " + name + ":10.0.0." + string('1'+name[0]-'a') + ":n"
		}
	}
	d.publish(snapshotOf(t, first, fromLocal(t, "a.yaml", parse(t, workloadsYAML(strings.Fields(has)...)))))
	n, more := step()
	equal(t, "resources", n, 0)
	equal(t, "more", more, false)
	if m := d.next(1); m != nil {
		t.Fatal(m)
	}
}
