package e2e

import (
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	"ztun/test/lab"
)

// payload is what every connection sends; what comes back before it is who answered.
var payload = "payload " + strings.Repeat("0123456789abcdef", 200)

// hop is what one node has to say of a connection: one access line, and its series.
type hop struct {
	node     *lab.Node
	inbound  bool
	early    bool          // turned away before anything was counted
	from     netip.Addr    // who is seen calling
	src, dst string        // names of records; "" for what nobody knows
	told     *lab.Workload // instead of src: what the client says of itself, with wp's identity
	at       string        // dst.addr
	hbone    string        // authority; "" if there is no tunnel
	service  string        // the service that was called
	named    bool          // inbound: the authority names the service
	port     uint16        // inbound: the application's port, by which a service is guessed
	reply    string        // what the application said before it echoed, as far as it passes here
	lookup   string        // hostname of the workload that had to be looked up
	err      string        // text of a failure, whose response_flags is flag
	flag     string
}

// seenService is the service that a node says was called. The source knows; the destination has to find it among the
// services of its workload: the one that the client named, or else the first of which a port leads to the
// application's. A workload file does not say which services a workload has, only which workloads a service has.
func (r *routing) seenService(h hop) *lab.Service {
	if !h.inbound || h.named || h.service != "" && r.control != nil && r.leads(h.service, h.dst, 0) {
		return r.service(h.service)
	}
	if r.control == nil {
		return nil
	}
	for _, key := range slices.Sorted(maps.Keys(r.record(h.dst).Services)) {
		_, host, _ := strings.Cut(key, "/")
		name, _, _ := strings.Cut(host, ".")
		if r.leads(name, h.dst, h.port) {
			return r.service(name)
		}
	}
	return nil
}

// leads tells whether a workload is an endpoint of a service, at a port of its (0: any).
func (r *routing) leads(service, workload string, port uint16) bool {
	s := r.service(service)
	own, ok := r.record(workload).Services[s.Namespace+"/"+s.Hostname]
	if !ok || port == 0 {
		return ok
	}
	for _, ports := range []map[uint16]uint16{s.Ports, own} {
		for _, p := range ports {
			if p == port {
				return true
			}
		}
	}
	return false
}

// source is who is seen calling, and the identity that a tunnel has for it.
func (r *routing) source(h hop) (*lab.Workload, string) {
	if h.told != nil {
		return h.told, identityOf(r.record("wp"))
	}
	w := r.record(h.src)
	if w == nil {
		return nil, ""
	}
	return w, identityOf(w)
}

// line is the hop's access line, as exactly writes it.
func (r *routing) line(h hop) string {
	direction := map[bool]string{true: "inbound", false: "outbound"}[h.inbound]
	src := lab.HostPort(h.from, 1)
	src = src[:len(src)-1] + "PORT"
	if h.early {
		return fmt.Sprintf("warn connection failed src.addr=%s dst.addr=%s direction=%q error=%q", src, h.at,
			direction, h.err)
	}
	var b strings.Builder
	level, sent, recv := "info", 0, 0
	if h.err != "" {
		level = "error"
	} else {
		sent, recv = len(payload), len(payload)+len(h.reply)
		if h.inbound {
			sent, recv = recv, sent
		}
	}
	fmt.Fprintf(&b, "%s connection complete", level)
	add := func(key, value string) {
		if value != "" {
			fmt.Fprintf(&b, " %s=%s", key, value)
		}
	}
	quoted := func(key, value string) {
		if value != "" {
			add(key, fmt.Sprintf("%q", value))
		}
	}
	party := func(side string, w *lab.Workload, id string) {
		if w != nil {
			quoted(side+".workload", w.Name)
			quoted(side+".namespace", w.Namespace)
			if h.hbone != "" {
				quoted(side+".identity", id)
			}
			quoted(side+".cluster", w.ClusterID)
		}
	}
	add("src.addr", src)
	source, id := r.source(h)
	party("src", source, id)
	add("dst.addr", h.at)
	add("dst.hbone_addr", h.hbone)
	if s := r.seenService(h); s != nil {
		quoted("dst.service", s.Hostname)
	}
	if w := r.record(h.dst); w != nil {
		party("dst", w, identityOf(w))
	}
	quoted("direction", direction)
	fmt.Fprintf(&b, ` bytes_sent=%d bytes_recv=%d duration=TIME`, sent, recv)
	quoted("error", h.err)
	return b.String()
}

var portEnd = regexp.MustCompile(`:\d+$`)
var durationValue = regexp.MustCompile(`^"\d+ms"$`)

// exactly is an access line without accidents: source ports and times.
func exactly(l accessLine) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s", l.level, l.message)
	for _, f := range l.fields {
		v := f.value
		switch f.key {
		case "src.addr":
			v = portEnd.ReplaceAllString(v, ":PORT")
		case "duration":
			v = durationValue.ReplaceAllString(v, "TIME")
		}
		fmt.Fprintf(&b, " %s=%s", f.key, v)
	}
	return b.String()
}

// labels are those of the hop's series, in order (spec 10.2).
func (r *routing) labels(h hop, flag string) string {
	var b strings.Builder
	add := func(name, value string) {
		if value == "" {
			value = "unknown"
		}
		fmt.Fprintf(&b, ",%s=%q", name, value)
	}
	fmt.Fprintf(&b, "reporter=%q", map[bool]string{true: "destination", false: "source"}[h.inbound])
	var none lab.Workload
	party := func(side string, w *lab.Workload, principal, app string) {
		add(side+"_workload", w.WorkloadName)
		add(side+"_canonical_service", w.CanonicalName)
		add(side+"_canonical_revision", w.CanonicalRevision)
		add(side+"_workload_namespace", w.Namespace)
		add(side+"_principal", principal)
		add(side+"_app", app)
		add(side+"_version", w.CanonicalRevision)
		add(side+"_cluster", w.ClusterID)
	}
	src, srcID := r.source(h)
	dst, dstID, security := r.record(h.dst), "", "unknown"
	if dst == nil {
		dst = &none
	} else {
		dstID = identityOf(dst)
	}
	if h.hbone != "" {
		security = "mutual_tls"
	} else {
		srcID = "" // only a certificate proves it
	}
	if src == nil {
		src = &none
	}
	app := src.CanonicalName
	if h.told != nil {
		app = src.WorkloadName
	}
	party("source", src, srcID, app)
	if s := r.seenService(h); s != nil {
		add("destination_service", s.Hostname)
		add("destination_service_namespace", s.Namespace)
		add("destination_service_name", s.Name)
	} else {
		add("destination_service", "")
		add("destination_service_namespace", "")
		add("destination_service_name", "")
	}
	party("destination", dst, dstID, dst.CanonicalName)
	add("request_protocol", "tcp")
	add("response_flags", flag)
	add("connection_security_policy", security)
	region := func(side string, w *lab.Workload) {
		l := w.Locality
		if l == nil {
			l = &lab.Locality{}
		}
		add(side+"_region", l.Region)
		add(side+"_zone", l.Zone)
	}
	region("source", src)
	region("destination", dst)
	return b.String()
}

// count adds the hop to what its node has to have counted.
func (r *routing) count(h hop, to map[string]float64) {
	if h.early {
		return
	}
	if h.lookup != "" {
		w := r.record(h.src)
		to[fmt.Sprintf(
			"istio_on_demand_dns_total{source_workload=%q,source_canonical_service=%q,source_canonical_revision=%q,source_workload_namespace=%q,source_principal=%q,source_app=%q,source_version=%q,source_cluster=%q,hostname=%q}",
			w.WorkloadName, w.CanonicalName, w.CanonicalRevision, w.Namespace, identityOf(w), w.CanonicalName,
			w.CanonicalRevision, w.ClusterID, h.lookup)]++
	}
	flag := h.flag
	if flag == "" {
		flag = "-"
	}
	add := func(name, flag string, n int) {
		if n > 0 {
			to[name+"{"+r.labels(h, flag)+"}"] += float64(n)
		}
	}
	add("istio_tcp_connections_opened_total", "-", 1)
	add("istio_tcp_connections_closed_total", flag, 1)
	if h.err != "" {
		add("istio_tcp_connections_failed_total", flag, 1)
		return
	}
	add("istio_tcp_received_bytes_total", "-", len(payload))
	add("istio_tcp_sent_bytes_total", "-", len(payload)+len(h.reply))
}

// series are the traffic counters of a node.
func (r *routing) series(n *lab.Node) map[string]float64 {
	r.t.Helper()
	m, err := n.Daemon.Metrics(r.ctx)
	must(r.t, err)
	out := map[string]float64{}
	for _, s := range m.Series {
		traffic := strings.HasPrefix(s.Name, "istio_tcp_") && s.Name != "istio_tcp_sockets_open" ||
			s.Name == "istio_on_demand_dns_total"
		if traffic && s.Value != 0 {
			out[s.String()] = s.Value
		}
	}
	return out
}

// lines are the access lines of a node since the last look, and where the log ends now.
func (r *routing) lines(t testing.TB, n *lab.Node) (lines []string, end int) {
	log := n.Daemon.Log()
	end = strings.LastIndexByte(log, '\n') + 1
	for _, l := range parseAccess(t, log[min(r.logs[n], end):end]) {
		lines = append(lines, exactly(l))
	}
	sort.Strings(lines)
	return lines, end
}

// expect waits until both nodes have said what the hops say, and nothing else.
func (r *routing) expect(t *testing.T, hops []hop) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for _, n := range r.Nodes() {
		var want []string
		series := maps.Clone(r.counted[n])
		for _, h := range hops {
			if h.node == n {
				want = append(want, r.line(h))
				r.count(h, series)
			}
		}
		sort.Strings(want)
		lines, end := r.lines(t, n)
		for len(lines) < len(want) && time.Now().Before(deadline) {
			time.Sleep(5 * time.Millisecond)
			lines, end = r.lines(t, n)
		}
		if !slices.Equal(lines, want) {
			t.Errorf("access log of %s:\n got %s\nwant %s", n.Name, strings.Join(lines, "\n     "),
				strings.Join(want, "\n     "))
		}
		got := r.series(n)
		for !maps.Equal(got, series) && time.Now().Before(deadline) {
			time.Sleep(5 * time.Millisecond)
			got = r.series(n)
		}
		for _, name := range slices.Sorted(maps.Keys(got)) {
			if got[name] != series[name] {
				t.Errorf("%s counts %v, want %v: %s", n.Name, got[name], series[name], name)
			}
		}
		for name, w := range series {
			if _, ok := got[name]; !ok {
				t.Errorf("%s does not count (want %v): %s", n.Name, w, name)
			}
		}
		r.logs[n], r.counted[n] = end, got
	}
}
