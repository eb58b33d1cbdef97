package admin

import (
	"bufio"
	"cmp"
	"encoding/json"
	"fmt"
	"iter"
	"maps"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Connection is one connection of a pod, live or ended, as `ztun connections`, `ztun flows` and their paths show it.
// Fields that are not known, or do not apply, are left out.
type Connection struct {
	Pod         string `json:"pod"`       // namespace/name
	Direction   string `json:"direction"` // outbound, inbound (over a tunnel) or passthrough (inbound plaintext)
	Protocol    string `json:"protocol"`  // HBONE, TCP or DOUBLEHBONE
	State       string `json:"state"`     // connecting, open or ended
	Source      Side   `json:"source"`
	Destination Side   `json:"destination"`
	// what the source called, where that is not the destination's address
	Called    netip.AddrPort `json:"called,omitzero"`
	Service   string         `json:"service,omitempty"`
	Authority string         `json:"authority,omitempty"` // of the CONNECT
	Tunnel    Tunnel         `json:"tunnel,omitzero"`
	Memory    bool           `json:"memory,omitempty"` // it stood without a tunnel: both pods are of this daemon
	Sent      uint64         `json:"bytesSent"`        // as in the access log
	Received  uint64         `json:"bytesReceived"`
	Start     time.Time      `json:"start"`
	End       time.Time      `json:"end,omitzero"`

	// Of ended ones.
	Outcome string `json:"outcome,omitempty"` // success, denied, failed or cut
	Reason  string `json:"reason,omitempty"`
	Flag    string `json:"flag,omitempty"` // response_flags of the metrics
}

// Side is one end of a connection.
type Side struct {
	Address   netip.AddrPort `json:"address"`
	Workload  string         `json:"workload,omitempty"`
	Namespace string         `json:"namespace,omitempty"`
	Identity  string         `json:"identity,omitempty"` // of the tunnel's certificate
	Cluster   string         `json:"cluster,omitempty"`
}

// Tunnel is the TCP connection between nodes that carries a connection.
type Tunnel struct {
	Local  netip.AddrPort `json:"local"`
	Remote netip.AddrPort `json:"remote"`
}

// Peer is the side that is not the pod.
func (c *Connection) Peer() *Side {
	if c.Direction == "outbound" {
		return &c.Destination
	}
	return &c.Source
}

// Age is how long the connection has lasted by now, or lasted.
func (c *Connection) Age(now time.Time) time.Duration {
	if !c.End.IsZero() {
		now = c.End
	}
	return now.Sub(c.Start)
}

// ConnectionSource yields the connections of all pods, in any order: what is open, and as much as is remembered of
// what has ended. They are called once per request; nil yields nothing.
type ConnectionSource struct{ Live, Ended iter.Seq[Connection] }

// ConnectionQuery says which connections are asked for; the zero one: the newest ones.
type ConnectionQuery struct {
	Pod       string    // name or namespace/name
	Peer      string    // address, prefix, or a part of workload, namespace/workload, service or identity
	Direction string    // outbound, inbound or passthrough
	Outcome   string    // of ended ones: success, denied, failed, cut, or bad for all but success
	Since     time.Time // ended later than that
	// age (youngest first), bytes, sent, received (most first), pod or peer; of ended ones age is that of the end
	Sort  string
	Limit int // 0: 1,000
}

// Bounds of an answer, in connections.
const (
	defaultConnections = 1000
	maxConnections     = 5000
)

// Connections is an answer: the first Limit of Total that fit.
type Connections struct {
	Connections []Connection `json:"connections"`
	Total       int          `json:"total"`
}

var connectionOrders = map[string]func(a, b *Connection) int{
	"age": func(a, b *Connection) int {
		if c := b.End.Compare(a.End); c != 0 {
			return c
		}
		return b.Start.Compare(a.Start)
	},
	"bytes":    func(a, b *Connection) int { return cmp.Compare(b.Sent+b.Received, a.Sent+a.Received) },
	"sent":     func(a, b *Connection) int { return cmp.Compare(b.Sent, a.Sent) },
	"received": func(a, b *Connection) int { return cmp.Compare(b.Received, a.Received) },
	"pod":      func(a, b *Connection) int { return strings.Compare(a.Pod, b.Pod) },
	"peer": func(a, b *Connection) int {
		x, y := a.Peer(), b.Peer()
		return cmp.Or(strings.Compare(x.Namespace, y.Namespace), strings.Compare(x.Workload, y.Workload),
			x.Address.Compare(y.Address))
	},
}

var (
	connectionOutcomes   = []string{"success", "denied", "failed", "cut", "bad"}
	connectionDirections = []string{"outbound", "inbound", "passthrough"}
)

// Validate says what a query asks for that there is not.
func (q *ConnectionQuery) Validate() error {
	choose := func(what, v string, from []string) error {
		if v == "" || slices.Contains(from, v) {
			return nil
		}
		return fmt.Errorf("%w: %s %q: choose %s", ErrPodInvalid, what, clip(v, 64), strings.Join(from, ", "))
	}
	if q.Limit < 0 || q.Limit > maxConnections {
		return fmt.Errorf("%w: limit %d is not between 1 and %d", ErrPodInvalid, q.Limit, maxConnections)
	}
	return cmp.Or(choose("sort", q.Sort, slices.Sorted(maps.Keys(connectionOrders))),
		choose("outcome", q.Outcome, connectionOutcomes), choose("direction", q.Direction, connectionDirections))
}

// values is the query as a URL has it; connectionQuery reads it.
func (q *ConnectionQuery) values() url.Values {
	v := url.Values{}
	for _, f := range q.fields() {
		if *f.text != "" {
			v.Set(f.name, *f.text)
		}
	}
	if q.Limit != 0 {
		v.Set("limit", strconv.Itoa(q.Limit))
	}
	if !q.Since.IsZero() {
		v.Set("since", q.Since.UTC().Format(time.RFC3339Nano))
	}
	return v
}

type queryField struct {
	name string
	text *string
}

func (q *ConnectionQuery) fields() []queryField {
	return []queryField{{"pod", &q.Pod}, {"peer", &q.Peer}, {"direction", &q.Direction}, {"outcome", &q.Outcome},
		{"sort", &q.Sort}}
}

func connectionQuery(v url.Values) (q ConnectionQuery, err error) {
	fields := q.fields()
	for name, values := range v {
		value := values[len(values)-1]
		i := slices.IndexFunc(fields, func(f queryField) bool { return f.name == name })
		switch {
		case i >= 0:
			*fields[i].text = value
		case name == "limit":
			if q.Limit, err = strconv.Atoi(value); err != nil {
				return q, fmt.Errorf("%w: limit %q is no number", ErrPodInvalid, clip(value, 64))
			}
		case name == "since":
			if q.Since, err = time.Parse(time.RFC3339Nano, value); err != nil {
				return q, fmt.Errorf("%w: since %q is no time like 2006-01-02T15:04:05Z", ErrPodInvalid, clip(value, 64))
			}
		default:
			return q, fmt.Errorf("%w: %q is nothing to ask for: there are pod, peer, direction, outcome, since, sort and limit",
				ErrPodInvalid, clip(name, 64))
		}
	}
	return q, q.Validate()
}

// matcher is the query, read once.
func (q *ConnectionQuery) matcher() func(*Connection) bool {
	prefix, perr := netip.ParsePrefix(q.Peer)
	addr, aerr := netip.ParseAddr(q.Peer)
	at, terr := netip.ParseAddrPort(q.Peer)
	peer := func(c *Connection) bool {
		p := c.Peer()
		switch {
		case q.Peer == "":
			return true
		case perr == nil:
			return prefix.Contains(p.Address.Addr()) || prefix.Contains(c.Called.Addr())
		case aerr == nil:
			return p.Address.Addr() == addr.Unmap() || c.Called.Addr() == addr.Unmap()
		case terr == nil:
			return p.Address == at || c.Called == at
		}
		return strings.Contains(p.Namespace+"/"+p.Workload, q.Peer) || strings.Contains(p.Identity, q.Peer) ||
			strings.Contains(c.Service, q.Peer)
	}
	return func(c *Connection) bool {
		return (q.Pod == "" || c.Pod == q.Pod || strings.HasSuffix(c.Pod, "/"+q.Pod)) &&
			(q.Direction == "" || c.Direction == q.Direction) &&
			(q.Outcome == "" || c.Outcome == q.Outcome || q.Outcome == "bad" && c.Outcome != "success" && c.Outcome != "") &&
			(q.Since.IsZero() || c.End.After(q.Since)) && peer(c)
	}
}

// Select answers a query of what is live, or of what has ended. It holds no more than twice what the answer does.
func (s ConnectionSource) Select(ended bool, q ConnectionQuery) Connections {
	return s.walk(ended, q, func(*Connection) {})
}

// walk is Select that shows each connection on its way, whether the query names it or not.
func (s ConnectionSource) walk(ended bool, q ConnectionQuery, each func(*Connection)) Connections {
	from := s.Live
	if ended {
		from = s.Ended
	}
	out := Connections{Connections: []Connection{}}
	if from == nil {
		return out
	}
	limit, match := cmp.Or(q.Limit, defaultConnections), q.matcher()
	byAge := connectionOrders["age"]
	order := connectionOrders[cmp.Or(q.Sort, "age")]
	cut := func() {
		slices.SortFunc(out.Connections, func(a, b Connection) int { return cmp.Or(order(&a, &b), byAge(&a, &b)) })
		if len(out.Connections) > limit {
			clear(out.Connections[limit:])
			out.Connections = out.Connections[:limit]
		}
	}
	var breath breather
	n := 0
	for c := range from {
		if n++; n%64 == 0 {
			breath.breathe()
		}
		if each(&c); !match(&c) {
			continue
		}
		out.Total++
		if out.Connections = append(out.Connections, c); len(out.Connections) >= 2*limit {
			cut()
		}
	}
	cut()
	return out
}

// write streams an answer, a line for each connection.
func (l Connections) write(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/json")
	out := bufio.NewWriterSize(w, 16<<10)
	e := json.NewEncoder(out)
	e.SetEscapeHTML(false)
	var breath breather
	out.WriteString("{\"connections\":[\n")
	for i := range l.Connections {
		if i > 0 {
			out.WriteByte(',')
		}
		if e.Encode(&l.Connections[i]) != nil {
			return // the reader has left
		}
		breath.breathe()
	}
	fmt.Fprintf(out, "],\"total\":%d}\n", l.Total)
	out.Flush()
}

// Paths of the admin server (15000), for reading only.
const (
	connectionsPage = "/ztun/connections"
	flowsPage       = "/ztun/flows"
)

// handler answers GET with the connections that the query names.
func (s ConnectionSource) handler(ended bool) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			plain(w, http.StatusMethodNotAllowed, "use GET\n")
			return
		}
		q, err := connectionQuery(r.URL.Query())
		if err != nil {
			plain(w, http.StatusBadRequest, err.Error()+"\n")
			return
		}
		s.Select(ended, q).write(w)
	}
}
