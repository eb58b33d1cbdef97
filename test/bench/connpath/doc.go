// Package connpath holds the test and the benchmark of what one connection costs on its whole way: from the SYN in one
// pod's device to the last FIN in the other's, by two proxies with netstack in front and one tunnel between them.
//
// The devices are in memory and the applications are a few lines that answer packets (kernel_test.go), so that
// everything that is counted or profiled is the daemons' own; only the tunnel is a real socket, on loopback. Who calls
// it: `go test`, and whoever tunes connections:
//
//	go test ./test/bench/connpath -run '^$' -bench . -cpuprofile cpu.out -memprofile mem.out -memprofilerate 512
//
// What it never does: measure time. That is scripts/bench's (conns), with kernels, devices and two processes.
package connpath
