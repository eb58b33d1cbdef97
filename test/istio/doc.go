// Package istio lets Istio's own Go implementation of HBONE, istio.io/istio/pkg/hbone, talk to ours, in both roles and over mTLS.
//
// It is a module of its own so that ztun's go.mod stays free of Istio's dependencies; only pkg/hbone is linked (some 350 packages with ztun's own), not
// pilot. Istio's client is one pod's application: it reaches a pod of ztun (test/interop/rig) at 127.x.y.2:15008. Istio's server is another
// pod: ztun's outbound side, with its pool, reaches it at 127.x.y.4:15008. What Istio's wrappers hide (its client has no half-close and
// ignores contexts) is tested with the library beneath them, golang.org/x/net/http2's Transport, used exactly as Istio uses it.
//
//	cd test/istio && go test -race ./...
//
// When ztun's go.mod gets newer requirements, `go mod tidy` here follows them.
//
// Decisions:
//   - 2026-11-23: Istio has no tags for its Go module: a pseudo-version is pinned.
//   - 2026-11-23: istio's server cannot answer anything but 200 (it flushes before it dials), and resets nothing: refusals are tested with
//     a plain net/http handler in its place.
package istio
