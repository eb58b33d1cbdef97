package admin

import (
	"cmp"
	_ "embed"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"ztun/admin/page"
)

// Overview is what the page at / shows of the daemon, of one moment, beside what the other options of the admin
// server have.
type Overview struct {
	Node, Version string
	Started       time.Time
	Source        string // where workloads come from, in words: a control plane's address, or a file's path
	File          bool   // it is a file's
	Connected     bool   // to the control plane; false with a file
	Rejected      int    // resources of the control plane whose newest version is refused

	Workloads, Services, Policies int // of the mesh, as known here

	Pods         []OverviewPod
	Certificates []OverviewCertificate
	Rules        []OverviewPolicy // of the mesh, at most OverviewLimit
	Missing      []OverviewMissing

	Memory, MemoryBudget int64 // bytes that lie here for the pods' connections, and that may
}

// OverviewPod is a pod with what its data plane counts.
type OverviewPod struct {
	PodStatus
	Tunnels, Streams int
	DialFailures     uint64
	Memory           int64 // bytes that lie here for its connections
}

// OverviewCertificate is the certificate of an identity; State as in /config_dump.
type OverviewCertificate struct {
	Identity, State string
	From, Until     time.Time // zero where there is none
}

// OverviewPolicy is an authorization policy.
type OverviewPolicy struct {
	Namespace, Name, Scope, Action string
	DryRun                         bool
	Rules                          int
}

// OverviewMissing is a policy that a workload lists and that is not loaded.
type OverviewMissing struct {
	Policy, Workload, Decision string
	Since                      time.Time
}

// What the page shows of each list; the rest is counted, and in /config_dump and on the command line.
const (
	OverviewLimit   = 200
	overviewFlows   = 50
	overviewRefused = 25
	overviewTunnels = 25
)

//go:embed overview.html
var overviewPage string

// overview makes the page at /.
func overview(o *AdminOptions, extra []string) (http.Handler, error) {
	return page.New(overviewPage, func() any { return overviewOf(o, extra) })
}

// nodePage is what the template sees.
type nodePage struct {
	Overview
	Pending  []PendingTask
	Rates    Rates
	Live     Connections
	Refused  Connections
	Tunnels  []tunnelRow
	Carriers int // tunnels that carry something
	First    OverviewCertificate
	Up       int // pods

	HiddenPods, HiddenCertificates, HiddenRules int

	Levels   string // of the log; "" where it cannot be changed here
	Token    bool   // changes need one
	Commands []command
	Now      time.Time
}

// tunnelRow is a connection between nodes and what it carries.
type tunnelRow struct {
	Tunnel
	Pod, Direction, Identity string
	Connections              int
	Bytes                    uint64
}

// command is a line of ztunnel's own page; what wants POST is a form.
type command struct {
	Link, Query   string // Query is what the link needs to be answered
	Text, Confirm string
	Post          bool
	Class         string // of its row: they alternate, as ztunnel's
}

func overviewOf(o *AdminOptions, extra []string) nodePage {
	p := nodePage{Now: time.Now(), Token: o.Token != "", Rates: o.Meter.Rates(), Commands: commands(extra)}
	if o.Overview != nil {
		p.Overview = o.Overview()
	}
	if o.Ready != nil {
		p.Pending = o.Ready.Pending()
	}
	if o.Logging != nil {
		p.Levels = o.Logging.Filter()
	}
	carry := carriers{}
	p.Live = o.Connections.walk(false, ConnectionQuery{Limit: overviewFlows}, carry.add)
	p.Tunnels, p.Carriers = carry.busiest(overviewTunnels)
	p.Refused = o.Connections.Select(true, ConnectionQuery{Outcome: "bad", Limit: overviewRefused})
	for _, c := range p.Certificates {
		if !c.Until.IsZero() && (p.First.Until.IsZero() || c.Until.Before(p.First.Until)) {
			p.First = c
		}
	}
	for _, pod := range p.Pods {
		if pod.State == "Up" {
			p.Up++
		}
	}
	slices.SortFunc(p.Pods, func(a, b OverviewPod) int {
		return cmp.Or(cmp.Compare(podRank(a.State), podRank(b.State)),
			strings.Compare(a.Namespace+"/"+a.Name, b.Namespace+"/"+b.Name))
	})
	p.Pods, p.HiddenPods = head(p.Pods)
	p.Certificates, p.HiddenCertificates = head(p.Certificates)
	p.Overview.Rules, p.HiddenRules = p.Overview.Rules[:min(len(p.Overview.Rules), OverviewLimit)],
		max(0, p.Policies-min(len(p.Overview.Rules), OverviewLimit))
	return p
}

// podRank puts what is in trouble first.
func podRank(state string) int { return strings.Index("Failed Pending Stopping Up", state) }

func head[T any](all []T) ([]T, int) {
	n := min(len(all), OverviewLimit)
	return all[:n], len(all) - n
}

// carriers are tunnels that carry something.
type carriers map[Tunnel]*tunnelRow

func (all carriers) add(c *Connection) {
	if c.Tunnel.Remote == (netip.AddrPort{}) {
		return
	}
	r := all[c.Tunnel]
	if r == nil {
		r = &tunnelRow{Tunnel: c.Tunnel, Pod: c.Pod, Direction: c.Direction, Identity: c.Peer().Identity}
		all[c.Tunnel] = r
	}
	r.Connections++
	r.Bytes += c.Sent + c.Received
}

// busiest are limit of them, the busiest first, and how many there are.
func (all carriers) busiest(limit int) ([]tunnelRow, int) {
	rows := make([]tunnelRow, 0, len(all))
	for r := range maps.Values(all) {
		rows = append(rows, *r)
	}
	slices.SortFunc(rows, func(a, b tunnelRow) int {
		return cmp.Or(cmp.Compare(b.Connections, a.Connections), cmp.Compare(b.Bytes, a.Bytes), a.Remote.Compare(b.Remote),
			a.Local.Compare(b.Local))
	})
	return rows[:min(limit, len(rows))], len(rows)
}

// commands is ztunnel's table of links, in its order, and then our own.
func commands(extra []string) []command {
	rows := []command{
		{Link: "debug/pprof/profile", Text: "build a CPU profile in pprof's format (query: seconds, frequency)"},
		{Link: "debug/pprof/heap", Text: "collect heap profiling data in pprof's format"},
		{Link: "debug/pprof/heap/profiling", Query: "?activate=true",
			Text: "show whether heap profiling is active (query: activate)"},
		{Link: "quitquitquit", Text: "shut the process down", Post: true,
			Confirm: "Shut ztun down on this node? Its pods lose their network until it runs again."},
		{Link: "config_dump", Text: "dump the current configuration and state"},
		{Link: "logging", Text: "show the logging levels", Post: true},
		{Link: "debug/pprof/", Text: "all profiles of the Go runtime"},
		{Link: "ztun/connections", Text: "live connections of the pods (query: pod, peer, direction, sort, limit)"},
		{Link: "ztun/flows", Text: "connections that have ended, with outcome and reason (query: outcome, since as well)"},
	}
	for _, p := range extra {
		rows = append(rows, command{Link: strings.TrimPrefix(p, "/"), Text: "addition of ztun"})
	}
	for i := range rows {
		rows[i].Class = [...]string{"vert-space", "gray"}[i%2]
	}
	return rows
}

// The rest is what the template asks of its data.

// LastOut, LastIn and LastBytes are the newest rates.
func (r Rates) LastOut() float64   { return lastOf(r.Out) }
func (r Rates) LastIn() float64    { return lastOf(r.In) }
func (r Rates) LastBytes() float64 { return lastOf(r.Bytes) }

// Connections are the rates of both directions together.
func (r Rates) Connections() []float64 {
	sum := slices.Clone(r.Out)
	for i := range sum {
		sum[i] += r.In[i]
	}
	return sum
}

func lastOf(values []float64) float64 {
	if len(values) == 0 {
		return 0
	}
	return values[len(values)-1]
}

// Name is who a side is, as far as it is known.
func (s Side) Name() string {
	switch {
	case s.Workload != "" && s.Namespace != "":
		return s.Namespace + "/" + s.Workload
	case s.Workload != "":
		return s.Workload
	}
	return s.Address.String()
}

// Target is what was called: the service if one was.
func (c Connection) Target() string { return cmp.Or(c.Service, c.Destination.Name()) }

// Left is the share of a certificate's time that is left: 0 when it has ended.
func (c OverviewCertificate) Left() float64 {
	if whole := c.Until.Sub(c.From); whole > 0 {
		return max(0, float64(time.Until(c.Until))/float64(whole))
	}
	return 0
}
