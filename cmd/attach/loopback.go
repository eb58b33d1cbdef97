package attach

import (
	"net"

	"ztun/tun/netns"
)

// Loopback is how kinds open sockets in a pod's namespace: kernel sockets, as loopback never reaches a TUN.
type Loopback struct{ NS *netns.NS }

// Listen implements Ways.
func (l Loopback) Listen(network, addr string) (ln net.Listener, err error) {
	err = l.NS.Do(func() error {
		ln, err = net.Listen(network, addr)
		return err
	})
	return ln, err
}

// ListenPacket implements Ways.
func (l Loopback) ListenPacket(network, addr string) (c net.PacketConn, err error) {
	err = l.NS.Do(func() error {
		c, err = net.ListenPacket(network, addr)
		return err
	})
	return c, err
}
