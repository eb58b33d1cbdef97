package control

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"text/tabwriter"
	"time"

	"ztun/admin/words"
)

// Status is what a control plane knows of itself and its nodes.
type Status struct {
	Now         time.Time         `json:"now"`
	Listen      []string          `json:"listen"`
	Snapshot    SnapshotStatus    `json:"snapshot"`
	Certificate CertificateStatus `json:"certificate"`
	Revoked     RevocationStatus  `json:"revoked"`
	Nodes       []NodeStatus      `json:"nodes"`
	// nodes that workloads name and that have no credentials; at most 100
	NotJoined []string          `json:"notJoined,omitempty"`
	Problems  []Problem         `json:"problems,omitempty"` // with the nodes' credentials
	Counters  map[string]uint64 `json:"counters"`           // since the start; bounded.*: what each bound turned away
}

// SnapshotStatus is what is published and how the last load of the directory went.
type SnapshotStatus struct {
	Version      uint64    `json:"version"` // counts what was published by this process; 0: nothing yet
	PublishedAt  time.Time `json:"publishedAt,omitzero"`
	Files        int       `json:"files"`
	Workloads    int       `json:"workloads"`
	Services     int       `json:"services"`
	Policies     int       `json:"policies"`
	LoadedAt     time.Time `json:"loadedAt,omitzero"` // the last load, good or bad
	LoadSeconds  float64   `json:"loadSeconds"`
	FailedSince  time.Time `json:"failedSince,omitzero"` // the directory is bad since; what is published is older
	ErrorCount   int       `json:"errorCount"`
	Errors       []Problem `json:"errors,omitempty"` // at most 100
	WarningCount int       `json:"warningCount"`
	Warnings     []Problem `json:"warnings,omitempty"` // at most 100

	directory []Problem // those of the directory itself
}

func (st *SnapshotStatus) fill(s *snapshot) {
	if s == nil {
		return
	}
	st.Version, st.PublishedAt = s.version, s.published.UTC()
	st.Workloads, st.Services, st.Policies = s.workloads, s.services, s.policies.count
}

// CertificateStatus is the server's own certificate.
type CertificateStatus struct {
	Names    []string  `json:"names"`
	NotAfter time.Time `json:"notAfter"`
	Error    string    `json:"error,omitempty"` // of the last attempt to renew it
}

// NodeStatus is a stream of a node, or a node that has joined and has none.
type NodeStatus struct {
	Node      string       `json:"node"`
	Connected bool         `json:"connected"`
	Since     time.Time    `json:"since,omitzero"`
	Peer      string       `json:"peer,omitempty"`
	Auth      string       `json:"auth,omitempty"` // token, certificate
	Identity  string       `json:"identity,omitempty"`
	ID        string       `json:"id,omitempty"` // as the node names itself
	Types     []TypeStatus `json:"types,omitempty"`
	Pods      int          `json:"pods"`               // workloads that are published for it
	PodNames  []string     `json:"podNames,omitempty"` // namespace/name, at most 30 of them
	// CertificateNotAfter is the end of the client certificate that it has from join, or from renewing that.
	CertificateNotAfter time.Time `json:"certificateNotAfter,omitzero"`
	// why what it showed does not count; its token does
	CertificateProblem string `json:"certificateProblem,omitempty"`
}

// TypeStatus is one type on a stream. Versions are those of snapshots.
type TypeStatus struct {
	Type         string    `json:"type"`
	OnDemand     bool      `json:"onDemand,omitempty"`
	Names        int       `json:"names,omitempty"` // subscribed to by name
	SentNonce    string    `json:"sentNonce,omitempty"`
	SentVersion  uint64    `json:"sentVersion"`
	SentAt       time.Time `json:"sentAt,omitzero"`
	Waiting      bool      `json:"waiting"` // for the reply to it
	AckedNonce   string    `json:"ackedNonce,omitempty"`
	AckedVersion uint64    `json:"ackedVersion"`
	RepliedAt    time.Time `json:"repliedAt,omitzero"`
	Synced       uint64    `json:"synced"` // the newest version that the node has been sent entirely and has replied to
	Lag          uint64    `json:"lag"`    // versions that it is behind
	LagSeconds   float64   `json:"lagSeconds"`
	Messages     uint64    `json:"messages"`
	Resources    uint64    `json:"resources"`
	Removed      uint64    `json:"removed"`
	ACKs         uint64    `json:"acks"`
	NACKs        uint64    `json:"nacks"`
	Stale        uint64    `json:"stale"` // replies with another nonce than the last
	LastNACK     string    `json:"lastNack,omitempty"`
	LastNACKAt   time.Time `json:"lastNackAt,omitzero"`
	Rejecting    bool      `json:"rejecting,omitempty"` // the last reply was a NACK

	url string
}

// typeName is the last part of a type URL.
func typeName(url string) string { return clip(url[strings.LastIndexAny(url, "./")+1:], 100) }

func (d *subscription) status() TypeStatus {
	c := &d.stats
	t := TypeStatus{
		Type: typeName(d.typeURL), OnDemand: !d.wildcard, Names: len(d.names), url: d.typeURL,
		SentAt: c.lastSent.UTC(), Waiting: d.flight != nil, RepliedAt: c.lastReply.UTC(), Synced: c.synced,
		Messages: c.messages, Resources: c.resources, Removed: c.removed,
		ACKs: c.acks, NACKs: c.nacks, Stale: c.stale, LastNACK: c.lastNACK, LastNACKAt: c.lastNACKAt.UTC(),
	}
	if c.sent != nil {
		t.SentNonce, t.SentVersion = c.sent.nonce, c.sent.version
	}
	if c.acked != nil {
		t.AckedNonce, t.AckedVersion = c.acked.nonce, c.acked.version
	}
	t.Rejecting = c.nacks > 0 && c.lastReply.Equal(c.lastNACKAt)
	return t
}

func (st *stream) status(now time.Time, version uint64) NodeStatus {
	st.mu.Lock()
	defer st.mu.Unlock()
	n := NodeStatus{
		Node: st.caller.node, Connected: true, Since: st.since.UTC(), Peer: st.remote, Auth: st.caller.how,
		Identity: nodeIdentity(st.authority.TrustDomain()).String(), ID: st.nodeID, Types: slices.Clone(st.shown),
	}
	if snap := st.feed.get(); st.caller.workload != "" && snap != nil {
		n.Identity = ""
		if id, ok := snap.identityOf(st.caller.workload); ok {
			n.Identity = id.String()
		}
	}
	if err := st.caller.certErr; err != nil {
		n.CertificateProblem = err.Error()
	}
	for i := range n.Types {
		t := &n.Types[i]
		t.Lag = version - min(version, t.Synced)
		if since, ok := st.behind[t.url]; ok && t.Lag > 0 {
			t.LagSeconds = now.Sub(since).Seconds()
		}
	}
	return n
}

// counters are totals since the start.
type counters struct {
	connections, connectionsRefused   atomic.Uint64
	unauthenticated, denied           atomic.Uint64
	streams, streamsRefused, requests atomic.Uint64
	messages, resources               atomic.Uint64
	acks, nacks, stale                atomic.Uint64
	signed, signRefused, signLimited  atomic.Uint64
}

func (c *counters) values() map[string]uint64 {
	return map[string]uint64{
		"connections": c.connections.Load(), "connectionsRefused": c.connectionsRefused.Load(),
		"unauthenticated": c.unauthenticated.Load(), "denied": c.denied.Load(),
		"streams": c.streams.Load(), "streamsRefused": c.streamsRefused.Load(), "requests": c.requests.Load(),
		"messages": c.messages.Load(), "resources": c.resources.Load(),
		"acks": c.acks.Load(), "nacks": c.nacks.Load(), "stale": c.stale.Load(),
		"signed": c.signed.Load(), "signRefused": c.signRefused.Load(), "signLimited": c.signLimited.Load(),
	}
}

// Status says how things are.
func (s *Server) Status() Status {
	now := time.Now()
	out := Status{Now: now.UTC(), Snapshot: s.source.snapshotStatus(), Counters: s.counters.values(),
		Nodes: []NodeStatus{}}
	for _, l := range s.listeners {
		out.Listen = append(out.Listen, l.Addr().String())
	}
	if c := s.cert.current.Load(); c != nil {
		out.Certificate = CertificateStatus{Names: c.names, NotAfter: c.cert.Leaf.NotAfter.UTC()}
		if c.err != nil {
			out.Certificate.Error = c.err.Error()
		}
	}
	connected := make(map[string]bool)
	for _, st := range s.open() {
		out.Nodes = append(out.Nodes, st.status(now, out.Snapshot.Version))
		connected[st.caller.node] = true
	}
	joined, problems := s.nodes.joined()
	out.Problems = problems
	expires, workload := make(map[string]time.Time, len(joined)), map[string]string{}
	for _, f := range joined {
		expires[f.Node], workload[f.Node] = f.Expires.UTC(), f.Workload
		if !connected[f.Node] {
			out.Nodes = append(out.Nodes, NodeStatus{Node: f.Node})
		}
	}
	for i := range out.Nodes {
		out.Nodes[i].CertificateNotAfter = expires[out.Nodes[i].Node]
	}
	for _, c := range s.report.Counts() {
		out.Counters["bounded."+c.Resource+".evicted"] = c.Evicted
		out.Counters["bounded."+c.Resource+".refused"] = c.Refused
	}
	out.Revoked = s.issued.status()
	if snap := s.feed.get(); snap != nil {
		for i := range out.Nodes {
			out.Nodes[i].place(snap.own(out.Nodes[i].Node, workload[out.Nodes[i].Node]))
		}
		for name, n := range snap.nodes {
			// Workloads that have joined by themselves need no node that serves them.
			alone := !slices.ContainsFunc(n.workloads, func(r *resource) bool {
				_, ok := expires[workloadMember(r.workload)]
				return !ok
			})
			if _, ok := expires[name]; !ok && !alone {
				out.NotJoined = append(out.NotJoined, name)
			}
		}
		slices.Sort(out.NotJoined)
		out.NotJoined = out.NotJoined[:min(len(out.NotJoined), maxReported)]
	}
	slices.SortFunc(out.Nodes, func(a, b NodeStatus) int {
		return cmp.Or(cmp.Compare(a.Node, b.Node), a.Since.Compare(b.Since))
	})
	return out
}

// place enters what runs on a node.
func (n *NodeStatus) place(on []*resource) {
	n.Pods = len(on)
	for _, r := range on[:min(n.Pods, pagePods)] {
		n.PodNames = append(n.PodNames, r.workload.Namespace+"/"+r.workload.Name)
	}
	slices.Sort(n.PodNames)
}

// handler serves the status, on the socket and on the admin address: JSON, metrics, and a page for people.
func (s *Server) handler(page http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		_ = e.Encode(s.Status()) // the reader has gone
	})
	mux.HandleFunc("GET /healthz/ready", func(w http.ResponseWriter, _ *http.Request) {
		if s.feed.get() == nil {
			http.Error(w, "nothing is published yet: see /status", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ready")
	})
	mux.Handle("GET /metrics", s.metrics())
	mux.Handle("GET /{$}", page)
	return helpful(mux)
}

// helpful answers what the mux has no handler for in a line that says what there is: 405 where the path is known for
// GET, else 404.
func helpful(mux *http.ServeMux) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, pattern := mux.Handler(r); pattern != "" {
			mux.ServeHTTP(w, r)
			return
		}
		get := r.Clone(r.Context())
		get.Method = http.MethodGet
		if _, pattern := mux.Handler(get); pattern != "" {
			w.Header().Set("Allow", "GET, HEAD")
			http.Error(w, "this path wants GET", http.StatusMethodNotAllowed)
			return
		}
		http.Error(w, "no such path here; paths: / /status /metrics /healthz/ready", http.StatusNotFound)
	})
}

// maxStatus bounds what FetchStatus reads. Bytes.
const maxStatus = 64 << 20

// FetchStatus asks a running control plane through its socket.
func FetchStatus(ctx context.Context, socket string) (*Status, error) {
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://control/status", nil)
	if err != nil {
		return nil, err
	}
	resp, err := (&http.Client{Transport: tr, Timeout: 10 * time.Second}).Do(req)
	if err != nil {
		return nil, fmt.Errorf("no control plane answers at %s (is ztun control running, with this --dir?): %w", socket,
			errors.Unwrap(err))
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", socket, resp.Status)
	}
	st := &Status{}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxStatus)).Decode(st); err != nil {
		return nil, fmt.Errorf("%s: not a status: %w", socket, err)
	}
	return st, nil
}

// WriteTable prints a status for people.
func (st *Status) WriteTable(out io.Writer) error {
	w := &errWriter{w: out}
	st.Snapshot.write(w, st.Now)
	if e := st.Certificate.Error; e != "" {
		fmt.Fprintf(w, "server certificate: valid until %s, cannot be renewed: %s\n", stampText(st.Certificate.NotAfter),
			words.Printable(e))
	}
	for _, p := range st.Problems {
		fmt.Fprintf(w, "credentials: %s\n", words.Printable(p.String()))
	}
	if len(st.NotJoined) > 0 {
		fmt.Fprintf(w, "not joined, and named by workloads: %s\n", words.Printable(strings.Join(st.NotJoined, ", ")))
	}
	if n := st.Revoked.Certificates; n > 0 {
		fmt.Fprintf(w, "revoked: %d certificates of nodes that have left\n", n)
	}
	if st.Revoked.Problem != "" {
		fmt.Fprintf(w, "revocation: %s\n", words.Printable(st.Revoked.Problem))
	}
	fmt.Fprintln(w)
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "NODE\tSINCE\tPEER\tAUTH\tCERT\tTYPE\tSENT\tACKED\tSTATE\tLAG\tNACKS")
	for _, n := range st.Nodes {
		if len(n.Types) == 0 {
			state := "not connected"
			since := "-"
			if n.Connected {
				state, since = "no request yet", age(st.Now, n.Since)
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t-\t-\t-\t%s\t-\t-\n", words.Printable(n.Node), since, cmp.Or(n.Peer, "-"),
				cmp.Or(n.Auth, "-"),
				n.certificateLeft(st.Now), state)
		}
		for _, y := range n.Types {
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%d\n", words.Printable(n.Node),
				age(st.Now, n.Since), n.Peer,
				n.Auth, n.certificateLeft(st.Now),
				words.Printable(y.Type), cmp.Or(y.SentNonce, "-"), cmp.Or(y.AckedNonce, "-"), y.state(), y.lagText(), y.NACKs)
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	said := make(map[string]bool) // nodes may have several streams
	for _, n := range st.Nodes {
		if text := n.certificateText(st.Now); text != "" && !said[n.Node] {
			said[n.Node] = true
			fmt.Fprintf(w, "\n%s: %s\n", words.Printable(n.Node), words.Printable(text))
		}
	}
	for _, n := range st.Nodes {
		for _, y := range n.Types {
			if y.LastNACK != "" {
				fmt.Fprintf(w, "\n%s rejected %s %s ago: %s\n", words.Printable(n.Node), words.Printable(y.Type),
					age(st.Now, y.LastNACKAt), words.Printable(y.LastNACK))
			}
		}
	}
	return w.err
}

// expiresSoon is when people are told: a daemon that runs has renewed its certificate long before.
const expiresSoon = 30 * 24 * time.Hour

// certificateLeft is what is left of the life of a node's client certificate.
func (n *NodeStatus) certificateLeft(now time.Time) string {
	left := n.CertificateNotAfter.Sub(now)
	switch {
	case n.CertificateNotAfter.IsZero():
		return "-"
	case left <= 0:
		return "expired"
	}
	return words.Span(left)
}

// certificateText says what is to be known of a node's client certificate; "": nothing.
func (n *NodeStatus) certificateText(now time.Time) string {
	left := n.CertificateNotAfter.Sub(now)
	switch {
	case n.CertificateNotAfter.IsZero():
		return ""
	case left <= 0:
		return fmt.Sprintf("its client certificate expired at %s: it needs its token, or ztun control join --renew",
			stampText(n.CertificateNotAfter))
	case n.CertificateProblem != "":
		return "the client certificate that it shows does not count, its token does: " + n.CertificateProblem
	case left < expiresSoon:
		return fmt.Sprintf("its client certificate expires at %s, in %s", stampText(n.CertificateNotAfter),
			words.Span(left))
	}
	return ""
}

func (s *SnapshotStatus) write(w io.Writer, now time.Time) {
	if s.Version == 0 {
		fmt.Fprintln(w, "nothing is published yet")
	} else {
		fmt.Fprintf(w, "version %d, published %s ago: %d files, %d workloads, %d services, %d policies\n",
			s.Version, age(now, s.PublishedAt), s.Files, s.Workloads, s.Services, s.Policies)
	}
	if s.ErrorCount > 0 {
		fmt.Fprintf(w, "NOT UP TO DATE: the directory cannot be published since %s, %d errors:\n", age(now, s.FailedSince),
			s.ErrorCount)
		WriteProblems(w, s.Errors, s.ErrorCount)
	}
	if s.WarningCount > 0 {
		fmt.Fprintf(w, "%d warnings:\n", s.WarningCount)
		WriteProblems(w, s.Warnings, s.WarningCount)
	}
}

// WriteProblems prints a list of which there may be more, count in all.
func WriteProblems(w io.Writer, list []Problem, count int) {
	for _, p := range list {
		fmt.Fprintf(w, "  %s\n", words.Printable(p.String()))
	}
	if more := count - len(list); more > 0 {
		fmt.Fprintf(w, "  ... and %d more\n", more)
	}
}

func (y *TypeStatus) state() string {
	switch {
	case y.Rejecting:
		return "rejects"
	case y.SentNonce == "":
		return "nothing sent yet"
	case y.Lag == 0 && !y.Waiting:
		return "in sync"
	case y.Waiting:
		return "waiting for reply"
	}
	return "behind"
}

func (y *TypeStatus) lagText() string {
	if y.Lag == 0 {
		return "-"
	}
	return fmt.Sprintf("%d (%s)", y.Lag, words.Span(time.Duration(y.LagSeconds*float64(time.Second))))
}

func age(now, then time.Time) string { return words.Span(now.Sub(then)) }

func stampText(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// errWriter remembers the first error.
type errWriter struct {
	w   io.Writer
	err error
}

func (w *errWriter) Write(b []byte) (int, error) {
	if w.err != nil {
		return 0, w.err
	}
	n, err := w.w.Write(b)
	w.err = err
	return n, err
}
