// Package dedicated attaches the one workload of PROXY_MODE=dedicated, where its applications are: in the daemon's own
// network namespace, by kernel sockets alone. It is what a sidecar, a VM or a laptop has, and needs no privilege.
//
// What flows through it: peers of the mesh come to port 15008 of the host's addresses. What a redirect of somebody
// else's (istio-iptables in a VM or sidecar) takes out of the applications' way arrives at 15001, what it takes out of
// the network's at 15006; where a connection was going is asked of the kernel (SO_ORIGINAL_DST). Applications that know
// of us come by SOCKS5 and the DNS proxy, on loopback. Who calls it: cmd/ztun, in dedicated mode. What it never does:
// change a route, a rule or a device of the host.
//
// Limits: connect is not truthful where a redirect brings it: the kernel has answered by then, a refusal is a reset.
// Applications see our address as the client's. UDP, but for DNS questions to the DNS proxy, does not come here.
//
// Decisions:
//   - 2026-11-28: no TUN. The applications share the namespace with us, so there is no place between them and the
//     network for a device, but by taking over the host's routes, for which ztunnel's users have not asked. Who wants a
//     TUN and truthful connect without root has `ztun run`, which is dedicated mode as well and makes a namespace.
//   - 2026-11-28: the listeners are bound before the first state is known, as in ztunnel, and a port that is taken ends
//     the start. A connection without an original destination asks for one of our own ports, which the proxy refuses.
package dedicated
