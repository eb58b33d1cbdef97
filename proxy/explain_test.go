package proxy

import (
	"context"
	"net/netip"
	"strings"
	"testing"

	"ztun/proxy/identity"
)

// TestExplainAgrees holds explanations and probes against what happens to the same connection: refused or not, and
// the reason in the access line. (test/e2e does so for every row of the routing table, with two daemons.)
func TestExplainAgrees(t *testing.T) {
	t.Run("wire", func(t *testing.T) {
		explainAgrees(t, newWorldWith(t, func(_ *world, _ int, o *Options) { o.Config.SendReason = true }), "tunnel")
	})
	t.Run("memory", func(t *testing.T) { explainAgrees(t, newLocalWorld(t), "memory") })
}

// explainAgrees is with the step that says how the peer is reached.
func explainAgrees(t *testing.T, w *world, tunnel string) {
	w.listen(appB, echo)
	w.listen(netip.MustParseAddrPort("10.91.2.2:7777"), echo)
	w.listen(netip.MustParseAddrPort("10.91.0.2:9000"), echo)
	for _, c := range []struct {
		dst      string
		refused  bool   // says the explanation, which knows of no application
		steps    string // of which it consists
		probe    string // the step at which a probe fails
		contains string // some text of it
	}{
		{dst: "10.91.2.2:9000", steps: "source called route tunnel policies", contains: "CONNECT 10.91.2.2:9000"},
		{dst: "10.91.2.2:7777", refused: true, steps: "source called route tunnel policies", probe: "answer",
			contains: "explicitly denied by default/deny-7777"},
		{dst: "10.91.2.2:9001", steps: "source called route tunnel policies", probe: "answer"},
		{dst: "10.91.2.2:15008", refused: true, steps: "source called route tunnel request", probe: "answer",
			contains: "recursive call"},
		{dst: "10.96.0.10:80", steps: "source called endpoints route tunnel policies", contains: "default/b was drawn"},
		{dst: "10.96.0.10:82", refused: true, steps: "source called endpoints route", contains: "has no port 82"},
		{dst: "10.96.0.12:80", refused: true, steps: "source called endpoints route", contains: "0 usable"},
		{dst: "10.91.0.2:9000", steps: "source called route", contains: "does not take HBONE"},
		{dst: "192.0.2.1:80", steps: "source called route", probe: "connect", contains: "nothing that the mesh knows"},
		{dst: "127.0.0.1:15008", refused: true, steps: "called", contains: "recursive call"},
	} {
		q := ExplainQuestion{Src: addrA, Dst: netip.MustParseAddrPort(c.dst)}
		x := w.proxies[0].ExplainOutbound(context.Background(), q)
		var steps []string
		text := ""
		for _, s := range x.Steps {
			steps = append(steps, s.Step)
			text += s.Text + "\n"
		}
		want := strings.Replace(c.steps, "tunnel", tunnel, 1)
		if x.Refused != c.refused || strings.Join(steps, " ") != want || !strings.Contains(text, c.contains) ||
			x.Probe != nil {
			t.Errorf("%s: %+v", c.dst, x)
		}
		// Now what happens: by a probe, and by a connection of the application.
		q.Probe = true
		probe := w.proxies[0].ExplainOutbound(context.Background(), q).Probe
		before := len(w.lines(0))
		app, _, done, err := w.connect(w.proxies[0].ServeOutbound, srcA, c.dst)
		if err == nil {
			app.Close()
			<-done
		}
		w.settle()
		line := strings.Join(w.lines(0)[before:], "\n")
		if c.refused && !strings.Contains(line, `error="`+x.Error+`"`) {
			t.Errorf("%s: explained is %q, logged\n%s", c.dst, x.Error, line)
		}
		switch {
		case c.refused && probe == nil: // it has no way
		case probe.OK != (err == nil) || probe.Step != c.probe || !probe.OK &&
			!strings.Contains(line, `error="`+probe.Error+`"`):
			t.Errorf("%s: probed is %+v, the connection %v, logged\n%s", c.dst, probe, err, line)
		}
	}
	w.settle()
}

// TestExplainInbound: at the pod that is reached, for a peer with an identity and for plaintext.
func TestExplainInbound(t *testing.T) {
	w := newWorld(t)
	w.listen(appB, echo)
	id, err := identity.Parse("spiffe://cluster.local/ns/default/sa/a")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		port           uint16
		hasID, refused bool
		err            string
		probe          string
	}{
		{9000, true, false, "", ""},
		{9000, false, false, "", ""},
		{7777, true, true, "connection closed due to policy rejection: explicitly denied by: default/deny-7777", ""},
		{7777, false, true, "connection closed due to policy rejection: explicitly denied by: default/deny-7777", ""},
		{15001, true, true, "attempted recursive call to ourselves", ""},
		{9001, true, false, "", "application"},
	} {
		q := ExplainQuestion{Src: addrA, Dst: netip.AddrPortFrom(addrB, c.port), ID: id, HasID: c.hasID, Probe: true}
		x := w.proxies[1].ExplainInbound(context.Background(), q)
		if x.Refused != c.refused || x.Error != c.err || (x.Probe == nil) != c.refused {
			t.Errorf("port %d, identity %v: %+v", c.port, c.hasID, x)
		} else if x.Probe != nil && (x.Probe.OK != (c.probe == "") || x.Probe.Step != c.probe) {
			t.Errorf("port %d, identity %v: probe %+v", c.port, c.hasID, x.Probe)
		}
	}
}
