package netstack

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"ztun/proxy/fair"
	"ztun/proxy/rescue"
	"ztun/tun"
)

// Config says what a Stack is made of. The zero value of every field from
// MaxInFlight on means its default.
type Config struct {
	// Addrs are the pod's own addresses, at most one per family is used as a
	// source by DialPlain (the first of its family). A flow is inbound iff its
	// destination is one of them. At least one is needed.
	Addrs []netip.Addr
	// MTU in bytes of both links; zero means the App device's.
	MTU int
	// App is the TUN in the pod. The Stack owns it from a successful New on and
	// closes it in Close.
	App tun.Device
	// Uplink is the node's TUN, shared by all pods and not owned; nil means
	// that this stack has no way to the network of its own (DialPlain then
	// fails with ENETUNREACH).
	Uplink *Uplink
	// UplinkIsApp makes the App device the way to the network as well: the
	// steered mode, where both directions share one TUN. Uplink must be nil.
	UplinkIsApp bool
	// OnFlow is called in a goroutine of its own for every SYN that opens a new
	// flow. It must call Accept or Refuse before it returns; a flow left
	// undecided is refused with a reset.
	OnFlow func(*Flow)
	// OnDNS, if set, gets every UDP packet that the pod's application sends to
	// port 53 of an address not its own, each in a goroutine of its own, which may
	// block (the query counts against MaxDNS until it returns). TCP to port 53
	// is a Flow like any other. Nil: such packets are dropped like other UDP.
	OnDNS func(*DNSQuery)
	// Datagrams, if set, has the pod's UDP and ICMP carried. Nil: they are dropped.
	Datagrams *Datagrams
	// Shortcuts lets packets of this pod's connections to other pods of the process pass as they are (Flow.Shortcut),
	// where both pods' stacks have it. UplinkIsApp must be false: the pod's kernel tells by ports what is a proxy's.
	Shortcuts bool
	// Panics catches those of the stack's goroutines; nil: nobody does. One in a
	// connection's ends that, one in the stack's own work ends the stack (Run says
	// so). gVisor starts goroutines of its own, whose panics cannot be caught.
	Panics *rescue.Panics
	// Memory is charged with what connections hold (Weigh). While it is tight their buffers are small. nil: no bound.
	Memory *fair.Budget
	// Logger for what counters cannot say; nil discards.
	Logger *slog.Logger

	// OnBound, if set, is told of every flow and query that a bound turned away: evicted after it had its place, or not
	// taken. source is whom it was charged to. It must not wait.
	OnBound func(resource, source string, evicted bool)

	// MaxInFlight bounds flows that await a verdict or their client's part of the handshake (default 4096), in each of
	// the two directions for itself; half of them are for parties that have answered lately.
	MaxInFlight int
	// MaxInFlightPerDst bounds them per destination address and port, or per client of what comes from the network
	// (default 2048).
	MaxInFlightPerDst int
	// MaxDNS bounds the calls of OnDNS that have not returned (default 1024; their
	// payloads are bounded to 4 MiB). Packets beyond are dropped and counted.
	MaxDNS int

	// DNSRate bounds the packets to port 53 per second (default 1000; at once twice as many). What is beyond is dropped
	// where it is read, and counted with what MaxDNS drops.
	DNSRate int

	// Keepalive of every connection (ztunnel's defaults: 180 s, 180 s, 9).
	KeepaliveIdle     time.Duration
	KeepaliveInterval time.Duration
	KeepaliveCount    int
	// KeepaliveOff turns it off towards the network.
	KeepaliveOff bool
	// UserTimeout bounds how long data sent to the network may stay
	// unacknowledged (TCP_USER_TIMEOUT); 0 leaves it to retransmission.
	UserTimeout time.Duration

	// ReceiveBuffer and SendBuffer are the bytes a connection starts with, the
	// Max ones what moderation may raise them to. Half of a receive buffer is
	// advertised as window.
	ReceiveBuffer, MaxReceiveBuffer int
	SendBuffer, MaxSendBuffer       int

	// Ports is the range from which source ports are drawn; zero means
	// 16384-60999, below those of the mesh's own calls (MeshPortMin): what comes
	// from port 15008 to one of those is taken for the kernel's sockets.
	PortMin, PortMax uint16

	// CloseTimeout bounds how long Close waits for OnFlow goroutines (default 5 s).
	CloseTimeout time.Duration
}

// Defaults, each with its reason.
const (
	// A burst of 2,000 connects, to one destination or to as many, passes without a SYN being sent again.
	defaultMaxInFlight       = 4096
	defaultMaxInFlightPerDst = 2048
	defaultMaxDNS            = 1024
	// A query that is passed on costs some 100 us of processor in all: a tenth of one processor.
	defaultDNSRate = 1000

	// ztunnel's socket defaults (KEEPALIVE_TIME, KEEPALIVE_INTERVAL, KEEPALIVE_RETRIES).
	defaultKeepaliveIdle     = 180 * time.Second
	defaultKeepaliveInterval = 180 * time.Second
	defaultKeepaliveCount    = 9

	// The other end is a kernel a few microseconds away: what is buffered here
	// adds delay and leaves the cache. Below half a megabyte the goroutines on
	// the path are woken for every packet or two. Two megabytes are better for
	// a stream that is alone; but what all connections of a pod have in flight
	// waits in one device queue, and a small request behind it, so beyond a few
	// connections the buffers stay at half a megabyte (8 bulk streams: 2 MiB
	// gave 9 % more throughput and an echo of 16 ms beside it, 512 KiB one of
	// 8 ms; scripts/bench mixed, 2026-11-23).
	//
	// They are counted in super-packets of the pod's kernel (receiveBuffer).
	defaultReceivePackets    = 4
	defaultMaxReceivePackets = 16
	crowdedReceivePackets    = 4
	fewConns                 = 4
	// Beyond so many connections a new one begins with small buffers and has to earn larger ones: what reads nothing
	// costs little then (2,000 such connections: 0.45 MiB each before).
	manyConns  = 64
	manyBuffer = 64 << 10
	// What a connection has while memory is tight.
	tightBuffer          = 32 << 10
	defaultSendBuffer    = 512 << 10
	defaultMaxSendBuffer = 2 << 20

	defaultPortMin, defaultPortMax = 16384, MeshPortMin - 1

	defaultCloseTimeout = 5 * time.Second
	minMTU              = 1280 // RFC 8200 section 5: an IPv6 link's smallest
	maxMTU              = 65535
)

func (c *Config) fill() error {
	if c.App == nil {
		return errors.New("netstack: no App device")
	}
	if c.OnFlow == nil {
		return errors.New("netstack: no OnFlow")
	}
	if c.Uplink != nil && c.UplinkIsApp {
		return errors.New("netstack: both Uplink and UplinkIsApp given")
	}
	if c.Datagrams != nil && (c.Uplink == nil) == (c.Datagrams.Way == nil) {
		return errors.New("netstack: datagrams have an Uplink or a Way, one of them")
	}
	if c.Shortcuts && c.UplinkIsApp {
		return errors.New("netstack: both Shortcuts and UplinkIsApp given")
	}
	if len(c.Addrs) == 0 {
		return errors.New("netstack: no pod address")
	}
	for i, a := range c.Addrs {
		if a = a.Unmap(); !a.IsValid() || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() || a.Zone() != "" {
			return fmt.Errorf("netstack: %v cannot be a pod's address", a)
		}
		c.Addrs[i] = a
	}
	if c.MTU == 0 {
		c.MTU = c.App.MTU()
	}
	if c.MTU < minMTU || c.MTU > maxMTU {
		return fmt.Errorf("netstack: MTU %d is outside %d-%d", c.MTU, minMTU, maxMTU)
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	orInt(&c.MaxInFlight, defaultMaxInFlight)
	orInt(&c.MaxInFlightPerDst, defaultMaxInFlightPerDst)
	orInt(&c.MaxDNS, defaultMaxDNS)
	orInt(&c.DNSRate, defaultDNSRate)
	orInt(&c.KeepaliveCount, defaultKeepaliveCount)
	orInt(&c.ReceiveBuffer, receiveBuffer(defaultReceivePackets, c.MTU))
	orInt(&c.MaxReceiveBuffer, max(receiveBuffer(defaultMaxReceivePackets, c.MTU), c.ReceiveBuffer))
	orInt(&c.SendBuffer, defaultSendBuffer)
	orInt(&c.MaxSendBuffer, max(defaultMaxSendBuffer, c.SendBuffer))
	orDuration(&c.KeepaliveIdle, defaultKeepaliveIdle)
	orDuration(&c.KeepaliveInterval, defaultKeepaliveInterval)
	orDuration(&c.CloseTimeout, defaultCloseTimeout)
	if c.PortMin == 0 && c.PortMax == 0 {
		c.PortMin, c.PortMax = defaultPortMin, defaultPortMax
	}
	if c.PortMin == 0 || c.PortMax < c.PortMin {
		return fmt.Errorf("netstack: bad port range %d-%d", c.PortMin, c.PortMax)
	}
	return nil
}

// receiveBuffer is the buffer whose window has room for so many super-packets of the pod's kernel and half a segment,
// with which the kernel does nothing: windows of a power of two ended in a packet of one segment each, a fifth of all.
// gVisor tells half of a buffer as window.
func receiveBuffer(packets, mtu int) int {
	const headers = header.IPv4MinimumSize + header.TCPMinimumSize + 12 // with timestamps
	mss := mtu - headers
	return 2 * (packets*max(1, tun.SuperPayload/mss)*mss + mss/2)
}

func orInt(v *int, def int) {
	if *v <= 0 {
		*v = def
	}
}

func orDuration(v *time.Duration, def time.Duration) {
	if *v <= 0 {
		*v = def
	}
}
