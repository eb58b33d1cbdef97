package netstack

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"

	"ztun/proxy/fair"
	"ztun/proxy/rescue"
	"ztun/tun"
)

// Uplink shares the node's TUN among the stacks of its pods: one reader, which
// finds the pod by the packet's destination address, and one transmit queue.
// ICMP errors about the mesh's own connections, which are the kernel's, it gives
// back to the kernel (icmpback.go).
type Uplink struct {
	pump *pump
	// flows are the places of all pods' datagram flows.
	flows *fair.Ledger[*datagrams]

	mu sync.Mutex // serialises changes of the table
	// table is replaced, never changed: the reader looks up without a lock.
	table   atomic.Pointer[map[netip.Addr]*port]
	running atomic.Bool
	runDone chan struct{}
}

// ErrAddressTaken is what New returns when another stack of the same Uplink has
// one of the addresses.
var ErrAddressTaken = errors.New("address belongs to another pod")

// NewUplink takes over dev, which Close closes. panics catches them (nil: nobody does): one at a pod's packet then ends
// that pod's stack.
func NewUplink(dev tun.Device, panics *rescue.Panics, log *slog.Logger) *Uplink {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	u := &Uplink{pump: newPump(dev, log, panics), runDone: make(chan struct{})}
	u.table.Store(&map[netip.Addr]*port{})
	u.pump.route = func(p *rxPacket) *port { return (*u.table.Load())[p.dst] }
	u.pump.back = u.giveBack
	u.pump.fragments = newFragmentBudget()
	u.flows = fair.NewLedger(fair.LedgerOptions[*datagrams]{Limit: nodeFlows, Turned: (*datagrams).nodeTurned})
	return u
}

// Run moves packets until Close, until ctx ends (which closes the Uplink) or
// until the device fails, whose error it returns. At most once.
func (u *Uplink) Run(ctx context.Context) error {
	if u.running.Swap(true) {
		return errors.New("netstack: Uplink.Run called twice")
	}
	defer close(u.runDone)
	defer context.AfterFunc(ctx, u.pump.panics.Func("the end of the uplink", u.pump.close, nil))()
	return u.pump.run()
}

// Close flushes what is queued, closes the device and waits for Run. Stacks
// that are still attached can send and receive nothing from then on.
func (u *Uplink) Close() error {
	u.pump.flush(flushTimeout)
	u.pump.close()
	if u.running.Load() {
		<-u.runDone
	} else {
		u.pump.tx.close()
	}
	return nil
}

func (u *Uplink) attach(addrs []netip.Addr, p *port) error {
	return u.change(func(t map[netip.Addr]*port) error {
		for _, a := range addrs {
			if q := t[a]; q != nil && q != p {
				return fmt.Errorf("netstack: %v: %w", a, ErrAddressTaken)
			}
			t[a] = p
		}
		return nil
	})
}

func (u *Uplink) detach(addrs []netip.Addr, p *port) {
	u.change(func(t map[netip.Addr]*port) error {
		for _, a := range addrs {
			if t[a] == p {
				delete(t, a)
			}
		}
		return nil
	})
}

func (u *Uplink) change(f func(map[netip.Addr]*port) error) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	old := *u.table.Load()
	t := make(map[netip.Addr]*port, len(old)+2)
	for a, p := range old {
		t[a] = p
	}
	if err := f(t); err != nil {
		return err
	}
	u.table.Store(&t)
	return nil
}
