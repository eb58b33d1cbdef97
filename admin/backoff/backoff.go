package backoff

import "time"

const (
	Min = 10 * time.Millisecond
	Max = 15 * time.Second
	// Brief is the life of a connection that achieves nothing, however well it begins or ends. More than MaxBrief of
	// them are followed by waits as after failures: a server that accepts, or even answers, and hangs up must not be
	// called without pause.
	Brief    = time.Second
	MaxBrief = 3
)

// Backoff is the pause as it grows: 20, 40, ... 15000 ms. A quarter is added at random, or taken away at the maximum,
// so that those who wait for the same do not come back in step.
type Backoff struct {
	cur    time.Duration
	random func(n int64) int64 // in [0, n)
}

// New is a Backoff without failures.
func New(random func(n int64) int64) Backoff { return Backoff{Min, random} }

// Reset forgets earlier failures.
func (b *Backoff) Reset() { b.cur = Min }

// Longer is the pause after another failure.
func (b *Backoff) Longer() time.Duration {
	b.cur = min(Max, 2*b.cur)
	return b.Again()
}

// Again is the pause as it was the last time, but for chance.
func (b *Backoff) Again() time.Duration {
	jitter := time.Duration(b.random(int64(b.cur)/4 + 1))
	if b.cur == Max {
		return b.cur - jitter
	}
	return b.cur + jitter
}
