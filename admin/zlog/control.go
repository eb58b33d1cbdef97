package zlog

import (
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
)

// Control holds the filter in force and answers "is this enabled" by one atomic load. It is safe for
// concurrent use.
type Control struct {
	mu      sync.Mutex
	base    *Filter
	current *Filter
	targets map[string]*Target
	shared  *Target // stands for the targets beyond the bound; the most permissive level of the filter
}

// maxTargets bounds the table of known targets. They are literals of this program, so the bound is only a
// guard against a mistake such as a target made from input.
const maxTargets = 512

// NewControl starts with base, which is also what a reset returns to (DefaultFilter if nil).
func NewControl(base *Filter) *Control {
	if base == nil {
		base = DefaultFilter()
	}
	c := &Control{base: base, targets: map[string]*Target{}, shared: &Target{}}
	c.set(base)
	return c
}

// Target is one target's level, kept up to date by its Control. It has the smallest possible check.
type Target struct {
	name  string
	level atomic.Int64
}

// Enabled reports whether lines of level are written for the target. It is one atomic load.
func (t *Target) Enabled(level slog.Level) bool { return int64(level) >= t.level.Load() }

// Name is the target's name.
func (t *Target) Name() string { return t.name }

// Target returns the entry of name, always the same for the same name. Keep it where the question is hot.
func (c *Control) Target(name string) *Target {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t := c.targets[name]; t != nil {
		return t
	}
	if len(c.targets) >= maxTargets {
		return c.shared
	}
	t := &Target{name: name}
	t.level.Store(int64(c.current.Level(name)))
	c.targets[name] = t
	return t
}

// Enabled reports whether lines of level are written for target. Prefer Target for hot paths.
func (c *Control) Enabled(target string, level slog.Level) bool {
	return c.Target(target).Enabled(level)
}

func (c *Control) set(f *Filter) {
	c.current = f
	most := LevelOff
	for _, d := range f.ds {
		most = min(most, d.level)
	}
	c.shared.level.Store(int64(most))
	for name, t := range c.targets {
		t.level.Store(int64(f.Level(name)))
	}
}

// Filter prints the filter in force.
func (c *Control) Filter() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.current.String()
}

// Change applies what POST /logging asks for and returns the filter then in force. levels is a comma separated list
// of clauses, each exactly a level's name or target=level (`mod:level`, which ztunnel's own help text advertises and
// its server refuses, is made target=level by the admin server). With reset they are added to the filter of the
// start, else to the one in force. On an error nothing changes.
func (c *Control) Change(levels string, reset bool) (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f := c.current
	if reset {
		f = c.base
	}
	if levels != "" {
		for clause := range strings.SplitSeq(levels, ",") {
			if !strings.Contains(clause, "=") && !levelWord(clause) {
				return "", fmt.Errorf("invalid level %q", clip(clause))
			}
		}
		var err error
		if f, err = f.With(levels); err != nil {
			return "", err
		}
	}
	c.set(f)
	return f.String(), nil
}

// levelWord is stricter than parseLevel: /logging takes no digits and no capitals.
func levelWord(s string) bool {
	switch s {
	case "off", "error", "warn", "info", "debug", "trace":
		return true
	}
	return false
}
