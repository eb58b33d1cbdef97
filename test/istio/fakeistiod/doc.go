// Package fakeistiod is Istio's control plane inside a test process: istiod's own discovery server with its ambient
// index over a fake API server, and Istio's own CA with its node authorizer and its reviewer of tokens, on one TLS
// port as 15012 is.
//
// What flows through it: Kubernetes objects from the tests (YAML), delta xDS and certificates to the clients under
// test. It is called by test/istio/ambient. Nothing in it answers a client itself: what is not Istio's is the API
// server beneath (client-go's fake, and the answers to TokenReview) and the listener.
//
// A Cluster is what outlives an istiod: the objects, the CA's key, the tokens. Start runs an istiod over it; Kill
// ends one as a crash does; the next Start knows of its clients nothing that a restarted istiod would not know.
//
// Istio reads its switches from the environment while its packages are initialised: a test binary that uses this
// package calls Exec at the start of TestMain.
//
// Decisions:
//   - 2026-11-23: re-executing the test binary with the environment that istiod has in a cluster, rather than a
//     package that sets it and is initialised earlier: that rests on the order of import paths, and "ztun" comes
//     after "istio.io".
//   - 2026-11-23: no debouncing (istiod's default is 100 ms): tests wait less, and every change is a push of its own.
package fakeistiod
