package proxy

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"ztun/proxy/fair"
	"ztun/proxy/route"
	"ztun/proxy/state"
)

// books is what one connection reports: its labels, its access line, its byte counts.
// It is opened once and recorded once.
type books struct {
	p        *Proxy
	outbound bool
	start    time.Time
	src, dst netip.AddrPort
	called   netip.AddrPort // of an outbound one
	hbone    string         // the CONNECT authority; "" for plaintext
	mtls     bool
	carried  bool // it was accepted, and bytes could flow
	memory   bool // between two pods of this daemon, without a tunnel
	protocol route.Protocol
	labels   *labels // the series' own, mostly: idle connections are to be small
	series   *series
	srcName  string // pod names; "" falls back to the canonical service label
	dstName  string

	received atomic.Uint64 // downstream to upstream, as Istio's historical orientation has it
	sent     atomic.Uint64 // upstream to downstream

	recorded sync.Once
	past     past // set when it is recorded
}

// entry is what the books of a connection are opened with: who is connected with whom, as far as is known.
type entry struct {
	outbound bool
	src, dst netip.AddrPort
	called   netip.AddrPort
	hbone    string
	mtls     bool
	protocol route.Protocol
	derived  *derived
	source   *state.Workload
	dest     *state.Workload
	farEnd   *derived // double HBONE: takes the place of dest, which is the gateway
	service  *state.Service
	start    time.Time
}

// openBooks counts the connection and writes the DEBUG line "connection opened".
func (p *Proxy) openBooks(in entry) *books {
	b := &books{p: p, outbound: in.outbound, start: in.start, src: in.src, dst: in.dst,
		called: in.called, hbone: in.hbone, mtls: in.mtls, protocol: in.protocol}
	li := labelInput{reporter: reporterDestination, security: securityUnknown, derived: in.derived, source: in.source,
		dest: in.dest, farEnd: in.farEnd, service: in.service}
	if in.outbound {
		li.reporter = reporterSource
	}
	if in.mtls {
		li.security = securityMutualTLS
	}
	l := makeLabels(li)
	if in.source != nil {
		b.srcName = in.source.Name
	}
	if in.farEnd != nil {
		b.dstName = clip(in.farEnd.baggage.Workload, maxClaimed)
	} else if in.dest != nil {
		b.dstName = in.dest.Name
	}
	claimant, claims := li.claims()
	b.series = p.o.Metrics.open(l, claimant, claims)
	if b.labels = &b.series.labels; *b.labels != l {
		// Counted in the overflow series, or without what the peer claims; the access line still says who it was.
		own := l // only here, so that l stays on the stack
		for i := range own {
			if claims.has(i) {
				own[i] = strings.Clone(own[i]) // of a header that may be much longer
			}
		}
		b.labels = &own
	}
	if p.o.Access.Enabled(context.Background(), slog.LevelDebug) {
		p.o.Access.LogAttrs(context.Background(), slog.LevelDebug, "connection opened", b.attrs(make([]slog.Attr, 0, 16))...)
	}
	return b
}

// record closes the connection's books: metrics and the access line. Only the first call counts.
func (b *books) record(err error) {
	b.recorded.Do(func() {
		flag, reason := FlagNone, ""
		if err != nil {
			err = revokedInstead(err)
			flag = FlagConnect // an error that carries no flag of its own (spec 10.2)
			var e *Error
			if errors.As(err, &e) {
				flag = e.Flag()
			}
			reason = err.Error()
		}
		b.p.o.Metrics.close(b.series, flag)
		b.p.history.remember(b, err, reason, flag)
		level := slog.LevelInfo
		if err != nil {
			level = slog.LevelError
		}
		if !b.p.o.Access.Enabled(context.Background(), level) {
			return
		}
		// The counters are turned so that bytes_sent is what this side of the mesh sent (spec 11).
		sent, received := b.sent.Load(), b.received.Load()
		if b.outbound {
			sent, received = received, sent
		}
		attrs := b.attrs(make([]slog.Attr, 0, 20))
		attrs = append(attrs, slog.Uint64("bytes_sent", sent), slog.Uint64("bytes_recv", received),
			slog.String("duration", durationText(time.Since(b.start))))
		if err != nil {
			attrs = append(attrs, slog.String("error", reason))
		}
		if err != nil && !b.carried {
			// As many as somebody likes who is refused: within a budget.
			b.p.bounds.refusals.Log(context.Background(), level, sourceOf(b.src), "connection complete", attrs...)
			return
		}
		b.p.o.Access.LogAttrs(context.Background(), level, "connection complete", attrs...)
	})
}

func (b *books) attrs(a []slog.Attr) []slog.Attr {
	str := func(key, v string) {
		if v != "" {
			a = append(a, slog.String(key, v))
		}
	}
	a = append(a, slog.Any("src.addr", b.src))
	str("src.workload", cmp.Or(b.srcName, b.labels[lSourceCanonicalService]))
	str("src.namespace", b.labels[lSourceNamespace])
	if b.mtls {
		str("src.identity", b.labels[lSourcePrincipal])
	}
	str("src.cluster", b.labels[lSourceCluster])
	a = append(a, slog.Any("dst.addr", b.dst))
	if b.hbone != "" {
		a = append(a, slog.Any("dst.hbone_addr", display(b.hbone)))
	}
	str("dst.service", b.labels[lDestinationService])
	str("dst.workload", cmp.Or(b.dstName, b.labels[lDestinationCanonicalService]))
	str("dst.namespace", b.labels[lDestinationNamespace])
	if b.mtls {
		str("dst.identity", b.labels[lDestinationPrincipal])
	}
	str("dst.cluster", b.labels[lDestinationCluster])
	return append(a, slog.String("direction", direction(b.outbound)))
}

// sourceOf is who src is to the bounds on log lines.
func sourceOf(src netip.AddrPort) string { return fair.Group(src.Addr()).String() }

// display is text that is logged without quotes, as ztunnel logs what it displays.
type display string

func (d display) String() string { return string(d) }

func direction(outbound bool) string {
	if outbound {
		return "outbound"
	}
	return "inbound"
}

func durationText(d time.Duration) string {
	var b [24]byte
	n := strconv.AppendInt(b[:0], d.Milliseconds(), 10)
	return string(append(n, 'm', 's'))
}

// addSent and addReceived count bytes as they are written, for the metrics and the access line.
func (b *books) addSent(n int)     { b.sent.Add(uint64(n)); b.series.sent.Add(uint64(n)) }
func (b *books) addReceived(n int) { b.received.Add(uint64(n)); b.series.received.Add(uint64(n)) }
