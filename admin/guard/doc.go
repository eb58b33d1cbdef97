// Package guard stands before the HTTP servers of both daemons: it bounds their connections and keeps web pages out.
//
// What flows through it: Conns is an http.Server's ConnState hook that shares the server's places among sources
// (package proxy/fair); Local is a handler around those of loopback servers, which lets through what this machine's
// tools ask and refuses what a browser sends for a foreign page. Who calls it: admin (15000, 15020, 15021, the
// control socket) and admin/control (15014, the status socket). What it never does: serve anything itself.
//
// Decisions:
//
//   - 2026-11-28: connections that wait (half open, idle) and those whose request is being answered have places apart.
//     A stuck client of either kind is the oldest of its source and goes first; a probe lives for milliseconds. So a
//     newcomer always gets in, also where a flood comes from its own address.
//   - 2026-11-28: loopback is a boundary against the network and not against a browser on the node, which sends what
//     any web page asks for. So loopback servers answer to loopback's names only (Host: a rebound DNS name is a
//     foreign one), and to no page but their own (Origin, Referer, Sec-Fetch-Site). Tools send none of these and are
//     not asked for anything: curl, `istioctl ztunnel-config` through its port-forward (Host localhost:PORT) go on as
//     before.
//   - 2026-11-28: no Host check on 15020 and 15021: probes and scrapes come by the node's or the pod's address or any
//     name for it, both servers only read, and whoever reaches the port can ask it directly. They have the bounds
//     alone.
//   - 2026-11-28: Unix sockets are not checked: browsers cannot speak to them, and their mode says who may.
package guard
