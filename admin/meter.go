package admin

import (
	"context"
	"sync"
	"time"
)

// Traffic is what the pods' connections amount to since the start, of one direction: those that pods open, or that
// they are opened.
type Traffic struct{ Opened, Failed, Bytes uint64 }

// Meter remembers what the traffic was in the last minutes, so that whoever looks at the page in trouble sees what
// came before.
type Meter struct {
	get func() (out, in Traffic)
	now func() time.Time

	mu      sync.Mutex
	samples []measured // oldest first
}

type measured struct {
	at      time.Time
	out, in Traffic
}

// A sample each 5 s, for 5 minutes.
const (
	meterEvery   = 5 * time.Second
	meterSamples = 61
)

// NewMeter makes a Meter; get is called every 5 s.
func NewMeter(get func() (out, in Traffic)) *Meter { return &Meter{get: get, now: time.Now} }

// Run measures until ctx ends.
func (m *Meter) Run(ctx context.Context) error {
	t := time.NewTicker(meterEvery)
	defer t.Stop()
	for {
		m.measure()
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

func (m *Meter) measure() {
	out, in := m.get()
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.samples) == meterSamples {
		m.samples = append(m.samples[:0], m.samples[1:]...)
	}
	m.samples = append(m.samples, measured{m.now(), out, in})
}

// Rates are values per second, oldest first: the last is the newest.
type Rates struct {
	Out, In, Bytes []float64
	Failed         uint64        // in all of Over
	Over           time.Duration // what the values span
}

// Rates is what was measured. Without two samples it is empty. Safe on nil.
func (m *Meter) Rates() (r Rates) {
	if m == nil {
		return r
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := 1; i < len(m.samples); i++ {
		a, b := &m.samples[i-1], &m.samples[i]
		per := func(was, is uint64) float64 {
			if d := b.at.Sub(a.at).Seconds(); d > 0 && is > was {
				return float64(is-was) / d
			}
			return 0
		}
		r.Out = append(r.Out, per(a.out.Opened, b.out.Opened))
		r.In = append(r.In, per(a.in.Opened, b.in.Opened))
		r.Bytes = append(r.Bytes, per(a.out.Bytes+a.in.Bytes, b.out.Bytes+b.in.Bytes))
	}
	if n := len(m.samples); n > 1 {
		first, last := &m.samples[0], &m.samples[n-1]
		r.Failed = last.out.Failed + last.in.Failed - first.out.Failed - first.in.Failed
		r.Over = last.at.Sub(first.at)
	}
	return r
}
