package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"testing"

	"ztun/proxy"
	"ztun/test/lab"
)

// explain asks a node's daemon over its socket.
func (r *routing) explain(n *lab.Node, q url.Values) (*proxy.Explanation, error) {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", n.Daemon.Socket)
		}}}
	req, err := http.NewRequestWithContext(r.ctx, http.MethodGet, "http://ztun/v1/explain?"+q.Encode(), nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", q.Encode(), resp.Status)
	}
	x := new(proxy.Explanation)
	return x, json.NewDecoder(resp.Body).Decode(x)
}

// agrees holds what `ztun explain` says against what has happened: of every connection of the table that an
// application opened, and of every end of one at a pod, the same way and the same reason.
func (f family) agrees(t *testing.T, s scenario, want []outcome) {
	t.Helper()
	if s.via != nil {
		return // by SOCKS5, or by a peer that is no ztun: a question that explain is not asked
	}
	for _, o := range want {
		for _, h := range o.hops {
			if h.inbound {
				f.agreesInbound(t, h)
			}
		}
	}
	from := f.places[s.from]
	if from.node == nil || f.record(s.from) == nil || len(want[0].hops) == 0 || want[0].hops[0].inbound {
		return
	}
	// Where there is something to draw, one explanation is one of the outcomes; which one is chance, so that all are
	// right.
	x, err := f.explain(from.node, url.Values{"pod": {f.podOf(s.from)}, "to": {s.to(f)}})
	if err != nil {
		t.Errorf("explain: %v", err)
		return
	}
	var differs []string
	for _, o := range want {
		why := f.differs(x, o)
		if why == "" {
			return
		}
		differs = append(differs, why)
	}
	t.Errorf("explain says otherwise: %s\n%+v", strings.Join(differs, "; "), x)
}

// differs says how an explanation differs from what happened; "" if it does not.
func (f family) differs(x *proxy.Explanation, o outcome) string {
	h := o.hops[0]
	if h.early {
		if !x.Refused || x.Error != h.err {
			return fmt.Sprintf("refused %v %q, but it was refused: %q", x.Refused, x.Error, h.err)
		}
		return ""
	}
	d := x.Decision
	switch {
	case d == nil:
		return fmt.Sprintf("refused %q, but it went to %s", x.Error, h.at)
	case d.NextHop.String() != h.at || d.Authority != h.hbone:
		return fmt.Sprintf("to %s %q, but it went to %s %q", d.NextHop, d.Authority, h.at, h.hbone)
	case h.service != "" && !strings.Contains(d.Service, "/"+h.service+"."):
		return fmt.Sprintf("service %s, but it was %s", d.Service, h.service)
	// what the other node decided, and why
	case len(o.hops) == 2 && !d.Waypoint && o.hops[1].err != "" && o.hops[1].err != nobody:
		if !x.Refused || x.Error != h.err {
			return fmt.Sprintf("refused %v %q, but it was refused: %q", x.Refused, x.Error, h.err)
		}
	case x.Refused:
		return fmt.Sprintf("refused %q, but it went", x.Error)
	}
	return ""
}

// podOf is a pod as commands name it.
func (f family) podOf(name string) string { return f.record(name).Namespace + "/" + name }

// agreesInbound asks the node at which a connection arrived.
func (f family) agreesInbound(t *testing.T, h hop) {
	t.Helper()
	at, err := netip.ParseAddrPort(h.hbone)
	if h.hbone == "" {
		at, err = netip.ParseAddrPort(h.at)
	}
	if err != nil || h.told != nil || strings.HasPrefix(h.err, "tls handshake error") {
		return // called by a service's name, from another network, or never a connection
	}
	for name, p := range f.places {
		if p.node != h.node || f.ip(name) != at.Addr() || f.record(name) == nil {
			continue
		}
		q := url.Values{"inbound": {"1"}, "pod": {f.podOf(name)}, "to": {fmt.Sprintf(":%d", at.Port())},
			"from": {h.from.String()}}
		if h.hbone == "" && !h.early {
			q.Set("plaintext", "1")
		}
		x, err := f.explain(h.node, q)
		if err != nil {
			t.Errorf("explain: %v", err)
			return
		}
		refused := h.err != "" && h.err != nobody
		if x.Refused != refused || refused && x.Error != h.err {
			t.Errorf("explain of what reached %s says refused %v %q, but it was %q\n%+v", name, x.Refused, x.Error, h.err, x)
		}
	}
}
