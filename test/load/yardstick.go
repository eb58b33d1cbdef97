package load

import (
	"context"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"sync"
	"time"
)

// yardstickHops is how many processes a yardstick's byte goes through: about as many wake-ups as a request through
// two proxies costs.
const yardstickHops = 6

// Yardstick sends a byte, rate times a second for d, through a chain of pipes and of processes that do nothing but
// pass it on, and measures from when it was due to its return. What passes through the chain meets no network and
// nothing of the proxies: its p99 is what the machine itself adds to whoever has to be woken a few times, in these
// very seconds.
func Yardstick(ctx context.Context, rate float64, d time.Duration) (Latency, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	first, in, err := os.Pipe()
	if err != nil {
		return Latency{}, err
	}
	defer in.Close()
	var cats sync.WaitGroup
	defer func() { cancel(); cats.Wait() }()
	out := first
	for range yardstickHops {
		r, w, err := os.Pipe()
		if err != nil {
			out.Close()
			return Latency{}, err
		}
		cat := exec.CommandContext(ctx, "cat")
		cat.Stdin, cat.Stdout = out, w
		err = cat.Start()
		out.Close()
		w.Close()
		out = r
		if err != nil {
			out.Close()
			return Latency{}, err
		}
		cats.Go(func() { _ = cat.Wait() })
	}
	defer out.Close()

	var took Histogram
	start, b := time.Now(), make([]byte, 1)
	for k := range int(math.Ceil(rate * d.Seconds())) {
		due := start.Add(time.Duration(float64(k) / rate * float64(time.Second)))
		if !sleepUntil(ctx, due) {
			return took.Summary(), ctx.Err()
		}
		if _, err := in.Write(b); err != nil {
			return took.Summary(), fmt.Errorf("yardstick: %w", err)
		}
		if _, err := io.ReadFull(out, b); err != nil {
			return took.Summary(), fmt.Errorf("yardstick: %w", err)
		}
		took.Add(time.Since(due))
	}
	return took.Summary(), nil
}
