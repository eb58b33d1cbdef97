package tun

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"
)

// Tap is a device whose packets can be looked at. Nobody looking costs an atomic load per packet.
type Tap struct {
	Device
	lookers atomic.Pointer[[]*looker]

	mu     sync.Mutex
	closed bool
	done   chan struct{} // closed with the device
}

type looker struct {
	see func(sent bool, bufs [][]byte, n int)
}

// maxLookers bounds those who look at one device at a time.
const maxLookers = 4

// ErrTapBusy is what Look returns when too many look already.
var ErrTapBusy = errors.New("tun: too many look at this device already")

// NewTap makes a device that can be looked at.
func NewTap(d Device) *Tap { return &Tap{Device: d, done: make(chan struct{})} }

// Look has see called with every packet from now on: n bytes in bufs, sent by the interface's own side or not. It
// must not wait, nor keep the buffers; reader and writer of the device call it at the same time, and perhaps once
// more when stop has returned.
func (t *Tap) Look(see func(sent bool, bufs [][]byte, n int)) (stop func(), err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := t.all()
	if len(all) >= maxLookers {
		return nil, ErrTapBusy
	}
	l := &looker{see}
	all = append(slices.Clone(all), l)
	t.lookers.Store(&all)
	return func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		left := slices.DeleteFunc(slices.Clone(t.all()), func(x *looker) bool { return x == l })
		if len(left) == 0 {
			t.lookers.Store(nil)
			return
		}
		t.lookers.Store(&left)
	}, nil
}

func (t *Tap) all() []*looker {
	if p := t.lookers.Load(); p != nil {
		return *p
	}
	return nil
}

// Done is closed when the device is.
func (t *Tap) Done() <-chan struct{} { return t.done }

// ReadPacket implements Device.
func (t *Tap) ReadPacket(h *VNetHdr, bufs [][]byte) (int, error) {
	n, err := t.Device.ReadPacket(h, bufs)
	if err == nil {
		t.show(bufs, n)
	}
	return n, err
}

// TryReadPacket implements TryReader; a device that cannot be asked has nothing without waiting.
func (t *Tap) TryReadPacket(h *VNetHdr, bufs [][]byte) (int, error) {
	d, ok := t.Device.(TryReader)
	if !ok {
		return 0, ErrNothing
	}
	n, err := d.TryReadPacket(h, bufs)
	if err == nil {
		t.show(bufs, n)
	}
	return n, err
}

// show lets those who look see a packet that was read.
func (t *Tap) show(bufs [][]byte, n int) {
	if all := t.lookers.Load(); all != nil {
		for _, l := range *all {
			l.see(true, bufs, n)
		}
	}
}

// WritePacket implements Device.
func (t *Tap) WritePacket(h *VNetHdr, bufs [][]byte) error {
	if all := t.lookers.Load(); all != nil {
		n := 0
		for _, b := range bufs {
			n += len(b)
		}
		for _, l := range *all {
			l.see(false, bufs, n)
		}
	}
	return t.Device.WritePacket(h, bufs)
}

// Stats implements StatsReader.
func (t *Tap) Stats() Stats {
	if s, ok := t.Device.(StatsReader); ok {
		return s.Stats()
	}
	return Stats{}
}

// Close implements Device.
func (t *Tap) Close() error {
	t.mu.Lock()
	if !t.closed {
		t.closed = true
		close(t.done)
	}
	t.mu.Unlock()
	return t.Device.Close()
}
