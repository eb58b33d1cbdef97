package proxy

import (
	"net"
	"net/netip"
	"sync/atomic"

	"ztun/proxy/fair"
)

// Bounds of what outsiders can take of one pod's proxy. The greediest source loses at each of them.
const (
	maxHandshakes = 256  // TLS handshakes, and SOCKS5 greetings, under way
	maxNewcomers  = 1024 // connections on 15008 that have not carried anything yet
	maxPerSource  = 256  // of these of one source
	maxRequests   = 4096 // CONNECTs that await their answer
)

// bounds are one pod's shares of what outsiders can take.
type bounds struct {
	newcomers  *fair.Ledger[netip.Addr] // connections on 15008, from the SYN to the first CONNECT that is granted
	handshakes *fair.Ledger[netip.Addr] // those of them that have said something, until both sides are proven
	greetings  *fair.Ledger[netip.Addr] // SOCKS5 requests that are not complete
	requests   *fair.Ledger[netip.Addr] // CONNECTs that await their answer

	refusals *fair.Lines // access lines of connections that were turned down
	warnings *fair.Lines // all other lines that outsiders can cause

	pod    string
	report *fair.Report
	turned atomic.Uint64
}

func newBounds(o *Options) *bounds {
	b := &bounds{
		pod: o.Info.Namespace + "/" + o.Info.Name, report: o.Report,
		refusals: fair.NewLines(fair.LinesOptions{Log: o.Access, PerSecond: 2, Burst: 50}),
		warnings: fair.NewLines(fair.LinesOptions{Log: o.Log, PerSecond: 2, Burst: 20}),
	}
	ledger := func(resource string, limit, perSource int64) *fair.Ledger[netip.Addr] {
		return fair.NewLedger(fair.LedgerOptions[netip.Addr]{Limit: limit, PerSource: perSource,
			Turned: func(source netip.Addr, evicted bool) {
				b.turned.Add(1)
				b.report.Turned(resource, b.pod, source.String(), evicted)
			}})
	}
	b.newcomers = ledger("connections to port 15008 without a stream", maxNewcomers, maxPerSource)
	b.handshakes = ledger("handshakes on port 15008", int64(o.Config.MaxMeshHandshake), 0)
	b.greetings = ledger("SOCKS5 handshakes", int64(o.Config.MaxMeshHandshake), 0)
	b.requests = ledger("requests on port 15008", maxRequests, 0)
	return b
}

// calmed is for a peer whose tunnel was ended for what it sent: floods of frames that serve nothing, answers unread.
func (b *bounds) calmed(peer net.Addr) {
	b.turned.Add(1)
	b.report.Turned("frames of one tunnel", b.pod, addrPort(peer).Addr().String(), true)
}

// close says what lines were left out.
func (b *bounds) close() {
	b.refusals.Close()
	b.warnings.Close()
}
