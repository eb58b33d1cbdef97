package zlog

import (
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

func TestParseFilter(t *testing.T) {
	for _, tc := range []struct{ in, want string }{
		{"info", "hickory_server::server=off,info"},
		{"debug", "hickory_server::server=off,debug"},
		{"INFO,access=Debug", "hickory_server::server=off,access=debug,info"},
		{"3", "hickory_server::server=off,info"},
		{"", "hickory_server::server=off,error"},
		{"access", "hickory_server::server=off,access=trace"},
		{"info,", "hickory_server::server=off,info"},
		{"info,debug", "hickory_server::server=off,debug"},
		{"a=1,a=0", "hickory_server::server=off,a=off"},
		{"aa=warn,ab=warn,b=info,warn", "hickory_server::server=off,ab=warn,aa=warn,b=info,warn"},
		{"hickory_server::server=debug", "hickory_server::server=debug"},
		{"a_much_longer::target::than::that=info,warn",
			"a_much_longer::target::than::that=info,hickory_server::server=off,warn"},
	} {
		f, err := ParseFilter(tc.in)
		if err != nil {
			t.Errorf("ParseFilter(%q): %v", tc.in, err)
			continue
		}
		if f.String() != tc.want {
			t.Errorf("ParseFilter(%q) = %s, want %s", tc.in, f, tc.want)
		}
		again, err := ParseFilter(f.String())
		if err != nil || again.String() != f.String() {
			t.Errorf("%q does not survive printing and parsing: %v, %v", f, again, err)
		}
	}
	for _, bad := range []string{"=info", "x=foo", "x=", "x=info=debug", "a b=info", "x[span]=info", "x{f}=info", "é=info",
		strings.Repeat("x", 300) + "=info"} {
		if f, err := ParseFilter(bad); err == nil {
			t.Errorf("ParseFilter(%q) = %s, want an error", bad, f)
		} else if len(err.Error()) > 400 {
			t.Errorf("ParseFilter: error of %d bytes", len(err.Error()))
		}
	}
	// A misspelt level is no target: it would turn off all that the program logs.
	for bad, want := range map[string]string{
		"debgu": `; did you mean "debug"?`, "inof": `; did you mean "info"?`, "info,acess": `; did you mean "access"?`,
		"warning": "(off, error, warn, info, debug, trace)",
		"6":       "neither a level", "access=debgu": `; did you mean "debug"?`, "all": "neither a level",
	} {
		if f, err := ParseFilter(bad); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("ParseFilter(%q) = %s, %v; want an error with %s", bad, f, err, want)
		}
	}
	for _, good := range []string{"ztunnel", "ztunnel::xds", "a::b", "xds,warn"} {
		if _, err := ParseFilter(good); err != nil {
			t.Errorf("ParseFilter(%q): %v", good, err)
		}
	}
	if DefaultFilter().String() != "hickory_server::server=off,info" {
		t.Errorf("default filter is %s", DefaultFilter())
	}
	f := DefaultFilter()
	var err error
	for i := 0; err == nil && i < 1000; i++ {
		f, err = f.With("t" + strings.Repeat("x", i%250) + "=info")
	}
	if err == nil || !strings.Contains(err.Error(), "directives") {
		t.Errorf("the number of directives has no bound: %v", err)
	}
}

func TestFilterLevel(t *testing.T) {
	f, err := ParseFilter("warn,ztunnel::proxy=debug,xds=trace,xds::client=off,access=off")
	if err != nil {
		t.Fatal(err)
	}
	for target, want := range map[string]slog.Level{
		"access":                      LevelOff,
		"proxy":                       LevelDebug,
		"proxy::inbound":              LevelDebug,
		"ztunnel::proxy":              LevelDebug,
		"xds":                         LevelTrace,
		"xdsx":                        LevelTrace, // prefixes are of strings, not of words
		"xds::client":                 LevelOff,
		"dns":                         LevelWarn,
		"hickory_server::server::tcp": LevelOff,
	} {
		if got := f.Level(target); got != want {
			t.Errorf("Level(%q) = %v, want %v", target, got, want)
		}
	}
	f, _ = ParseFilter("ztunnel=debug")
	for target, want := range map[string]slog.Level{"proxy": LevelDebug, "access": LevelOff, "dns": LevelOff,
		"dns::server": LevelDebug} {
		if got := f.Level(target); got != want {
			t.Errorf("ztunnel=debug: Level(%q) = %v, want %v", target, got, want)
		}
	}
}

func TestControl(t *testing.T) {
	c := NewControl(nil)
	access := c.Target("access")
	if !access.Enabled(LevelInfo) || access.Enabled(LevelDebug) {
		t.Error("default is not info")
	}
	steps := []struct {
		levels string
		reset  bool
		want   string
	}{
		{"", false, "hickory_server::server=off,info"},
		{"debug", false, "hickory_server::server=off,debug"},
		{"info", false, "hickory_server::server=off,info"},
		{"ztunnel::proxy=debug", false, "hickory_server::server=off,ztunnel::proxy=debug,info"},
		{"access=debug,info", true, "hickory_server::server=off,access=debug,info"},
		{"access=off", false, "hickory_server::server=off,access=off,info"},
		{"", true, "hickory_server::server=off,info"},
	}
	for _, s := range steps {
		got, err := c.Change(s.levels, s.reset)
		if err != nil || got != s.want || c.Filter() != s.want {
			t.Errorf("Change(%q, %v) = %q, %v; in force %q; want %q", s.levels, s.reset, got, err, c.Filter(), s.want)
		}
		if s.levels == "access=off" && access.Enabled(LevelError) {
			t.Error("a known target was not updated")
		}
	}
	for _, bad := range []string{"foo", "mod:debug", "INFO", "3", "info,foo", "x=foo", ",", "=info"} {
		if got, err := c.Change(bad, false); err == nil {
			t.Errorf("Change(%q) = %q, want an error", bad, got)
		}
		if c.Filter() != "hickory_server::server=off,info" {
			t.Fatalf("a refused change changed the filter to %s", c.Filter())
		}
	}
	for i := range maxTargets * 2 {
		c.Target(strings.Repeat("x", i))
	}
	if n := len(c.targets); n > maxTargets {
		t.Errorf("%d targets are kept", n)
	}
}

func FuzzFilter(f *testing.F) {
	for _, s := range []string{"info", "", "a=debug,b", "a=1,=,", "hickory_server::server=off,info", "x{a}=info"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := ParseFilter(s)
		if err != nil {
			return
		}
		q, err := ParseFilter(p.String())
		if err != nil || q.String() != p.String() {
			t.Fatalf("%q prints %q, which parses to %v, %v", s, p, q, err)
		}
	})
}

// Every target that the program gives its loggers is known, so that RUST_LOG=TARGET works.
func TestTargetsAreKnown(t *testing.T) {
	given := regexp.MustCompile(`\.Logger\("([^"]+)"\)|Target\("([^"]+)"`)
	n := 0
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, m := range given.FindAllStringSubmatch(string(b), -1) {
			n++
			if target := m[1] + m[2]; !slices.Contains(targets(), target) {
				t.Errorf("%s: target %q is not in targets()", path, target)
			}
		}
		return nil
	})
	if err != nil || n < 10 {
		t.Fatalf("%d loggers: %v", n, err)
	}
}
