package connpath

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"testing"

	"ztun/tun"
)

// kernel is a pod's kernel and its application, as far as connections need one: a client that connects, takes one byte
// and closes when the server has, or that server. One goroutine, and no memory per connection but a map's entry.
type kernel struct {
	dev  tun.Device
	self netip.Addr
	dst  netip.AddrPort // of a client: whom it calls

	mu   sync.Mutex
	port uint16           // of the last connection
	open map[uint16]*conn // a client's, by our port; a server's, by the peer's
	free []*conn
	out  []byte
	call bool          // it is a client
	mute bool          // a server that says nothing until speak
	done chan struct{} // one of its connections has ended
}

type conn struct {
	peer     netip.AddrPort
	local    uint16
	snd, rcv uint32
	said     bool // the server's byte and FIN are out
	ended    bool // our FIN is out
}

// Flags of TCP.
const (
	fin = 1 << iota
	syn
	rst
	psh
	ack
)

// Lengths in bytes: IPv4, TCP, and the options that Linux sends with a SYN and with all else.
const (
	ipLen   = 20
	tcpLen  = 20
	synOpts = 20
	anyOpts = 12
)

// dial begins one connection.
func (k *kernel) dial() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for {
		if k.port++; k.port < 20000 {
			k.port = 20000
		}
		if k.open[k.port] == nil {
			break
		}
	}
	c := k.take()
	*c = conn{peer: k.dst, local: k.port, snd: 1000}
	k.open[k.port] = c
	k.send(c, syn, nil)
	c.snd++
}

func (k *kernel) take() *conn {
	if n := len(k.free); n > 0 {
		c := k.free[n-1]
		k.free = k.free[:n-1]
		return c
	}
	return new(conn)
}

func (k *kernel) drop(port uint16, c *conn) {
	delete(k.open, port)
	k.free = append(k.free, c)
	k.done <- struct{}{}
}

// send writes one packet. The checksum is left to whoever reads it, as kernels do towards a TUN with offload.
func (k *kernel) send(c *conn, flags byte, data []byte) {
	opts := anyOpts
	if flags&syn != 0 {
		opts = synOpts
	}
	n := ipLen + tcpLen + opts + len(data)
	b := k.out[:n]
	clear(b)
	b[0], b[8], b[9] = 0x45, 64, 6
	binary.BigEndian.PutUint16(b[2:], uint16(n))
	copy(b[12:], k.self.AsSlice())
	peer := c.peer.Addr().As4()
	copy(b[16:], peer[:])
	sum := uint32(0)
	for i := 0; i < ipLen; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	sum = sum&0xffff + sum>>16
	binary.BigEndian.PutUint16(b[10:], ^uint16(sum+sum>>16))
	t := b[ipLen:]
	binary.BigEndian.PutUint16(t, c.local)
	binary.BigEndian.PutUint16(t[2:], c.peer.Port())
	binary.BigEndian.PutUint32(t[4:], c.snd)
	binary.BigEndian.PutUint32(t[8:], c.rcv)
	t[12], t[13] = byte(tcpLen+opts)/4<<4, flags
	binary.BigEndian.PutUint16(t[14:], 64240)
	o := t[tcpLen:]
	if flags&syn != 0 { // MSS 1460, SACK permitted, timestamps, no-op, window scale 7
		copy(o, "\x02\x04\x05\xb4\x04\x02\x08\x0a\x00\x00\x00\x01\x00\x00\x00\x00\x01\x03\x03\x07")
	} else {
		copy(o, "\x01\x01\x08\x0a\x00\x00\x00\x01\x00\x00\x00\x01")
	}
	copy(o[opts:], data)
	h := tun.VNetHdr{Flags: tun.FlagNeedsCSum, CSumStart: ipLen, CSumOffset: 16}
	k.dev.WritePacket(&h, [][]byte{b}) // an error is the end of the test
}

// run answers until the device is closed.
func (k *kernel) run(t testing.TB) {
	buf := make([]byte, tun.MaxPacket)
	bufs := [][]byte{buf}
	var h tun.VNetHdr
	for {
		n, err := k.dev.ReadPacket(&h, bufs)
		if err != nil {
			return
		}
		b := buf[:n]
		if b[0]>>4 != 4 || b[9] != 6 {
			continue
		}
		s := b[ipLen:]
		flags := s[13]
		data := len(s) - int(s[12]>>4)*4
		from := netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[12:])), binary.BigEndian.Uint16(s))
		to := binary.BigEndian.Uint16(s[2:])
		seq := binary.BigEndian.Uint32(s[4:])
		k.mu.Lock()
		mine := to
		if !k.call {
			mine = from.Port()
		}
		if flags&rst != 0 {
			if k.open[mine] != nil { // not what ends a stack's TIME_WAIT
				t.Errorf("a reset from %v to port %d", from, to)
			}
		} else if k.call {
			k.client(to, flags, seq, data)
		} else {
			k.server(from, to, flags, seq, data)
		}
		k.mu.Unlock()
	}
}

func (k *kernel) client(port uint16, flags byte, seq uint32, data int) {
	c := k.open[port]
	switch {
	case c == nil: // what comes again
	case flags&syn != 0:
		c.rcv = seq + 1
		k.send(c, ack, nil)
	case c.ended: // the acknowledgement of our FIN
		if flags&fin == 0 {
			k.drop(port, c)
		}
	case data > 0 || flags&fin != 0:
		c.rcv = seq + uint32(data)
		if flags&fin == 0 {
			k.send(c, ack, nil)
			return
		}
		c.rcv++
		k.send(c, ack|fin, nil)
		c.snd++
		c.ended = true
	}
}

func (k *kernel) server(from netip.AddrPort, port uint16, flags byte, seq uint32, data int) {
	c := k.open[from.Port()]
	switch {
	case flags&syn != 0:
		if c == nil {
			c = k.take()
			k.open[from.Port()] = c
		}
		*c = conn{peer: from, local: port, snd: 5000, rcv: seq + 1}
		k.send(c, syn|ack, nil)
		c.snd++
	case c == nil:
	case flags&fin != 0:
		c.rcv = seq + uint32(data) + 1
		k.send(c, ack, nil)
		k.drop(from.Port(), c)
	case !c.said && !k.mute:
		k.say(c)
	}
}

// say sends a byte and a FIN.
func (k *kernel) say(c *conn) {
	c.said = true
	k.send(c, ack|psh, []byte{'x'})
	c.snd++
	k.send(c, ack|fin, nil)
	c.snd++
}

// hush has a server keep to itself what it has to say to those who come from now on.
func (k *kernel) hush() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.mute = true
}

// speak has a server say what it kept to itself.
func (k *kernel) speak() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.mute = false
	for _, c := range k.open {
		if !c.said {
			k.say(c)
		}
	}
}

// held is how many connections are open.
func (k *kernel) held() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.open)
}
