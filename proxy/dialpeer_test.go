package proxy

import (
	"context"
	"io"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// firstNetwork gives the first call of the mesh a connection of its own.
type firstNetwork struct {
	Network
	first func() net.Conn
	dials *atomic.Int32
}

func (n firstNetwork) DialMesh(ctx context.Context, dst netip.AddrPort) (net.Conn, error) {
	if n.dials.Add(1) == 1 {
		return n.first(), nil
	}
	return n.Network.DialMesh(ctx, dst)
}

// resetAfter is a connection whose far end says nothing for a while, and then does not know of it.
type resetAfter struct {
	net.Conn
	silence time.Duration
}

func (c resetAfter) Read([]byte) (int, error) {
	time.Sleep(c.silence)
	return 0, &net.OpError{Op: "read", Net: "tcp", Err: os.NewSyscallError("read", syscall.ECONNRESET)}
}

// A tunnel that was under way when its peer's process ended is made anew with the next one; a peer that resets it at
// once, as one does that is full, is not asked again.
func TestPeerEndsDuringHandshake(t *testing.T) {
	if dials, err := resetting(t, 2*silentFor); dials != 2 || err != nil {
		t.Errorf("after a silence: %d dials, %v", dials, err)
	}
	for range 5 { // on a machine that stands still for so long what is said at once comes late as well
		if dials, err := resetting(t, 0); dials == 1 && err != nil {
			return
		}
	}
	t.Error("who resets at once is asked again")
}

// resetting has an application connect to a peer that resets the first tunnel after a silence, and returns how many
// were dialled.
func resetting(t *testing.T, silence time.Duration) (int32, error) {
	t.Helper()
	var dials atomic.Int32
	w := newWorldWith(t, func(_ *world, i int, o *Options) {
		if i != 0 {
			return
		}
		o.Network = firstNetwork{o.Network, func() net.Conn {
			near, far := net.Pipe()
			go io.Copy(io.Discard, far)
			t.Cleanup(func() { near.Close(); far.Close() })
			return resetAfter{near, silence}
		}, &dials}
	})
	w.listen(appB, echo)
	app, _, done, err := w.connect(w.proxies[0].ServeOutbound, srcA, "10.91.2.2:9000")
	if err == nil {
		roundTrip(t, app)
		app.Close()
		<-done
	}
	return dials.Load(), err
}
