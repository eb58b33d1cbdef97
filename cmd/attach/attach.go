package attach

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"os"

	"ztun/admin"
	"ztun/admin/fdstore"
	"ztun/netstack"
	"ztun/proxy"
	"ztun/proxy/fair"
	"ztun/proxy/rescue"
	"ztun/tun"
	"ztun/tun/netns"
)

// Kind is one way of capturing pods and of reaching the network for them, for all pods of a daemon. cmd/ztun chooses
// one by mode and knows nothing else of it. What differs between the four:
//
//	                      isolated            steered               redirected             rootless
//	the pod has           lo and a TUN with   a veth called eth0;   the CNI's eth0         lo and a TUN with
//	                      its address         the CNI's is in S                            its address, in a
//	                                                                                       user namespace
//	application's SYN     TUN in the pod,     TUN in S,             accepted by the kernel TUN in the pod,
//	                      netstack            netstack              (SO_ORIGINAL_DST)      netstack
//	truthful connect      yes                 yes                 no                       yes
//	HBONE out (DialMesh)  node's namespace,   S, the pod's own    the pod's namespace,     the user's sockets,
//	                      IP_TRANSPARENT      address             with a mark              the host's address
//	HBONE in              one listener on     a listener in S     a listener in the        a listener on the
//	                      15008 for all pods                      pod, 15008               host's address
//	plaintext out         netstack, node's    netstack, a second  the pod's namespace      the user's sockets
//	(DialPlain, DialUDP)  TUN                 TUN in S
//	plaintext in          netstack, node's    netstack, from that a listener in the        published ports
//	                      TUN                                     pod, 15006
//	to the application    netstack, as the    netstack, as the    a socket, as the client  netstack, as the
//	(DialApp)             client              client              (transparent)            client
//	other UDP, ICMP       netstack, as they   native                native                 netstack, by the
//	                      are                                                              user's sockets
//	its addresses         are given           are read in the     are read in the          are given
//	                                          namespace           namespace
//	node-wide             a TUN, rules,       nothing (S is the   nothing                  nothing
//	                      forwarding          pod's)
//	needs                 NET_ADMIN,          NET_ADMIN,          what ztunnel needs       nothing
//	                      SYS_ADMIN           SYS_ADMIN
//	left while no daemon  packets end in a    packets end in a    connections are          nothing: pod and
//	runs                  TUN without reader  TUN without reader  refused                  daemon end together
//
// (S: a namespace of ours between pod and network; no application runs in it.)
//
// A fifth, dedicated, is PROXY_MODE=dedicated: as redirected, in the daemon's own namespace and without any privilege,
// for the one workload that lives there.
//
// Whatever lives in more than one column is a part of this package that the kinds are made of: Stack, KernelTCP,
// Redirect, Loopback, Descriptors, Place.
type Kind interface {
	// Open makes what all pods need, before the first of them: devices, rules, listeners. What a killed daemon left
	// of it is taken over.
	Open(ctx context.Context) error
	// Locate completes a pod by what only its namespace can tell: Place, and its addresses where none are given.
	// Errors wrap those of package admin that say whose fault it is, as all of this interface do.
	Locate(p *Pod) error
	// Shares says that pods may have one address, or live in one namespace, at the same time: where nothing outside of
	// a pod's namespace knows it by either. A node agent knows an old pod and its successor at once for a moment.
	Shares() bool
	// Outlives says that what holds the pods' traffic back stays when the daemon ends, for the next one, and that nobody
	// else can take anything before: a SYN that is dropped meanwhile is answered by the successor. Otherwise the
	// successor is there already, or there will be none.
	Outlives() bool
	// Gone says why there surely is no such namespace any more; nil if there is, and nil if that cannot be told.
	Gone(p Place) error
	// Attach prepares a pod and returns when everything stands but the last step, Capture: nothing leaves the pod
	// yet, and flows may arrive at h already, by what a killed daemon left. On an error nothing of it is left.
	Attach(ctx context.Context, p Pod, h Handler) (Attachment, error)
	// Clean removes from a namespace what an earlier life left of a pod that this one has not attached.
	Clean(p Place) error
	// Sweep removes from the node what is left of all pods but those with the addresses keep.
	Sweep(keep []netip.Addr) error
	// Leave has new mesh connections reset from now on, or left without an answer where the kind Outlives: the daemon is
	// about to end.
	Leave()
	// Close ends what Open made, when no pod is left that needs it. It may be called whatever came of Open.
	Close() error
	// Stats are the node-wide figures.
	Stats() NodeStats
}

// Attachment is one pod as it is attached: its ways out, its life, and its figures.
type Attachment interface {
	Ways
	// Addrs are the pod's own addresses.
	Addrs() []netip.Addr
	// Place is where the pod lives.
	Place() Place
	// Capture takes the last step: from here on the pod's traffic comes to the Handler. An error leaves the rest
	// standing, for Remove.
	Capture(ctx context.Context) error
	// Silence has whoever connects from now on, and has no answer yet, wait for the next daemon: nobody is refused any
	// more. It is for kinds that Outlive the daemon.
	Silence()
	// Settle waits until the application has acknowledged what connections that were closed in good order had still
	// to send, or for ctx.
	Settle(ctx context.Context) error
	// Stop ends everything that runs. What holds the pod's traffic back stays. False: goroutines are left that wait
	// for what a panic left undone.
	Stop() bool
	// Remove stops the attachment and takes every trace of it away. A pod that was never captured gets its namespace
	// back as it was.
	Remove() error
	// Status tells the device and how it does.
	Status() Status
	// Tap is the pod's device, to be looked at (`ztun capture`); nil: it has none.
	Tap() *tun.Tap
	// Stats are the figures of the pod's stack; nil: it has none.
	Stats() *netstack.Stats
	// Weigh has the pod's Memory charged with what its connections hold now.
	Weigh()
}

// Ways are one pod's ways out. Each leaves with the pod's own address, or with the one by which the network knows the
// pod.
type Ways interface {
	proxy.Network
	// DialUDP gives a UDP socket to dst in the network, for questions that the pod's DNS proxy passes on.
	DialUDP(ctx context.Context, dst netip.AddrPort) (net.Conn, error)
	// Listen and ListenPacket open a socket on the pod's own loopback, as net.Listen and net.ListenPacket would in
	// the pod.
	Listen(network, addr string) (net.Listener, error)
	ListenPacket(network, addr string) (net.PacketConn, error)
}

// Handler is who serves one pod. It may be called before Attach has returned; each call but AllowDatagram has a
// goroutine of its own, which may block.
type Handler interface {
	// ServeOutbound gets a connection that the pod's application opens, DNS over TCP as well.
	ServeOutbound(f proxy.Flow)
	// ServePassthrough gets a connection that the network opens to the pod, other than to the mesh's port.
	ServePassthrough(f proxy.Flow)
	// ServeProbe gets what ServePassthrough would, from a socket of the node's own: the kubelet asks whether the pod is
	// well, whatever policy says.
	ServeProbe(f proxy.Flow)
	// ServeMesh gets an accepted connection to the pod's mesh port, and returns when it has ended. at is the pod's
	// address that it is for, if it was accepted at one that is not the pod's; not valid otherwise.
	ServeMesh(conn net.Conn, at netip.AddrPort)
	// ServeDNS gets a UDP question of the pod's application to any nameserver.
	ServeDNS(q Query)
	// AllowDatagram judges a UDP flow that src begins, the network if inbound. It is asked on a device's reader, and
	// again when what is known has changed: it must not wait.
	AllowDatagram(inbound bool, src, dst netip.AddrPort) bool
}

// Query is a captured DNS question.
type Query interface {
	Payload() []byte
	// Dst is the nameserver that was asked.
	Dst() netip.AddrPort
	// Reply answers in that nameserver's name. A failed one is a lost packet.
	Reply(b []byte) error
}

// Pod is what is to be attached: known by its UID, whatever its name and wherever it lives.
type Pod struct {
	admin.PodSpec
	// Label is the pod in messages, logs and metrics: namespace/name. No two attached pods share one.
	Label string
	// File is the pod's network namespace as a descriptor, which stays the caller's; nil: NetNS names it.
	File *os.File
	// Place is filled in by Locate.
	Place Place
	// Memory is what may lie here for the pod's connections; nil: no bound.
	Memory *fair.Budget
}

// Status is how an attachment does.
type Status struct {
	Device  string      // "" for a kind without
	Offload tun.Offload // of the device
	Err     error       // why the device carries nothing any more
}

// NodeStats are the figures of what all pods share.
type NodeStats struct {
	Link        *netstack.LinkStats // of the node's device; nil: there is none
	Offload     tun.Offload         // of the node's device
	MeshUnknown uint64              // accepted mesh connections for an address that no pod has
}

// Door is who serves accepted mesh connections at an address: a pod, or the daemon itself, where it is one.
type Door struct {
	Label string
	At    netip.AddrPort // as ServeMesh's at
	Serve func(conn net.Conn, at netip.AddrPort)
}

// Options are what the composition root lends to a kind.
type Options struct {
	// NetNS is the node's namespace; nil: the process's own. (Tests have others.)
	NetNS *netns.NS
	// NodeTUN is the name of the node's device.
	NodeTUN string
	MTU     int // in bytes, of pods that have none of their own and of the node's device
	IPv6    bool
	// Record is the file in which a kind writes down the host's settings before it changes them, for `ztun node
	// clean`; "" for none.
	Record string
	// Plain has devices opened without offload.
	Plain bool
	// DNS has UDP questions of the pods captured.
	DNS bool
	// Socket is what the mesh's sockets have in common.
	Socket netns.SocketOptions
	// Stack is what the pods' stacks have in common: bounds and keepalive.
	Stack netstack.Config
	// Descriptors shares out what kernel sockets take.
	Descriptors *Descriptors
	// Store holds listeners beyond the end of this process; nil: there is none.
	Store *fdstore.Store
	// Self finds a Door at a local address that no pod has; nil: there is none.
	Self   func(local netip.Addr) (Door, bool)
	Report *fair.Report
	Panics *rescue.Panics
	// Serve runs f, which ends when what it serves is closed; any other end of it ends the daemon.
	Serve func(name string, f func() error)
	// Logger gives the logger of a target.
	Logger func(target string) *slog.Logger
}
