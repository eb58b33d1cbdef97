package proxy

import (
	"context"
	"net"
	"net/netip"

	"ztun/proxy/identity"
	"ztun/proxy/refusal"
	"ztun/proxy/state"
)

// Flow is a TCP SYN that awaits its verdict. Exactly one of Accept and Refuse is called, once.
type Flow interface {
	// Src is the sender of the SYN.
	Src() netip.AddrPort
	// Dst is where the SYN was going.
	Dst() netip.AddrPort
	// Accept completes the handshake. It fails when the sender has given up meanwhile.
	Accept() (Conn, error)
	// Refuse answers the SYN the way r calls for.
	Refuse(r refusal.Way)
	// Again reports whether this is the sender's next SYN of an attempt that was refused with refusal.Silent before.
	Again() bool
	// OnGone has f called once when the flow loses its place to others before it is accepted or refused, at once if it
	// has: what is under way for it is to end. f must not wait. A later f takes the place of an earlier one.
	OnGone(f func())
}

// shortcutFlow is a Flow whose packets can go to another pod of this process, or to the network, as they are.
type shortcutFlow interface {
	Src() netip.AddrPort
	// Shortcut has the flow's packets pass to dst of the pod that to is of, and waits for the application's kernel to
	// answer: its errors are DialApp's, and the flow is still to be refused. Neither result: they cannot pass there.
	Shortcut(ctx context.Context, to Network, dst netip.AddrPort) (Shortcut, error)
	// ShortcutPlain is the same to dst in the network: its errors are DialPlain's.
	ShortcutPlain(ctx context.Context, dst netip.AddrPort) (Shortcut, error)
}

// Shortcut is a connection whose packets pass by themselves, from one pod's device to another's.
type Shortcut interface {
	// Accept is the flow's, without waiting for the client.
	Accept() error
	// Watch has carried called with bytes that have arrived, each once, and ended once, at once if it has ended: with nil
	// if the applications have ended it, also by resets, net.ErrClosed if Reset has. carried must not wait.
	Watch(carried func(forth bool, n int), ended func(error))
	// Reset ends both sides by a reset.
	Reset()
}

// Conn is a byte stream with two independent directions.
type Conn interface {
	net.Conn
	// CloseWrite ends our direction and leaves the other open.
	CloseWrite() error
}

// Network is one pod's ways out.
type Network interface {
	// DialApp connects to the pod's application at dst; it sees src.Addr() as its client (the port is ours).
	DialApp(ctx context.Context, src, dst netip.AddrPort) (Conn, error)
	// ProbeApp asks whether DialApp would reach somebody, without the application noticing. Its errors are DialApp's.
	ProbeApp(ctx context.Context, src netip.Addr, dst netip.AddrPort) error
	// DialMesh connects to a peer's HBONE port from the pod's own address.
	DialMesh(ctx context.Context, dst netip.AddrPort) (net.Conn, error)
	// DialPlain connects to a destination outside the mesh from the pod's own address.
	DialPlain(ctx context.Context, dst netip.AddrPort) (Conn, error)
}

// Knowledge is what the control side publishes.
type Knowledge interface {
	// View is the newest published state; never nil, immutable.
	View() *state.View
	// Changed is closed when a newer View than that of the last call of View may exist.
	Changed() <-chan struct{}
}

// Certificates hands out the current certificate of an identity, fetching it when there is none.
type Certificates interface {
	Certificate(ctx context.Context, id identity.ID) (*identity.Certificate, error)
}

// Resolver resolves workloads that have a hostname instead of an address (spec 2.6).
type Resolver interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}
