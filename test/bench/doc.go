// Command bench measures ztun beside a bare veth of the same hops, in the same minutes, and prints medians and ratios.
//
// What flows through it: it makes a world (test/lab) of two nodes with pods and their uncaptured twins, starts the
// daemons, lets the generators of test/load run inside the pods, reads /proc meanwhile (package proc), and hands the
// figures to package report. It is called by scripts/bench, by developers who tune the data path (--quick, --profile)
// and by nobody in production. It never fails because something is slow, only because something did not work; it
// leaves nothing behind (test/lab sees to that, however this process dies) and sends packets in namespaces of its own
// alone.
//
// Files: cli.go (arguments), plan.go (cases and their order), run.go (the loop around them), host.go (the machine),
// world.go (nodes, pods, daemons), traffic.go (one function per workload), mesh.go (also local, conns, echo and mixed),
// relay.go, hbone.go, idle.go, rootless.go, steered.go, growth.go (the suites), troubles.go (drops and retransmissions
// during a figure), profile.go; ztrelay/ is the relay suite's program. The control suite: control.go (its cases),
// controlmesh.go (the invented mesh), controlsource.go and controltls.go (a file or a control plane of our own),
// controlstorm.go (what is let loose), controlupdate.go (one update); ztprobe/ asks the questions.
//
// Decisions (2026-11-23):
//   - Repetitions are the outer loop and the subjects of a case the inner one, in alternating order: bare veth and
//     ztun are measured seconds apart, and a slow minute of the machine hits both. That is what makes the ratios
//     worth something.
//   - Foreign load (processes that are not ours) is measured during every figure and shown: these machines are shared.
//   - --versus and --versus-env put a second ztun (another build, other settings) into the same run: two runs cannot
//     be compared on such a machine, two subjects of one run can.
//   - A tunnel's figures come with what was dropped and sent again meanwhile, shown only where it was not nothing: a
//     throughput that lost its time in timeouts looks in a CPU profile like one that was idle.
//   - The daemons log at level warn: thousands of log lines a second would be a benchmark of the log.
//   - The control suite's base is the same daemon in calm, measured in turn with the storm; its daemons and its world
//     live for the whole run, because learning 100,000 workloads takes longer than a measurement.
//   - Its control plane (--source xds) is a few lines within this process rather than `ztun control`: with two
//     processors, a second program that holds the mesh would be measured, too.
//   - Profiles are taken in an extra run after the repetitions, so that the profiler's own cost is in no figure.
package main
