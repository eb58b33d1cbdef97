// Package istio lets Istio's own Go packages talk to ztun. In this folder it is Istio's implementation of HBONE,
// istio.io/istio/pkg/hbone, in both roles and over mTLS, single and double, and the echo application that Istio's
// ambient tests are made with; ambient has the daemon under Istio's control plane (fakeistiod) and istioctl.
//
// It is a module of its own so that ztun's go.mod stays free of Istio's dependencies; this package links pkg/hbone
// and pkg/test/echo (some 700 packages with ztun's own, nearly all for echo's gRPC), ambient links istiod (some
// 1,950; 150 of the 700 are not among them). What is here, in the order of the files:
//
//   - client: Istio's client is one pod's application: it reaches a pod of ztun (test/interop/rig) at 127.x.y.2:15008.
//   - doubleclient: so does Istio's double client, through Istio's server as a gateway at 127.x.y.4:15008.
//   - doubleserver: ztun's outbound side, with its pool, reaches a service of another network at Istio's double
//     server there.
//   - echo: Istio's echo client calls Istio's echo server in a pod of ztun; a pod of ztun calls Istio's echo server
//     that ends HBONE itself.
//   - server: Istio's server is another pod, at 127.x.y.4:15008 for ztun's outbound side.
//
// What Istio's wrappers hide (its clients have no half-close and ignore contexts) is tested with the library beneath
// them, golang.org/x/net/http2's Transport, used exactly as Istio uses it.
//
//	cd test/istio && go test -race .            HBONE and echo alone
//	cd test/istio && go test -p 1 ./...         all: the first time some ten minutes of compiling, then one
//
// When ztun's go.mod gets newer requirements, `go mod tidy` here follows them.
//
// Decisions:
//   - 2026-11-23: Istio has no tags for its Go module: a pseudo-version is pinned.
//   - 2026-11-23: istio's server cannot answer anything but 200 (it flushes before it dials), and resets nothing:
//     refusals are tested with a plain net/http handler in its place.
//   - 2026-11-23: of Istio's double server under Go 1.26 three things are mended or gone around here: it offers no h2
//     within (GetConfigForClient does), writes to a tls.Config that its tunnels share (one per tunnel), and never
//     returns from a tunnel (streams are counted by our RST_STREAM). Echo's own double HBONE port has the first in a
//     way that cannot be mended from outside: echo's port is the single one.
package istio
