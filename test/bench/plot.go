package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"ztun/test/bench/report"
)

// plot draws figures of runs, as --json wrote them, into an SVG. The code is run's.
func plot(args []string, stderr io.Writer) (code int) {
	over := "size"
	if n := len(args); n > 2 && args[n-2] == "--over" {
		over, args = args[n-1], args[:n-2]
	}
	if len(args) < 3 {
		fmt.Fprintln(stderr, "bench: plot takes the file to write, metrics, and files that --json has written: "+
			"scripts/bench plot SVG METRICS FILE, or SIZE=FILE... for their growth")
		return 2
	}
	var runs []report.Grown
	growth := strings.Contains(args[2], "=")
	for _, arg := range args[2:] {
		var g report.Grown
		name := arg
		if size, file, sized := strings.Cut(arg, "="); growth && sized {
			var err error
			if g.At, err = strconv.ParseFloat(size, 64); err != nil || !(g.At > 0) {
				fmt.Fprintf(stderr, "bench: %s: %q is no size above zero\n", arg, size)
				return 2
			}
			name = file
		} else if growth || len(args) > 3 {
			fmt.Fprintf(stderr, "bench: %s: several runs need their sizes: SIZE=FILE\n", arg)
			return 2
		}
		var err error
		if g.Run, err = report.Load(name); err != nil {
			fmt.Fprintf(stderr, "bench: %v\n", err)
			return 1
		}
		runs = append(runs, g)
	}
	var svg bytes.Buffer
	metrics := strings.Split(args[1], "|")
	draw := func() error { return report.PlotBars(&svg, runs[0].Run, metrics) }
	if growth {
		draw = func() error { return report.PlotGrowth(&svg, runs, metrics, over) }
	}
	err := draw()
	if err == nil {
		err = os.WriteFile(args[0], svg.Bytes(), 0o644)
	}
	if err != nil {
		fmt.Fprintf(stderr, "bench: %v\n", err)
		return 1
	}
	return 0
}
