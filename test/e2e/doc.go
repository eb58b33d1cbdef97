// Package e2e proves the daemon from outside: real programs in real network namespaces, two daemons as two nodes, and
// packet captures as witnesses.
//
// Every test makes a world of its own with test/lab, drives it with test/load (or curl, python3 -m http.server), and
// looks only at what a user can see: bytes, errors, packets, logs, metrics, exit codes. Nothing of ztun's own
// packages is imported, so that a mistake shared by both ends is not shared by the test. Nobody calls this package.
//
// It needs root. Without it the tests fail, unless ZTUN_TEST_NOROOT=1 says that this is intended.
//
//	go test -count=1 ./test/e2e                    everything, about six minutes on two cores
//	go test -count=1 ./test/e2e -run Truthful -v   one subject
//	ZTUN_BIN=/path/to/ztun go test ./test/e2e      another binary
//	ZTUN_TEST_BYTES=67108864 go test ...           smaller transfers than 1 GiB while developing
//
// Decisions:
//   - 2026-11-23: the tests run one after the other: two cores do not carry two worlds at 1 GiB each, and times are
//     part of what is proved.
//   - 2026-11-28: attacks (attack_test.go) are judged by a bystander: no request of it may ever fail, and its p99 is
//     compared with that of the same minute without the attack. The best of three rounds counts for p99, because on
//     two busy cores one in thirty is bad by chance alone.
//   - 2026-11-23: limits are many times what an idle machine needs, except where the limit is the point (50 ms for a
//     refusal: the median of ten counts).
package e2e
