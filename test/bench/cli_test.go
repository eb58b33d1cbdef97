package main

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestParseArgs(t *testing.T) {
	for _, c := range []struct {
		args string
		want options
	}{
		{"", options{Suites: suiteNames(), Reps: 5, Seconds: 5, Rates: []int{500, 4000}, Idle: 5000, Root: "."}},
		{"all", options{Suites: suiteNames(), Reps: 5, Seconds: 5, Rates: []int{500, 4000}, Idle: 5000, Root: "."}},
		{"mesh --quick", options{Suites: []string{"mesh"}, Reps: 3, Seconds: 1.2, Quick: true, Rates: []int{500, 4000},
			Idle: 5000, Root: "."}},
		// Options and suites in any order; suites are put in theirs.
		{"--reps 5 mesh --seconds 2.5 relay --json x.json -profile d --env A=b=c --env B= --rates 100,200 --v6 --wait 3s " +
			"--versus /x --versus-env C=d",
			options{Suites: []string{"relay", "mesh"}, Reps: 5, Seconds: 2.5, JSON: "x.json", Profile: "d",
				Env:   []string{"A=b=c", "B="},
				Rates: []int{100, 200}, Idle: 5000, Root: ".", V6: true, Wait: 3 * time.Second, Versus: "/x",
				VersusEnv: []string{"C=d"}}},
	} {
		got, err := parseArgs(strings.Fields(c.args), nil)
		if err != nil {
			t.Errorf("%q: %v", c.args, err)
			continue
		}
		got.Args = nil
		c.want.Workloads, c.want.Services, c.want.Source, c.want.Storm = 100_000, 10_000, "xds",
			[]string{"dumps", "scrapes", "updates"}
		if d := cmp.Diff(c.want, got); d != "" {
			t.Errorf("%q:\n%s", c.args, d)
		}
	}
}

func TestParseArgsErrors(t *testing.T) {
	for args, says := range map[string]string{
		"mash":                       `"mash"`,
		"--reps -1":                  "--reps -1",
		"--reps x":                   "reps",
		"--seconds -2":               "--seconds",
		"--seconds 1e9":              "--seconds",
		"--rates 0":                  "--rates",
		"--rates 5,,6":               "--rates",
		"--env X":                    "env",
		"--idle-connections 1e6":     "idle-connections",
		"--idle-connections 0":       "--idle-connections",
		"--nonsense":                 "nonsense",
		"--wait 2h":                  "--wait",
		"--wait x":                   "wait",
		"--no-daemon --versus x":     "--versus",
		"--workloads 0":              "--workloads",
		"--services 5 --workloads 4": "--services",
		"--source carrier-pigeon":    "--source",
		"--storm dumps,hail":         "--storm",
	} {
		if _, err := parseArgs(strings.Fields(args), nil); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: error %v, want one that says %q", args, err, says)
		}
	}
}

func TestHelp(t *testing.T) {
	var b strings.Builder
	if _, err := parseArgs([]string{"mesh", "--help"}, &b); !errors.Is(err, errHelp) {
		t.Error(err)
	}
	for _, s := range append(suiteNames(), "-quick", "-profile", "-json") {
		if !strings.Contains(b.String(), s) {
			t.Errorf("the help does not mention %s", s)
		}
	}
}

func TestCompareArguments(t *testing.T) {
	for args, want := range map[string]int{"compare": 2, "compare a": 2, "compare a b c": 2,
		"compare /absent/a /absent/b": 1} {
		var out, errs strings.Builder
		if code, _ := run(strings.Fields(args), &out, &errs); code != want || errs.Len() == 0 {
			t.Errorf("%q: exit code %d, want %d; says %q", args, code, want, errs.String())
		}
	}
}
