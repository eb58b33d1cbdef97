package load

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// EchoResult of OpenLoop.
type EchoResult struct {
	Latency Latency  `json:"latency"` // from when a request was due to its complete answer
	Sent    int64    `json:"sent"`
	Lost    int64    `json:"lost"` // due and not answered within the grace time
	Late    int64    `json:"late"` // sent more than 1 ms after they were due: how well the client itself kept up
	Rate    float64  `json:"rate"` // answered per second
	Errors  []string `json:"errors,omitempty"`
	Seconds float64  `json:"seconds"`
}

// OpenLoop sends requests of size bytes at a fixed total rate per second over conns kept connections for d, whether
// or not answers come. A request's latency counts from when it was due. Answers may come up to 10 s after the end.
func OpenLoop(ctx context.Context, t Target, conns int, rate float64, size int, d time.Duration) *EchoResult {
	r := &EchoResult{}
	var h Histogram
	var mu sync.Mutex
	fail := func(err error) {
		mu.Lock()
		defer mu.Unlock()
		if len(r.Errors) < 10 {
			r.Errors = append(r.Errors, err.Error())
		}
	}
	cs := make([]conn, 0, conns)
	defer func() {
		for _, c := range cs {
			c.Close()
		}
	}()
	for i := range conns {
		c, err := t.open(ctx, "echo")
		if err != nil {
			fail(fmt.Errorf("connection %d: %w", i, err))
			return r
		}
		cs = append(cs, c)
		// One exchange before the clock starts: connection set-up is not what is measured.
		_, err = c.Write([]byte{1})
		if err == nil {
			_, err = io.ReadFull(c, make([]byte, 1))
		}
		if err != nil {
			fail(fmt.Errorf("connection %d: first echo: %w", i, err))
			return r
		}
	}
	start := time.Now().Add(20 * time.Millisecond)
	due := func(i, k int) time.Time {
		return start.Add(time.Duration(float64(k*conns+i) / rate * float64(time.Second)))
	}
	var wg sync.WaitGroup
	for i, c := range cs {
		defer bound(ctx, c)()
		count := 0
		for due(i, count).Sub(start) < d {
			count++
		}
		wg.Go(func() {
			buf := make([]byte, size)
			(&Pattern{Seed: uint64(i)}).Read(buf)
			var late int64
			for k := range count {
				time.Sleep(time.Until(due(i, k)))
				if time.Since(due(i, k)) > time.Millisecond {
					late++
				}
				if _, err := c.Write(buf); err != nil {
					fail(fmt.Errorf("connection %d: send: %w", i, err))
					break
				}
			}
			mu.Lock()
			r.Sent += int64(count)
			r.Late += late
			mu.Unlock()
		})
		wg.Go(func() {
			c.SetReadDeadline(start.Add(d + 10*time.Second))
			buf := make([]byte, size)
			for k := range count {
				if _, err := io.ReadFull(c, buf); err != nil {
					mu.Lock()
					r.Lost += int64(count - k)
					mu.Unlock()
					fail(fmt.Errorf("connection %d: answer %d of %d: %w", i, k, count, err))
					return
				}
				h.Add(time.Since(due(i, k)))
			}
		})
	}
	wg.Wait()
	r.Seconds = time.Since(start).Seconds()
	r.Latency = h.Summary()
	r.Rate = float64(r.Latency.N) / r.Seconds
	return r
}

// IdleConns are connections that are open and silent.
type IdleConns struct {
	cs []conn
}

// Idle opens n connections, 32 at a time, each proved by one echoed byte, and returns them open. On error none is left.
func Idle(ctx context.Context, t Target, n int) (*IdleConns, error) {
	ic := &IdleConns{}
	var mu sync.Mutex
	var errs []error
	sem := make(chan struct{}, 32)
	var wg sync.WaitGroup
	for i := range n {
		sem <- struct{}{}
		mu.Lock()
		broken := len(errs) > 0
		mu.Unlock()
		if broken {
			break
		}
		wg.Go(func() {
			defer func() { <-sem }()
			c, err := t.open(ctx, "hold")
			if err == nil {
				c.SetDeadline(time.Now().Add(60 * time.Second))
				if _, err = c.Write([]byte{1}); err == nil {
					_, err = io.ReadFull(c, make([]byte, 1))
				}
				c.SetDeadline(time.Time{})
			}
			mu.Lock()
			defer mu.Unlock()
			if c != nil {
				ic.cs = append(ic.cs, c)
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("connection %d: %w", i, err))
			}
		})
	}
	wg.Wait()
	if len(errs) > 0 {
		ic.Close()
		return nil, errors.Join(errs[0], fmt.Errorf("%d of %d connections were open", len(ic.cs), n))
	}
	return ic, nil
}

// Len is the number of open connections.
func (ic *IdleConns) Len() int { return len(ic.cs) }

// Check echoes one byte over every connection: they are still alive.
func (ic *IdleConns) Check() error {
	var errs []error
	for i, c := range ic.cs {
		c.SetDeadline(time.Now().Add(20 * time.Second))
		_, err := c.Write([]byte{2})
		if err == nil {
			_, err = io.ReadFull(c, make([]byte, 1))
		}
		if err != nil && len(errs) < 5 {
			errs = append(errs, fmt.Errorf("connection %d: %w", i, err))
		}
	}
	return errors.Join(errs...)
}

// Close closes them all.
func (ic *IdleConns) Close() {
	for _, c := range ic.cs {
		c.Close()
	}
}
