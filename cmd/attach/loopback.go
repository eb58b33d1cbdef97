package attach

import (
	"net"

	"ztun/tun/netns"
)

// Loopback is how kinds open sockets in a pod's namespace: kernel sockets, as loopback never reaches a TUN.
type Loopback struct {
	NS      *netns.NS
	Options *Options
}

// Listen implements Ways.
func (l Loopback) Listen(network, addr string) (net.Listener, error) {
	return l.Options.Listen(l.NS, network, addr, netns.SocketOptions{})
}

// ListenPacket implements Ways.
func (l Loopback) ListenPacket(network, addr string) (net.PacketConn, error) {
	return l.Options.ListenPacket(l.NS, network, addr, netns.SocketOptions{})
}
