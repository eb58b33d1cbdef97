package proxy

import (
	"context"
	"log/slog"
	"net/netip"

	"ztun/proxy/fair"
	"ztun/proxy/hbone"
	"ztun/proxy/rbac"
)

// policyLog writes what policy had to say about one connection, in ztunnel's words (spec 7.3): at DEBUG,
// or at INFO if AUTHZ_POLICY_INFO_LOGGING asks for it. Without a logger it writes nothing.
type policyLog struct {
	log    *slog.Logger
	level  slog.Level
	lines  *fair.Lines // whose budget bounds them
	source string
}

// newPolicyLogger is the logger of all the pod's connections: target "state", span "proxy".
func newPolicyLogger(o *Options) *slog.Logger {
	return o.Log.With("target", "state").WithGroup("proxy").With("wl", display(o.Info.Namespace+"/"+o.Info.Name))
}

// policyLog is that of a connection from src. The caller's trace id goes on in it, if there is a sound one.
func (p *Proxy) policyLog(src netip.AddrPort, traceparent string) policyLog {
	level := slog.LevelDebug
	if p.o.Config.PolicyInfoLogging {
		level = slog.LevelInfo
	}
	if !p.policyLogger.Enabled(context.Background(), level) {
		return policyLog{}
	}
	if _, ok := hbone.ParseTraceparent(traceparent); !ok {
		traceparent = hbone.NewTraceparent()
	}
	id := traceparent[3:35] // 00-<trace>-<parent>-00
	return policyLog{
		log: p.policyLogger.WithGroup("inbound").With("id", display(id), "peer", src), level: level,
		lines: p.bounds.warnings, source: sourceOf(src),
	}
}

func (l policyLog) verdict(v rbac.Verdict) {
	if l.log == nil {
		return
	}
	say := func(text, policy string) {
		if !l.lines.Allow(l.source, text) {
			return
		}
		if policy == "" {
			l.log.Log(context.Background(), l.level, text)
			return
		}
		l.log.Log(context.Background(), l.level, text, "policy", policy)
	}
	texts := [...]string{rbac.Deny: "dry-run deny policy match", rbac.Allow: "dry-run allow policy match"}
	for _, d := range v.DryRun {
		say(texts[d.Action], d.Policy)
	}
	if v.OnlyDryRunAllow {
		say("dry-run no allow policies match", "")
	}
	switch v.Reason {
	case rbac.ReasonDenied:
		say("deny policy match", v.Policy)
	case rbac.ReasonNoAllowPolicy:
		say("no allow policies, allow", "")
	case rbac.ReasonAllowed:
		say("allow policy match", v.Policy)
	case rbac.ReasonNotAllowed:
		say("no allow policies matched", "")
	}
}
