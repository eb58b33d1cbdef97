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
	want := func(conns int, first, most int) {
		t.Helper()
		for _, s := range []*Stack{j.client, j.server} {
			rcv, snd := sizesOf(t, s)
			if rcv.Default != first || rcv.Max != most || snd.Default != first {
				t.Errorf("%d connections: receive buffers of %d to %d, send buffers of %d; want %d to %d", conns, rcv.Default,
					rcv.Max, snd.Default, first, most)
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
	want(fewConns, defaultReceiveBuffer, defaultMaxReceiveBuffer)
	more(fewConns + 1)
	want(fewConns+1, defaultReceiveBuffer, crowdedReceiveBuffer)
	more(manyConns + 1)
	want(manyConns+1, manyBuffer, crowdedReceiveBuffer)
	for _, c := range open[2:] {
		c.Reset()
	}
	want(1, defaultReceiveBuffer, defaultMaxReceiveBuffer)
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
	if rcv, _ := sizesOf(t, j.server); rcv.Default != defaultReceiveBuffer {
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
