// Package interop lets programs that are not ours talk HBONE with ztun: curl as a CONNECT client over HTTP/2 with a
// client certificate, and Node's http2 module as client and as server. The pods of ztun are test/interop/rig's; one
// test drives a real daemon, in namespaces of test/lab. Only tests live here; nobody calls this package.
//
// The tests install nothing. They need
//
//	node                                  Node 18 or newer
//	test/interop/get-curl bin/interop     a curl of 8.1 or newer: Debian 12's own, 7.88, speaks only HTTP/1.1 to a proxy
//
// and fail without them. ZTUN_CURL names another curl. The daemon's test needs root, too; ZTUN_TEST_NOROOT=1 leaves
// it out.
//
//	go test -race ./test/interop/...
//
// Decisions:
//   - 2026-11-23: curl from Debian's backports, unpacked beside the system's, which scripts and people may depend on.
//   - 2026-11-23: Node besides curl: curl sends one request per tunnel and never half-closes; Node's module has
//     streams, both roles, small default windows, padding, and frames of extensions (ALTSVC, ORIGIN). Both use
//     nghttp2; Go's library is test/istio's subject.
package interop
