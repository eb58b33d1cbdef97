package zlog

import (
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"ztun/admin/suggest"
)

// Levels beyond slog's own four. LevelOff is only meaningful in a filter.
const (
	LevelTrace = slog.Level(-8)
	LevelDebug = slog.LevelDebug
	LevelInfo  = slog.LevelInfo
	LevelWarn  = slog.LevelWarn
	LevelError = slog.LevelError
	LevelOff   = slog.Level(1 << 20)
)

// builtin is the directive that ztunnel puts in front of every filter. Tools compare the printed filter,
// so it stays although there is no hickory server here.
const builtin = "hickory_server::server"

// levels are the words for levels, in rising order of what they let through.
func levels() []string { return []string{"off", "error", "warn", "info", "debug", "trace"} }

// targets are the targets that the lines of this program have, and the first parts of the modules that filters for a
// ztunnel name. They tell a target that stands alone (RUST_LOG=access) from a level that is misspelt (RUST_LOG=debgu),
// which as a target would turn off everything else.
func targets() []string {
	return []string{
		"access", "admin", "bounds", "ca", "control", "crl", "dns", "hbone", "inbound", "istiod", "kubernetes",
		"netstack", "outbound", "pods", "proxy", "readiness", "run", "state", "stats", "xds", "zds", "ztun",
		"h2", "hickory_proto", "hickory_resolver", "hickory_server", "hyper", "hyper_util", "rustls", "tokio", "tonic",
		"tower", "ztunnel",
	}
}

// Bounds of a filter: /logging appends to the filter in force, so without them it could grow for ever.
const (
	maxDirectives = 128
	maxTarget     = 256
)

type directive struct {
	target string // "" matches everything
	level  slog.Level
}

// Filter says from which level on each target is logged. It is immutable.
//
// It follows ztunnel's RUST_LOG (spec controlplane 11): a comma separated list of `level`,
// `target=level` and `target` (meaning trace); levels are off, error, warn, info, debug, trace in any
// case or 0 to 5; targets match by string prefix and the longest wins; what nothing matches is off. A word
// alone that is neither a level nor a known target is an error here, where ztunnel falls silent.
type Filter struct {
	ds []directive // longest target first; equal lengths in reverse alphabetical order, as ztunnel prints them
}

// DefaultFilter is what an unset RUST_LOG means: hickory_server::server=off,info.
func DefaultFilter() *Filter {
	f := &Filter{}
	f.put(directive{builtin, LevelOff})
	f.put(directive{"", LevelInfo})
	return f
}

// ParseFilter reads the text of RUST_LOG. The built-in hickory_server::server=off is put in front of it
// and may be overridden. An empty text means level error. The error names the clause at fault.
func ParseFilter(s string) (*Filter, error) {
	f := &Filter{}
	f.put(directive{builtin, LevelOff})
	if s == "" {
		f.put(directive{"", LevelError})
		return f, nil
	}
	return f.With(s)
}

// With returns the filter with the clauses of s added; a clause replaces an earlier one of its target.
func (f *Filter) With(s string) (*Filter, error) {
	n := &Filter{ds: slices.Clone(f.ds)}
	for clause := range strings.SplitSeq(s, ",") {
		if clause == "" {
			continue
		}
		d, err := parseDirective(clause)
		if err != nil {
			return nil, err
		}
		n.put(d)
		if len(n.ds) > maxDirectives {
			return nil, fmt.Errorf("log filter has more than %d directives", maxDirectives)
		}
	}
	return n, nil
}

func parseDirective(clause string) (directive, error) {
	target, level, hasLevel := strings.Cut(clause, "=")
	if !hasLevel {
		if l, ok := parseLevel(clause); ok {
			return directive{"", l}, nil
		}
		if !strings.Contains(clause, "::") && !slices.Contains(targets(), clause) {
			known := append(levels(), targets()...)
			return directive{},
				fmt.Errorf("invalid log filter %q: neither a level (%s) nor a target that is known (%s=LEVEL for one that is "+
					"not)%s",
					clip(clause), strings.Join(levels(), ", "), clip(clause), suggest.DidYouMean(clause, known))
		}
		level = "trace"
	}
	l, ok := parseLevel(level)
	if !ok {
		return directive{}, fmt.Errorf("invalid log filter %q: %q is not one of %s%s", clip(clause), clip(level),
			strings.Join(levels(), ", "), suggest.DidYouMean(level, levels()))
	}
	if target == "" || len(target) > maxTarget {
		return directive{}, fmt.Errorf("invalid log filter %q: the target must have 1 to %d characters", clip(clause),
			maxTarget)
	}
	if i := strings.IndexFunc(target, func(r rune) bool {
		return r <= ' ' || r > '~' || strings.ContainsRune(`{}[]"`, r)
	}); i >= 0 {
		return directive{}, fmt.Errorf("invalid log filter %q: the target may not contain %q", clip(clause), target[i])
	}
	return directive{target, l}, nil
}

// clip keeps an error text short whatever was sent.
func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "..."
	}
	return s
}

func (f *Filter) put(d directive) {
	i, found := slices.BinarySearchFunc(f.ds, d, func(a, b directive) int {
		if len(a.target) != len(b.target) {
			return len(b.target) - len(a.target)
		}
		return strings.Compare(b.target, a.target)
	})
	if found {
		f.ds[i] = d
		return
	}
	f.ds = slices.Insert(f.ds, i, d)
}

// String prints the filter as ztunnel does: more specific (longer) targets first, the bare level last.
// What it prints parses to an equal filter.
func (f *Filter) String() string {
	var b strings.Builder
	for i, d := range f.ds {
		if i > 0 {
			b.WriteByte(',')
		}
		if d.target != "" {
			b.WriteString(d.target)
			b.WriteByte('=')
		}
		b.WriteString(levelName(d.level))
	}
	return b.String()
}

// Level returns the lowest level that is logged for target, LevelOff if none is.
func (f *Filter) Level(target string) slog.Level {
	for _, d := range f.ds {
		if matches(target, d.target) {
			return d.level
		}
	}
	return LevelOff
}

const crate = "ztunnel::"

// matches reports whether directive d covers target t, in its short form or in the long one that ztunnel
// itself uses (ztunnel::t). access and dns are whole names in ztunnel.
func matches(t, d string) bool {
	if strings.HasPrefix(t, d) {
		return true
	}
	if t == "access" || t == "dns" {
		return false
	}
	return strings.HasPrefix(crate+t, d)
}

func parseLevel(s string) (slog.Level, bool) {
	switch strings.ToLower(s) {
	case "off", "0":
		return LevelOff, true
	case "error", "1":
		return LevelError, true
	case "warn", "2":
		return LevelWarn, true
	case "info", "3":
		return LevelInfo, true
	case "debug", "4":
		return LevelDebug, true
	case "trace", "5":
		return LevelTrace, true
	}
	return 0, false
}

func levelName(l slog.Level) string {
	switch {
	case l < LevelDebug:
		return "trace"
	case l < LevelInfo:
		return "debug"
	case l < LevelWarn:
		return "info"
	case l < LevelError:
		return "warn"
	case l < LevelOff:
		return "error"
	}
	return "off"
}
