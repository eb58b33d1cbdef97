package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"time"

	"github.com/miekg/dns"

	"ztun/proxy/state"
)

// query is one message on its way through the server.
type query struct {
	raw   []byte
	tcp   bool
	asked netip.AddrPort // zero: the configured nameservers are to be asked

	msg    *dns.Msg
	client *state.Workload // nil: not known
	series *series
}

func (q *query) protocol() string {
	if q.tcp {
		return "tcp"
	}
	return "udp"
}

// relay asks upstream: the raw reply, or why there is none.
type relay func(ctx context.Context, q *query) ([]byte, error)

// serve makes the reply to a message; nil means silence. It never panics or
// hangs, whatever raw is: it takes at most Config.ClientWait and Config.Timeout.
func (s *Server) serve(ctx context.Context, q *query, ask relay) []byte {
	if len(q.raw) < headerSize || isResponse(q.raw) {
		// An answer to an answer could go round for ever.
		s.cfg.Metrics.dropped[dropMalformed].Add(1)
		return nil
	}
	var ok bool
	if q.msg, ok = parse(q.raw); !ok {
		return errorReply(q.raw, dns.RcodeFormatError)
	}
	if opcode(q.raw) == dns.OpcodeQuery && len(q.msg.Question) != 1 {
		return s.pack(q, &Decision{Rcode: dns.RcodeServerFailure})
	}
	var view *state.View
	view, q.client = s.localWorkload(ctx)
	q.series = s.cfg.Metrics.of(q.msg, q.protocol(), q.client)
	q.series.requests.Add(1)
	if q.client == nil {
		s.log(q, "unknown source", 0)
		return s.pack(q, &Decision{Rcode: dns.RcodeServerFailure})
	}
	d := Answer(view, q.client, &s.cfg.Options, q.msg)
	if d.Forward {
		return s.forward(ctx, q, ask)
	}
	if d.Rcode != dns.RcodeSuccess {
		s.log(q, rcodeName(d.Rcode), 0)
	} else {
		s.log(q, d.Result, len(d.Addrs))
	}
	return s.pack(q, &d)
}

// localWorkload is the record of the pod that we serve, waited for if it has not
// arrived yet; nil if it does not come. ztunnel does not go by the sender's
// address either.
func (s *Server) localWorkload(ctx context.Context) (*state.View, *state.Workload) {
	var timeout <-chan time.Time
	for {
		// The channel is taken before the View, so that a publication in between
		// is seen.
		changed := s.cfg.Knowledge.Changed()
		view := s.cfg.Knowledge.View()
		if w := view.WorkloadByInfo(s.cfg.Client); w != nil {
			return view, w
		}
		if timeout == nil {
			t := time.NewTimer(s.cfg.ClientWait)
			defer t.Stop()
			timeout = t.C
		}
		select {
		case <-changed:
		case <-timeout:
			return nil, nil
		case <-ctx.Done():
			return nil, nil
		}
	}
}

// errBusy is why a query is not passed on when Config.MaxForwards are.
var errBusy = errors.New("too many queries wait for upstream")

// forward passes a query on and returns the reply as it came, or SERVFAIL.
func (s *Server) forward(ctx context.Context, q *query, ask relay) []byte {
	q.series.upstream.Add(1)
	start := time.Now()
	reply, err := s.upstream(ctx, q, ask)
	q.series.observe(time.Since(start))
	if err == nil && reply != nil {
		err = negative(q, reply)
	}
	if err != nil {
		q.series.failures.Add(1)
		s.log(q, fmt.Sprintf("forwarding failed (%v)", err), 0)
	} else {
		n := 0
		if reply != nil {
			n = count(reply, 1)
		}
		s.log(q, "forwarded", n)
	}
	if reply == nil && err != nil {
		return s.pack(q, &Decision{Rcode: dns.RcodeServerFailure})
	}
	return reply
}

// upstream takes a place among the forwarded queries and asks.
func (s *Server) upstream(ctx context.Context, q *query, ask relay) ([]byte, error) {
	select {
	case s.forwards <- struct{}{}:
		defer func() { <-s.forwards }()
	default:
		s.cfg.Metrics.dropped[dropForwards].Add(1)
		return nil, errBusy
	}
	return ask(ctx, q)
}

// negative is what ztunnel counts as a failure although a reply came: another
// rcode than NOERROR, or nothing in it.
func negative(q *query, reply []byte) error {
	switch {
	case rcode(reply) != dns.RcodeSuccess:
		return errors.New(rcodeName(rcode(reply)))
	case opcode(q.raw) == dns.OpcodeQuery && count(reply, 1) == 0 && !truncated(reply):
		return errors.New(resultNoRecords)
	}
	return nil
}

// pack writes the answer that d calls for as the client can take it.
func (s *Server) pack(q *query, d *Decision) []byte {
	limit := maxTCP
	if !q.tcp {
		limit = udpLimit(q.msg)
	}
	if b := pack(d.reply(q.msg), limit); b != nil {
		return b
	}
	return errorReply(q.raw, dns.RcodeServerFailure)
}

// log writes ztunnel's DNS access line.
func (s *Server) log(q *query, result string, endpoints int) {
	ctx := context.Background()
	if !s.access.Enabled(ctx, slog.LevelDebug) {
		return
	}
	name, ns, domain := "unknown", "unknown", ""
	if q.client != nil {
		name, ns = q.client.Name, q.client.Namespace
	}
	if len(q.msg.Question) > 0 {
		domain = strings.ToLower(q.msg.Question[0].Name)
	}
	s.access.LogAttrs(ctx, slog.LevelDebug, "", slog.String("src.workload", name), slog.String("src.namespace", ns),
		slog.String("query", typeName(q.msg)), slog.String("domain", domain),
		slog.String("result", result), slog.Int("endpoints", endpoints))
}
