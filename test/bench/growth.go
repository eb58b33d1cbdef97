package main

import (
	"context"
	"fmt"
	"time"

	"ztun/test/bench/report"
)

// The sizes over which costs are to stay what they are.
var (
	heldSizes = []int{1, 100, 1000, 10_000}
	meshSizes = []int{100, 1000, 10_000, 100_000}
)

// growthCases say what one more costs when there are many already: a new connection beside idle ones of the same pods,
// and an update and a start over the size of the mesh. One case for each size, so that the sizes stand under each
// other in the table.
func (b *bench) growthCases() []kase {
	var ks []kase
	for _, n := range heldSizes {
		ks = append(ks, kase{
			suite: "growth", name: fmt.Sprintf("beside %d idle connections", n),
			lasts:    b.length() + 2*time.Second + time.Duration(n)*2*time.Millisecond,
			rows:     append([]report.Row{{Metric: "rate", Unit: "per s"}, {Metric: "p50", Unit: "ms"}}, connsRows()...),
			subjects: b.paths(b.beside(n, b.newConnections(16))),
		})
	}
	if b.o.NoDaemon {
		return ks
	}
	for _, n := range meshSizes {
		// A bench of its own for this size, that shares everything else.
		sized := *b
		sized.o.Workloads, sized.o.Services = n, max(n/10, 1)
		ks = append(ks, kase{
			suite: "growth", name: fmt.Sprintf("%d workloads", n), lasts: 80 * time.Second,
			rows: []report.Row{
				{Metric: "visible after, p50", Unit: "ms"}, {Metric: "visible after, p99", Unit: "ms"},
				{Metric: "garbage", Unit: "KiB per update"}, {Metric: "CPU until ready", Unit: "s"},
				{Metric: "peak RSS", Unit: "MiB"}, {Metric: "RSS at rest", Unit: "MiB"},
			},
			subjects: []subject{{ztunName, func(ctx context.Context, _ int) (outcome, error) {
				o, err := sized.oneUpdate(ctx)
				if err != nil {
					return nil, err
				}
				started, err := sized.ingest(ctx)
				if err != nil {
					return nil, err
				}
				for _, m := range []string{"CPU until ready", "peak RSS", "RSS at rest"} {
					o[m] = started[m]
				}
				return o, nil
			}}},
		})
	}
	return ks
}

// beside holds n idle connections between the ends of a path while run measures there.
func (b *bench) beside(n int, run func(context.Context, path) (outcome, error)) func(context.Context, path) (outcome,
	error) {
	return func(ctx context.Context, p path) (o outcome, err error) {
		err = b.idle(ctx, p.lab, p.client, p.server, n, func() (err error) {
			o, err = run(ctx, p)
			return err
		})
		return o, err
	}
}
