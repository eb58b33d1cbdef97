package load

import (
	"context"
	"fmt"
	"io"
	"math"
	"sync"
	"time"
)

// BystanderResult is what one who does nothing out of the ordinary saw.
type BystanderResult struct {
	Connects Latency  `json:"connects"` // from when a connection was due to its byte and the server's close
	Echoes   Latency  `json:"echoes"`   // from when an echo was due to its last byte
	Machine  Latency  `json:"machine"`  // a Yardstick's, in the same seconds
	Failed   int      `json:"failed"`   // of both, and echo connections that could not be opened
	Errors   []string `json:"errors,omitempty"`
	Seconds  float64  `json:"seconds"`
}

// bystanderPatience is when a bystander gives a request up: longer than any retransmission that a connect may need,
// so that slow shows as slow.
const bystanderPatience = 30 * time.Second

// bystanderConns is how many kept connections the echoes go over.
const bystanderConns = 4

// Bystander makes new connections to a ByteServer, and echoes of size bytes over a few kept connections to a Server,
// each rate times a second for d, whether or not earlier ones are answered. A failure fails that one request; the
// others go on. A Yardstick runs beside them.
func Bystander(ctx context.Context, one, many Target, rate float64, size int, d time.Duration) *BystanderResult {
	r := &BystanderResult{}
	var mu sync.Mutex
	fail := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		if r.Failed++; len(r.Errors) < 10 {
			r.Errors = append(r.Errors, fmt.Sprintf(format, args...))
		}
	}
	start := time.Now()
	count := int(math.Ceil(rate * d.Seconds()))
	due := func(k int) time.Time { return start.Add(time.Duration(float64(k) / rate * float64(time.Second))) }
	var connects, echoes Histogram
	var wg sync.WaitGroup
	wg.Go(func() {
		for k := range count {
			if !sleepUntil(ctx, due(k)) {
				return
			}
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(ctx, bystanderPatience)
				defer cancel()
				if err := takeByte(ctx, one, bystanderPatience); err != nil {
					fail("connection %d, %.3f s after the start: %v", k, due(k).Sub(start).Seconds(), err)
					return
				}
				connects.Add(time.Since(due(k)))
			})
		}
	})
	wg.Go(func() {
		var err error
		if r.Machine, err = Yardstick(ctx, rate, d); err != nil {
			fail("%v", err)
		}
	})
	for i := range bystanderConns {
		wg.Go(func() {
			var c conn
			defer func() {
				if c != nil {
					c.Close()
				}
			}()
			want, got := make([]byte, size), make([]byte, size)
			(&Pattern{Seed: uint64(i)}).Read(want)
			for k := i; k < count; k += bystanderConns {
				if !sleepUntil(ctx, due(k)) {
					return
				}
				var err error
				if c == nil {
					if c, err = openEcho(ctx, many); err != nil {
						fail("echo connection %d, %.3f s after the start: %v", i, time.Since(start).Seconds(), err)
						continue
					}
				}
				c.SetDeadline(time.Now().Add(bystanderPatience))
				if _, err = c.Write(want); err == nil {
					_, err = io.ReadFull(c, got)
				}
				if err == nil && string(got) != string(want) {
					err = fmt.Errorf("the answer differs from what was sent")
				}
				if err != nil {
					fail("echo %d over connection %d, %.3f s after the start: %v", k, i, due(k).Sub(start).Seconds(), err)
					c.Close()
					c = nil
					continue
				}
				echoes.Add(time.Since(due(k)))
			}
		})
	}
	wg.Wait()
	r.Seconds = time.Since(start).Seconds()
	r.Connects, r.Echoes = connects.Summary(), echoes.Summary()
	return r
}

// sleepUntil tells false when ctx ended first.
func sleepUntil(ctx context.Context, t time.Time) bool {
	select {
	case <-time.After(time.Until(t)):
		return true
	case <-ctx.Done():
		return false
	}
}

func openEcho(ctx context.Context, t Target) (conn, error) {
	ctx, cancel := context.WithTimeout(ctx, bystanderPatience)
	defer cancel()
	return t.open(ctx, "echo")
}
