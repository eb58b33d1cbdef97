// Package ambient proves ztun under Istio's own control plane and with Istio's own tools. It holds tests only, all in
// one binary, because linking istiod takes longer than running them.
//
//   - Descriptors: ztun's wire types against Istio's and Envoy's, from the descriptors that both were generated with.
//   - The rig: fakeistiod itself, with a client written by hand, so that a failure elsewhere is ztun's.
//   - Objects, policies, certificates, disconnection, death of istiod under traffic, a refused token, on-demand: the
//     real `ztun` as daemons of two nodes (test/lab's namespaces), istiod on an uncaptured host beside them, pods,
//     services, AuthorizationPolicy and PeerAuthentication made and deleted in the API server.
//   - Mixed mesh: ztun on one node, and on the other Envoy in a ztunnel's place (test/envoy/get-envoy fetches it), both
//     with certificates of Istio's CA, in both directions and families.
//   - istioctl: `istioctl ztunnel-config` on the daemons' dumps beside dumps of two real ztunnels in the same world
//     (testdata).
//
// It never imports ztun's own packages, whose wire types would clash with Istio's in one process: test/lab and
// test/load know ztun from outside only, and internal/ourpb is a program of its own. It needs root, as test/e2e does.
// Nobody calls it.
//
//	cd test/istio && go test ./ambient                     half a minute, after minutes of compiling the first time
//	go test ./ambient -run Policies -v                     one subject
//	ZTUN_BIN=/path/to/ztun go test ./ambient               another binary
//	ZTUN_TEST_ISTIO_LOG=1 go test ./ambient -run Rig -v    with istiod's log
//
// Decisions:
//   - 2026-11-23: istiod listens in a namespace of its own, not in the node's: killing it resets connections as the
//     death of a pod does.
//   - 2026-11-23: Istio is not tagged for this: the pinned pseudo-version is raised by hand, and what its test
//     packages changed is mended in fakeistiod.
//   - 2026-11-29: in the mixed mesh a client of an application behind Envoy ends its side first. If the application
//     does, Envoy 1.40 ends the CONNECT's other direction as well; and what flow control holds back in it then, it
//     throws away: its trace has "doEndStream() resetting stream", "deferred reset stream" and RST_STREAM with
//     INTERNAL_ERROR in the same millisecond, without END_STREAM, megabytes short, with response flags "-". ztun says
//     so in its line and resets the client's connection, since what it got is not whole. Seen with 64 MiB each way
//     whenever the client's side was the slower one; ztun can not mend it. Envoy as the client's end has none of it.
package ambient
