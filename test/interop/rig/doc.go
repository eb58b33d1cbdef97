// Package rig is two pods of ztun in one process, for tests against HBONE implementations that are not ours.
//
// What flows through it: connections of a foreign client to the served pod's port 15008, through a real proxy.Proxy
// (TLS, identity, policy, CONNECT) to an application of the test; and connections of the client pod's application,
// through its own proxy.Proxy and pool, to the port 15008 of a foreign server. Only the devices are missing: the
// pods' addresses are of 127.0.0.0/8, a different /24 per rig, and the kernel's loopback is the network, so that it
// needs neither root nor namespaces. Certificates come from admin/ca as they do on a node.
//
// Who calls it: test/interop (curl, Node) and the nested module test/istio. It never starts the foreign programs and
// knows nothing of them.
//
// Decisions:
//   - 2026-11-23: proxy.Proxy rather than bare hbone: a peer's habits (authority, headers, order of closing) meet the
//     code that answers them in production. What needs the frame level talks to hbone.ClientConn, with Rig.Tunnel.
//   - 2026-11-23: addresses of 127.0.0.0/8 rather than a port table: a foreign server that dials the authority itself
//     (Istio's does) works.
package rig
