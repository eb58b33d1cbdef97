package netstack

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"ztun/proxy/rescue"
	"ztun/tun"
)

// flushTimeout bounds how long a closing stack waits for its last packets to be
// written.
const flushTimeout = 200 * time.Millisecond

// pump moves packets between one device and the ports on it: a reader that
// delivers inline, and a transmit queue.
type pump struct {
	dev tun.Device
	log *slog.Logger
	gso bool

	panics *rescue.Panics
	// at is the port that the reader is delivering to; nil: none. For who clears
	// up after a panic.
	at *port
	// fault is why the pump ends, if not because of its device.
	fault atomic.Pointer[error]

	// only is the one port of an App device; nil for an uplink, whose reader
	// asks route.
	only  *port
	route func(p *rxPacket) *port
	// back takes what is not for a stack at all; nil for an App device. See
	// icmpback.go.
	back func(bufs [][]byte, n int) bool
	// fragments bounds those for all pods; nil for an App device, whose only victim is the pod that sends them.
	fragments *fragmentBudget
	// unreachable looks at what is no TCP, in search of ICMP errors about SYNs that we sent; nil for an uplink.
	unreachable func(head []byte)
	packet      [][]byte // the reader's: what it passes on

	// batching has datagrams that wait for more of their kind, by try; nil: there is no Way, or the device has to be
	// waited for.
	batching *datagrams
	try      tun.TryReader

	tx txQueue

	closeOnce sync.Once
	stop      chan struct{} // closed to end the writer

	rx rxStats
}

type rxStats struct {
	packets, bytes                             atomic.Uint64
	malformed, notTCP, badChecksum, unknownDst atomic.Uint64
	returned, overFragments                    atomic.Uint64
}

func newPump(dev tun.Device, log *slog.Logger, panics *rescue.Panics) *pump {
	o := dev.Offload()
	return &pump{
		dev: dev,
		log: log, panics: panics,
		gso:  o.VNetHdr && o.CSum && o.TSO4 && o.TSO6,
		tx:   txQueue{wake: make(chan struct{}, 1)},
		stop: make(chan struct{}),
	}
}

// run reads until the device is closed; it owns the writer goroutine.
func (p *pump) run() error {
	var wg sync.WaitGroup
	wg.Go(p.panics.Func("a device's writer", p.writer, p.fail))
	err := p.reader()
	if fault := p.fault.Load(); fault != nil {
		err = *fault
	} else if errors.Is(err, os.ErrClosed) {
		err = nil
	} else if err != nil {
		err = fmt.Errorf("netstack: reading %s: %w", p.dev.Name(), err)
	}
	p.close()
	wg.Wait()
	p.tx.close()
	return err
}

// fail ends the pump: run returns err.
func (p *pump) fail(err error) {
	p.fault.CompareAndSwap(nil, &err)
	p.close()
}

// writer is the only writer of the device.
func (p *pump) writer() {
	for {
		select {
		case <-p.tx.wake:
			p.tx.drain(p.dev, p.gso)
		case <-p.stop:
			return
		}
	}
}

// reader is the only reader of the device. A panic at a packet ends the stack that
// the packet was for: of the node's device that is one pod's, and the others go on.
func (p *pump) reader() (err error) {
	for again := true; again; {
		again = false
		p.panics.Run("a device's reader", func() { err = p.read() }, func(cause error) {
			at := p.at
			p.at = nil
			switch {
			case at != nil:
				at.crashed(cause)
				again = at != p.only
			case p.only == nil:
				again = true // a packet of nobody's: it is dropped
			}
			err = cause
		})
	}
	return err
}

// read reads packets and delivers them.
func (p *pump) read() error {
	var (
		bufs rxBuffers
		vh   tun.VNetHdr
		pk   rxPacket
		syn  synID
	)
	defer bufs.release()
	vnet := p.dev.Offload().VNetHdr
	for {
		iov := bufs.prepare()
		n, err := p.next(&vh, iov)
		if err != nil {
			if errors.Is(err, tun.ErrShortBuffer) || errors.Is(err, tun.ErrTooManyBuffers) {
				p.rx.malformed.Add(1)
				continue
			}
			return err
		}
		p.rx.packets.Add(1)
		p.rx.bytes.Add(uint64(n))
		v := parseHead(iov[0][:min(n, headSize)], n, &pk)
		if v == rxDeliver && pk.tcp && !(vnet && vouched(&vh)) && !checksumValid(iov, n, &pk) {
			v = rxChecksum
		}
		switch v {
		case rxUDP:
			p.readUDP(&bufs, n, &pk, &vh)
			continue
		case rxMalformed:
			p.rx.malformed.Add(1)
			continue
		case rxNotTCP:
			p.rx.notTCP.Add(1)
			continue
		case rxChecksum:
			p.rx.badChecksum.Add(1)
			continue
		}
		if !pk.tcp && p.back != nil && p.back(iov, n) {
			continue
		}
		to := p.only
		if to == nil {
			if to = p.route(&pk); to == nil {
				p.rx.unknownDst.Add(1)
				continue
			}
		}
		if pk.tcp && p.passed(to, iov, n, &pk, &vh) {
			continue
		}
		if !pk.tcp {
			p.at = to
			carried := p.only == nil && to.shortcuts.passError(p, p.gather(iov, n), n, &vh) || to.carry(&bufs, n, &pk, &vh)
			p.at = nil
			if carried {
				continue
			}
			if foreignICMP(iov[0][:min(n, headSize)]) {
				p.rx.notTCP.Add(1)
				continue
			}
			if p.unreachable != nil {
				p.unreachable(iov[0][:min(n, headSize)])
			}
			knownICMP6(iov[0][:min(n, headSize)])
		}
		if pk.part && p.only == nil && !p.fragments.allow(pk.dst, time.Now()) {
			p.rx.overFragments.Add(1)
			continue
		}
		if pk.part && p.only != nil && to.dns != nil && !to.dns.allow() {
			continue // what it is a part of may be a query
		}
		if pk.syn {
			syn = synOf(iov[0], &pk)
		}
		pkt := bufs.packet(n, &pk)
		p.at = to
		if !pk.syn || !to.wait(syn, &pk, pkt) {
			to.deliver(pk.proto, pkt)
		}
		p.at = nil
	}
}

// passed passes a packet of a Shortcut's on; false: it is none.
func (p *pump) passed(to *port, bufs [][]byte, n int, pk *rxPacket, vh *tun.VNetHdr) bool {
	s, way := to.shortcuts.of(bufs[0], pk)
	if s == nil || s.sides[way].pump != p {
		return false
	}
	p.at = to
	passed := s.pass(way, p.gather(bufs, n), n, pk, vh)
	p.at = nil
	return passed
}

// gather are the n bytes of a packet in the reader's buffers, until the next read.
func (p *pump) gather(bufs [][]byte, n int) [][]byte {
	p.packet = append(p.packet[:0], bufs[0][:min(n, headSize)])
	if n > headSize {
		p.packet = append(p.packet, bufs[1][:n-headSize])
	}
	return p.packet
}

// write writes a packet of n bytes to the device at once, from any goroutine. What waits in the queue is of other
// connections, so it may come before that.
func (p *pump) write(vh *tun.VNetHdr, bufs [][]byte, n int) {
	p.tx.wrote(p.dev.WritePacket(vh, bufs), n)
}

// readUDP delivers a UDP packet that somebody here waits for, the DNS tap or a socket
// of DialUDP, and carries all other, unless the pod's are not carried: those are dropped.
func (p *pump) readUDP(bufs *rxBuffers, n int, pk *rxPacket, vh *tun.VNetHdr) {
	to := p.only
	if to == nil {
		to = p.route(pk)
	}
	if to != nil && !to.asksDNS(pk) {
		p.at = to
		carried := to.carry(bufs, n, pk, vh)
		p.at = nil
		if carried {
			return
		}
	}
	switch {
	case to == nil || !to.takesUDP(pk) || vh.GSOType != tun.GSONone: // nobody sends super-packets of DNS
		p.rx.notTCP.Add(1)
	case !(p.dev.Offload().VNetHdr && vouched(vh)) && !checksumValid(bufs.iov[:], n, pk):
		p.rx.badChecksum.Add(1)
	case to.asksDNS(pk) && !to.dns.allow(): // counted there
	default:
		p.at = to
		to.deliver(pk.proto, bufs.packet(n, pk))
		p.at = nil
	}
}

// send queues a packet that did not come from gVisor and consumes the caller's
// reference.
func (p *pump) send(pkt *stack.PacketBuffer) {
	one := [1]*stack.PacketBuffer{pkt}
	p.tx.push(one[:])
	pkt.DecRef()
}

// flush waits until the queue is empty, at most d.
func (p *pump) flush(d time.Duration) {
	for end := time.Now().Add(d); !p.tx.idle() && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
}

// close closes the device, which ends the reader, and tells the writer to end.
func (p *pump) close() {
	p.closeOnce.Do(func() {
		if err := p.dev.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
			p.log.Warn("netstack: closing device", "device", p.dev.Name(), "error", err)
		}
		close(p.stop)
	})
}
