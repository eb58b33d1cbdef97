package netstack

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"ztun/proxy/refusal"
)

// newPlain is a pair whose server is in the network: what the pod opens goes there by the node's device.
func newPlain(t *testing.T, mod func(*Config)) *pair {
	p := &pair{T: t, errs: make(chan error, 8), made: make(chan *Shortcut, 8), why: make(chan error, 8),
		clientA: families[0].client.Addr(), serverA: netip.MustParseAddr("192.0.2.9")}
	node, network := memPair(1500, false)
	up := NewUplink(node, nil, nil)
	ended := make(chan error, 1)
	go func() { ended <- up.Run(context.Background()) }()
	t.Cleanup(func() {
		up.Close()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	dev, far := memPair(1500, false)
	cfg := Config{App: dev, Uplink: up, Addrs: []netip.Addr{p.clientA}, Shortcuts: true}
	cfg.OnFlow = func(f *Flow) {
		p.took(f)(f.ShortcutPlain(context.Background(), netip.AddrPortFrom(p.serverA, f.Dst().Port())))
	}
	if mod != nil {
		mod(&cfg)
	}
	p.client, p.server = wire{t, far}, wire{t, network}
	s := startStack(t, cfg)
	p.stacks = [2]*Stack{s, s}
	return p
}

// TestShortcutPlain: a connection to the network passes by both devices, and what each device brings is only what its
// own side can have sent.
func TestShortcutPlain(t *testing.T) {
	p := newPlain(t, nil)
	c, s, cut := p.stand(4000, 100)
	if st := p.stacks[0].Stats(); st.Shortcuts != 1 || st.ShortcutsBegun != 1 {
		t.Errorf("%d shortcuts, %d begun", st.Shortcuts, st.ShortcutsBegun)
	}
	p.server.send(s, c, fACK, 901, 101)
	p.saw(p.client, "a packet of the network's", s, c, fACK, 901, 101)
	// The network in the client's name, and the pod in the network's: nothing of it passes.
	p.server.send(c, s, fRST, 101, 0)
	p.client.send(s, c, fRST, 901, 0)
	p.client.send(c, s, fACK, 101, 901)
	p.saw(p.server, "the client's next packet", c, s, fACK, 101, 901)
	cut.Reset()
	p.saw(p.server, "the cut", c, s, fRST|fACK, 101, 901)
	p.saw(p.client, "the cut", s, c, fRST|fACK, 901, 101)
	p.empty()
}

// TestShortcutPlainErrors: routers' errors go to the kernel whose packet they are about, or are why there is no
// connection.
func TestShortcutPlainErrors(t *testing.T) {
	p := newPlain(t, nil)
	c, s, cut := p.stand(4000, 100)
	sent := bareTCP(c, s, &header.TCPFields{SeqNum: 101, AckNum: 901, Flags: fACK}, nil)
	tooLarge := icmpError(sent, refusal.AdminProhibited)
	h := header.ICMPv4(tooLarge[header.IPv4MinimumSize:])
	h.SetCode(header.ICMPv4FragmentationNeeded)
	h.SetMTU(1400)
	h.SetChecksum(0)
	h.SetChecksum(header.ICMPv4Checksum(h[:header.ICMPv4MinimumSize], 0))
	p.server.dev.inject(tooLarge)
	got := <-p.client.dev.in
	if string(got.b) != string(tooLarge) {
		t.Errorf("the pod got %x, the network sent %x", got.b, tooLarge)
	}
	// About a packet that was never sent by that port: nobody's.
	p.server.dev.inject(icmpError(bareTCP(netip.AddrPortFrom(c.Addr(), 4444), s, &header.TCPFields{Flags: fACK}, nil),
		refusal.HostUnreachable))
	p.client.send(c, s, fACK, 101, 901)
	p.saw(p.server, "the connection, which stands", c, s, fACK, 101, 901)
	cut.Reset()
	p.saw(p.server, "the cut", c, s, fRST|fACK, 101, 901)
	p.saw(p.client, "the cut", s, c, fRST|fACK, 901, 101)

	for why, want := range map[refusal.Way]syscall.Errno{refusal.HostUnreachable: syscall.EHOSTUNREACH,
		refusal.NetUnreachable: syscall.ENETUNREACH, refusal.AdminProhibited: syscall.EHOSTUNREACH} {
		p.client.send(c, s, fSYN, 300, 0)
		p.saw(p.server, "the SYN", c, s, fSYN, 300, 0)
		p.server.dev.inject(icmpError(bareTCP(c, s, &header.TCPFields{SeqNum: 300, Flags: fSYN}, nil), why))
		if err := <-p.errs; !errors.Is(err, want) {
			t.Errorf("%v: %v", why, err)
		}
		p.saw(p.client, "the refusal", s, c, fRST|fACK, 0, 301)
		p.empty()
	}
}

// TestShortcutBlindReset: of the network's resets only the one with the number that the client awaits ends anything; of
// another the client is asked, and its answer tells.
func TestShortcutBlindReset(t *testing.T) {
	p := newPlain(t, nil)
	c, s, _ := p.stand(4000, 100)
	p.server.send(s, c, fACK, 901+1<<20, 101) // anybody's, to make a wide space of what may be on its way
	p.saw(p.client, "somebody's segment", s, c, fACK, 901+1<<20, 101)
	p.server.send(s, c, fRST, 901+5000, 0)
	p.saw(p.client, "somebody's reset", s, c, fRST, 901+5000, 0)
	p.saw(p.client, "the question", s, c, fACK, 900, 101)
	p.client.send(c, s, fACK, 101, 901) // the connection lives
	p.saw(p.server, "the answer", c, s, fACK, 101, 901)
	p.server.send(s, c, fRST, 901, 0)
	p.saw(p.client, "the peer's reset", s, c, fRST, 901, 0)
	p.empty()
}

// TestShortcutOddPackets: fragments, and packets with IP options, are a part of the connection, too.
func TestShortcutOddPackets(t *testing.T) {
	p := newPlain(t, nil)
	c, s, cut := p.stand(4000, 100)
	b := append(bareTCP(s, c, &header.TCPFields{SeqNum: 901, AckNum: 101, Flags: fACK, WindowSize: 777}, nil),
		bytes.Repeat([]byte("ztun"), 300)...)
	sealTCP(b)
	// With an IP option.
	odd := append(append(bytes.Clone(b[:20]), 1, 1, 1, 1), b[20:]...)
	h := header.IPv4(odd)
	h.SetHeaderLength(24)
	h.SetTotalLength(uint16(len(odd)))
	h.SetChecksum(0)
	h.SetChecksum(^h.CalculateChecksum())
	// And in two fragments.
	const cutAt = 800
	first, second := bytes.Clone(b[:20+cutAt]), append(bytes.Clone(b[:20]), b[20+cutAt:]...)
	for i, f := range [][]byte{first, second} {
		h := header.IPv4(f)
		h.SetID(77)
		h.SetTotalLength(uint16(len(f)))
		if i == 0 {
			h.SetFlagsFragmentOffset(header.IPv4FlagMoreFragments, 0)
		} else {
			h.SetFlagsFragmentOffset(0, cutAt)
		}
		h.SetChecksum(0)
		h.SetChecksum(^h.CalculateChecksum())
	}
	for _, packets := range [][][]byte{{odd}, {first, second}, {second, first}} {
		for _, f := range packets {
			p.server.dev.inject(f)
		}
		select {
		case got := <-p.client.dev.in:
			if !bytes.Equal(got.b, b) {
				t.Errorf("the pod got\n%x, want\n%x", got.b, b)
			}
		case <-time.After(patience):
			t.Fatal("nothing came")
		}
	}
	cut.Reset()
	p.empty()
}

// TestNoShortcutPlain: what is left to a copy.
func TestNoShortcutPlain(t *testing.T) {
	for _, x := range []struct {
		name   string
		port   uint16
		actual string
		mod    func(*Config)
	}{
		{"from a port of the mesh's own", MeshPortMin, "192.0.2.9", nil},
		{"to another address than was called", 4000, "192.0.2.10", nil},
		{"with TCP_USER_TIMEOUT", 4000, "192.0.2.9", func(c *Config) { c.UserTimeout = 1 }},
		{"switched off", 4000, "192.0.2.9", func(c *Config) { c.Shortcuts = false }},
	} {
		p := newPlain(t, x.mod)
		p.serverA = netip.MustParseAddr(x.actual)
		p.client.send(netip.AddrPortFrom(p.clientA, x.port), netip.MustParseAddrPort("192.0.2.9:80"), fSYN, 5, 0)
		if err := <-p.errs; err != ErrNoShortcut {
			t.Errorf("%s: %v", x.name, err)
		}
		p.empty()
	}
}

// TestShortcutKeepaliveOff: with KEEPALIVE_ENABLED=false nothing is sent to the network that nobody asked for.
func TestShortcutKeepaliveOff(t *testing.T) {
	p := newPlain(t, func(c *Config) {
		c.KeepaliveIdle, c.KeepaliveInterval, c.KeepaliveCount = 1, 1, 1<<20
		c.KeepaliveOff = true
	})
	p.stacks[0].shortcuts.tick = 5 * time.Millisecond
	c, s, _ := p.stand(4000, 100)
	for range 3 {
		p.saw(p.client, "a probe", s, c, fACK, 900, 101)
	}
	p.client.send(c, s, fACK, 101, 901)
	p.saw(p.server, "the client's answer, and nothing before", c, s, fACK, 101, 901)
}
