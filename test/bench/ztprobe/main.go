// Command ztprobe asks small questions at a fixed pace from inside a namespace and prints how long the answers took,
// as JSON: it is the measuring end of the control suite of test/bench, which starts it and reads its one line of
// output. It never looks at ztun.
//
//	ztprobe conns -to 10.91.2.2:9001 -rate 50 -t 5s                          connect, one byte, close
//	ztprobe http  -url http://127.0.0.1:15021/healthz/ready -rate 5 -t 5s    GET, the whole body
//	ztprobe http  -url http://127.0.0.1:15000/config_dump -t 5s              without -rate: one after the other
//
// Decision (2026-11-23): an open loop, as in ztload echo: a question's time counts from when it was due, so that a
// stall of the server is not hidden by the client's waiting for it.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"ztun/test/load"
)

// result is what is printed.
type result struct {
	Latency load.Latency `json:"latency"`
	Asked   int          `json:"asked"`
	Failed  int          `json:"failed"`
	Errors  []string     `json:"errors,omitempty"` // the first five
	Bytes   int64        `json:"bytes"`            // of all bodies
	Skipped int          `json:"skipped"`          // due, but too many questions were open already
	Seconds float64      `json:"seconds"`
}

// maxOpen bounds the questions that wait for an answer at once.
const maxOpen = 512

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "ztprobe: conns or http, then flags")
		os.Exit(2)
	}
	fs := flag.NewFlagSet("ztprobe "+os.Args[1], flag.ExitOnError)
	to := fs.String("to", "", "conns: host:port of a one-byte server")
	url := fs.String("url", "", "http: what to get")
	rate := fs.Float64("rate", 0, "questions per second; 0: one after the other")
	d := fs.Duration("t", 5*time.Second, "how long")
	limit := fs.Duration("limit", 30*time.Second, "for one answer")
	_ = fs.Parse(os.Args[2:])

	var ask func(ctx context.Context) (int64, error)
	switch os.Args[1] {
	case "conns":
		ask = func(ctx context.Context) (int64, error) { return connect(ctx, *to) }
	case "http":
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DisableCompression: true}}
		ask = func(ctx context.Context) (int64, error) { return get(ctx, client, *url) }
	default:
		fmt.Fprintf(os.Stderr, "ztprobe: %q is neither conns nor http\n", os.Args[1])
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	r := run(ctx, ask, *rate, *d, *limit)
	_ = json.NewEncoder(os.Stdout).Encode(r)
	if r.Failed > 0 {
		os.Exit(1)
	}
}

// run asks for d and waits for the answers.
func run(ctx context.Context, ask func(context.Context) (int64, error), rate float64, d, limit time.Duration) *result {
	r := &result{}
	var mu sync.Mutex
	var h load.Histogram
	one := func(due time.Time) {
		c, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
		defer cancel()
		n, err := ask(c)
		took := time.Since(due)
		mu.Lock()
		defer mu.Unlock()
		r.Asked++
		r.Bytes += n
		if err == nil {
			h.Add(took)
			return
		}
		r.Failed++
		if len(r.Errors) < 5 {
			r.Errors = append(r.Errors, err.Error())
		}
	}
	start := time.Now()
	if rate <= 0 {
		for time.Since(start) < d && ctx.Err() == nil {
			one(time.Now())
		}
	} else {
		var wg sync.WaitGroup
		open := make(chan struct{}, maxOpen)
		step := time.Duration(float64(time.Second) / rate)
		for due := start; due.Sub(start) < d && ctx.Err() == nil; due = due.Add(step) {
			time.Sleep(time.Until(due))
			select {
			case open <- struct{}{}:
				wg.Go(func() { one(due); <-open })
			default:
				r.Skipped++
			}
		}
		wg.Wait()
	}
	r.Latency, r.Seconds = h.Summary(), time.Since(start).Seconds()
	return r
}

// connect is one connection to a server that sends one byte and closes.
func connect(ctx context.Context, to string) (int64, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", to)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	if t, ok := ctx.Deadline(); ok {
		_ = c.SetDeadline(t)
	}
	var b [2]byte
	n, err := io.ReadFull(c, b[:])
	if n == 1 && errors.Is(err, io.ErrUnexpectedEOF) {
		return 1, nil
	}
	return int64(n), fmt.Errorf("%d bytes instead of 1: %w", n, err)
}

func get(ctx context.Context, client *http.Client, url string) (int64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	n, err := io.Copy(io.Discard, resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errors.New(resp.Status)
	}
	return n, err
}
