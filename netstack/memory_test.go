package netstack

import (
	"bytes"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"ztun/proxy/fair"
	"ztun/tun"
)

// sizesOf are the sizes in force: what a new connection begins with, and how far buffers grow.
func sizesOf(t *testing.T, s *Stack) (rcv tcpip.TCPReceiveBufferSizeRangeOption,
	snd tcpip.TCPSendBufferSizeRangeOption) {
	t.Helper()
	gs, err := s.app.stack()
	if err != nil {
		t.Fatal(err)
	}
	if err := gs.TransportProtocolOption(tcp.ProtocolNumber, &rcv); err != nil {
		t.Fatal(err)
	}
	if err := gs.TransportProtocolOption(tcp.ProtocolNumber, &snd); err != nil {
		t.Fatal(err)
	}
	return rcv, snd
}

// TestBuffersOfCrowds: few connections may grow large buffers, more do not, and of many each begins small; and back.
func TestBuffersOfCrowds(t *testing.T) {
	j := join(t, true, nil)
	mtu := j.client.cfg.MTU
	first, grown := receiveBuffer(defaultReceivePackets, mtu), receiveBuffer(defaultMaxReceivePackets, mtu)
	crowded := receiveBuffer(crowdedReceivePackets, mtu)
	want := func(conns int, first, most, send int) {
		t.Helper()
		for _, s := range []*Stack{j.client, j.server} {
			rcv, snd := sizesOf(t, s)
			if rcv.Default != first || rcv.Max != most || snd.Default != send {
				t.Errorf("%d connections: receive buffers of %d to %d, send buffers of %d; want %d to %d and %d", conns,
					rcv.Default, rcv.Max, snd.Default, first, most, send)
			}
		}
	}
	var open []*Conn
	more := func(n int) {
		for len(open) < 2*n {
			a, b := j.pipe(t, families[0])
			open = append(open, a, b)
		}
	}
	more(fewConns)
	want(fewConns, first, grown, defaultSendBuffer)
	more(fewConns + 1)
	want(fewConns+1, first, crowded, defaultSendBuffer)
	more(manyConns + 1)
	want(manyConns+1, manyBuffer, crowded, manyBuffer)
	for _, c := range open[2:] {
		c.Reset()
	}
	want(1, first, grown, defaultSendBuffer)
}

// TestTightMemory: connections that are not read charge the pod's budget; at the bound what others hold stays small,
// flows go on, and none is lost; afterwards nothing is charged, and buffers are as before.
func TestTightMemory(t *testing.T) {
	budget := fair.NewBudget(nil, 4<<20)
	j := join(t, true, func(_, server *Config) { server.Memory = budget })
	const conns = 40
	data := make([]byte, 1<<20)
	for i := range data {
		data[i] = byte(rand.Uint32())
	}
	var wg sync.WaitGroup
	var deaf []*Conn
	for range conns {
		client, server := j.pipe(t, families[0])
		deaf = append(deaf, client)
		wg.Go(func() { // towards a client that does not read
			server.Write(data)
			server.CloseWrite()
			io.Copy(io.Discard, server)
			server.Close()
		})
		time.Sleep(10 * time.Millisecond) // time to fill
		j.server.Weigh()
	}
	eventually(t, "a budget that connections which nobody reads have used up", func() bool {
		j.server.Weigh()
		return budget.Tight()
	})
	held := budget.Used()
	// The first have what they began with; without the bound it is half a MiB each.
	if most := int64(8 << 20); held > most {
		t.Errorf("%d bytes are held, with a budget of %d", held, budget.Limit())
	}
	client, server := j.pipe(t, families[0])
	wg.Go(func() { server.Write(data); server.Close() })
	if got := readAll(t, client); !bytes.Equal(got, data) {
		t.Errorf("a connection beside them got %d bytes of %d", len(got), len(data))
	}
	client.Close()
	for i, c := range deaf {
		if got := readAll(t, c); !bytes.Equal(got, data) {
			t.Fatalf("connection %d got %d bytes of %d", i, len(got), len(data))
		}
		if i == conns/2 {
			j.server.Weigh()
		}
		c.Close()
	}
	wg.Wait()
	j.server.Weigh()
	if used := budget.Used(); used != 0 {
		t.Errorf("%d bytes are charged without a connection", used)
	}
	if rcv, _ := sizesOf(t, j.server); rcv.Default != receiveBuffer(defaultReceivePackets, j.server.cfg.MTU) {
		t.Errorf("receive buffers stay at %d", rcv.Default)
	}
	j.pipe(t, families[0])
	j.server.Weigh()
	if budget.Used() == 0 {
		t.Error("a connection weighs nothing")
	}
	j.server.Close()
	j.server.Weigh()
	if used := budget.Used(); used != 0 {
		t.Errorf("%d bytes are charged for a stack that is closed", used)
	}
}

// TestReceiveBufferHoldsWholePackets: the window that a buffer gives, in the 64 bytes in which it is told, has room for
// whole super-packets and nothing that a kernel would send beside them.
func TestReceiveBufferHoldsWholePackets(t *testing.T) {
	for _, mtu := range []int{minMTU, 1450, 1500, 8951, 9000, 16384, maxMTU} {
		mss := mtu - 52
		full := max(1, tun.SuperPayload/mss) * mss
		for _, packets := range []int{1, defaultReceivePackets, defaultMaxReceivePackets} {
			window := receiveBuffer(packets, mtu) / 2 &^ 63
			if window/full != packets || window%full >= mss {
				t.Errorf("MTU %d: a window of %d is %d packets of %d and %d bytes, want %d and less than a segment", mtu, window,
					window/full, full, window%full, packets)
			}
		}
	}
}
