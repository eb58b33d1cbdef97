// Package istio lets Istio's own Go packages talk to ztun. In this folder it is Istio's implementation of HBONE, istio.io/istio/pkg/hbone, in both roles and over
// mTLS; ambient has the daemon under Istio's control plane (fakeistiod) and istioctl.
//
// It is a module of its own so that ztun's go.mod stays free of Istio's dependencies; this package links pkg/hbone only (some 350 packages with ztun's own),
// ambient links istiod (some 1,950). Istio's client is one pod's application: it reaches a pod of ztun (test/interop/rig) at 127.x.y.2:15008. Istio's
// server is another pod: ztun's outbound side, with its pool, reaches it at 127.x.y.4:15008. What Istio's wrappers hide (its client has no
// half-close and ignores contexts) is tested with the library beneath them, golang.org/x/net/http2's Transport, used exactly as Istio uses it.
//
//	cd test/istio && go test -race .            HBONE alone
//	cd test/istio && go test -p 1 ./...         all: the first time some ten minutes of compiling, then one
//
// When ztun's go.mod gets newer requirements, `go mod tidy` here follows them.
//
// Decisions:
//   - 2026-11-23: Istio has no tags for its Go module: a pseudo-version is pinned.
//   - 2026-11-23: istio's server cannot answer anything but 200 (it flushes before it dials), and resets nothing: refusals are tested with
//     a plain net/http handler in its place.
package istio
