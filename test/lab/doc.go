// Package lab builds worlds of Linux network namespaces for the end-to-end tests and the benchmarks, and takes them
// down again.
//
// A world is two nodes (n1, n2) joined by a veth, pods that have nothing but lo (ztun's isolated pods: their only way
// out is the TUN that the daemon under test gives them), and hosts: uncaptured machines behind an ordinary veth.
// A path host - node - node - host is the bare veth twin of the path pod - node - node - pod.
//
//	host h1 ---veth--- n1 10.91.0.1 ---veth--- 10.91.0.2 n2 ---veth--- host h2
//	pod  a  ---TUN---- (ztun)                         (ztun) ---TUN---- pod b
//	10.91.1.0/24, fd91:0:0:1::/64                     10.91.2.0/24, fd91:0:0:2::/64
//
// What flows through it: commands and Go functions that must run inside a namespace, daemons with their environment
// and logs, packet captures and what was in them, the workload file of the world. It is called by test/e2e,
// test/bench and test/istio. It never looks inside ztun: it knows the command line, the environment and the three
// ports only, and it makes its namespaces with iproute2 rather than with ztun's own tun/netns and tun/steer, so that
// it is an independent witness.
//
// Cleaning up is not left to luck. Close removes everything; every child has a parent-death signal; a reaper process
// waits on a pipe for the test process to die in any way (panic, SIGINT, SIGKILL, test timeout) and then removes what
// is left; New first scavenges the worlds of killed earlier runs (their lock is free).
//
// Decisions:
//   - 2026-11-23: names are PREFIX-PID-SEQ-NAME, found by the first free directory of /run/ztun-lab, so that runs
//     beside each other never meet and no counter has to live in a package variable.
//   - 2026-11-23: children are started by one locked thread per world that enters the namespace first: the
//     parent-death signal of Linux is tied to the starting thread, and threads of namespace functions come and go.
package lab
