package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestPlotArguments(t *testing.T) {
	dir := t.TempDir()
	svg, run1 := filepath.Join(dir, "x.svg"), "report/testdata/report.json"
	for args, want := range map[string]int{
		"":                                       2,
		svg + " m":                               2,
		svg + " throughput " + run1 + " " + run1: 2, // of which size?
		svg + " throughput 1=" + run1 + " " + run1:     2,
		svg + " throughput 0=" + run1:                  2,
		svg + " throughput x=" + run1:                  2,
		svg + " throughput /absent":                    1,
		svg + " no-such-metric " + run1:                1,
		dir + " throughput " + run1:                    1, // is a directory
		svg + " throughput " + run1:                    0,
		svg + " throughput 1=" + run1 + " --over pods": 0,
	} {
		os.Remove(svg)
		var errs strings.Builder
		code, _ := run(append([]string{"plot"}, strings.Fields(args)...), nil, &errs)
		if code != want || (errs.Len() == 0) != (want == 0) {
			t.Errorf("%q: exit code %d, want %d; says %q", args, code, want, errs.String())
		}
		if _, err := os.Stat(svg); (err == nil) != (want == 0) {
			t.Errorf("%q: exit code %d, and the file: %v", args, code, err)
		}
	}
}
