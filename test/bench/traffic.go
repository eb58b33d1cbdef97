package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"ztun/test/lab"
	"ztun/test/load"
)

// The ports of `ztload serve`.
const (
	echoPort = 9000
	bytePort = 9001
)

// serve starts the generators' server at e and waits until it listens. It lives as long as the world.
func (b *bench) serve(ctx context.Context, w *lab.World, e end) error {
	r, pw := io.Pipe()
	var errOut lockedBuffer
	p, err := w.Start(e.ns, lab.Cmd{
		Args: []string{b.tool("ztload"), "serve", "-listen", fmt.Sprintf(":%d", echoPort), "-byte",
			fmt.Sprintf(":%d", bytePort)},
		Stdout: pw, Stderr: &errOut,
	})
	if err != nil {
		return err
	}
	line := make(chan error, 1)
	go func() {
		buf := make([]byte, 64)
		_, err := r.Read(buf)
		line <- err
		_, _ = io.Copy(io.Discard, r) // ends with the process
	}()
	go func() { <-p.Done(); pw.CloseWithError(io.EOF) }()
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	select {
	case err := <-line:
		if err != nil {
			return fmt.Errorf("ztload serve: %w: %s", err, errOut.String())
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("ztload serve did not start: %w: %s", ctx.Err(), errOut.String())
	}
}

// client runs a generator at e to its end and decodes what it prints. A generator that measured something but also
// saw errors (exit 1) is left to the caller, who looks at the result.
func (b *bench) client(ctx context.Context, w *lab.World, e end, into any, args ...string) error {
	out, err := w.Run(ctx, e.ns, append([]string{b.tool("ztload")}, args...)...)
	if out = strings.TrimSpace(out); out == "" {
		if err == nil {
			err = errors.New("no result")
		}
		return fmt.Errorf("ztload %s: %w", args[0], err)
	}
	if jerr := json.Unmarshal([]byte(out), into); jerr != nil {
		return fmt.Errorf("ztload %s: %w in %.200q", args[0], jerr, out)
	}
	if err != nil && lab.ExitCode(err) != 1 {
		return err
	}
	return ctx.Err()
}

func at(ip netip.Addr, port uint16) string { return netip.AddrPortFrom(ip, port).String() }

// bulk runs streams in one direction for d, as `ztload bulk` means it: up is from the client to the server.
func (b *bench) bulk(ctx context.Context, w *lab.World, from, to end, streams int, dir string, d time.Duration) (
	*load.BulkResult, error) {
	r := new(load.BulkResult)
	err := b.client(ctx, w, from, r, "bulk", "-to", at(to.ip, echoPort), "-streams", fmt.Sprint(streams), "-dir", dir,
		"-t", d.String())
	if err == nil && r.Failed > 0 {
		err = fmt.Errorf("%d of %d streams failed: %s", r.Failed, r.N, strings.Join(r.Errors, "; "))
	}
	if err == nil && r.Bytes == 0 {
		err = errors.New("no byte arrived")
	}
	return r, err
}

// rate opens and closes connections for d, par at a time.
func (b *bench) rate(ctx context.Context, w *lab.World, from, to end, par int, d time.Duration) (*load.RateResult,
	error) {
	r := new(load.RateResult)
	err := b.client(ctx, w, from, r, "rate", "-to", at(to.ip, bytePort), "-par", fmt.Sprint(par), "-t", d.String())
	if err == nil && r.OK == 0 {
		err = fmt.Errorf("no connection succeeded: %s", strings.Join(r.Errors, "; "))
	}
	return r, err
}

// echo sends 1 KiB requests at a fixed rate over kept connections for d, whether or not answers come.
func (b *bench) echo(ctx context.Context, w *lab.World, from, to end, conns, perSecond int, d time.Duration) (
	*load.EchoResult, error) {
	r := new(load.EchoResult)
	err := b.client(ctx, w, from, r, "echo", "-to", at(to.ip, echoPort), "-conns", fmt.Sprint(conns), "-rate",
		fmt.Sprint(perSecond), "-size", "1024", "-t", d.String())
	if err == nil && r.Latency.N == 0 {
		err = fmt.Errorf("no answer: %s", strings.Join(r.Errors, "; "))
	}
	return r, err
}

// idle holds n silent connections open while held runs, then proves that they are still alive and closes them.
func (b *bench) idle(ctx context.Context, w *lab.World, from, to end, n int, held func() error) error {
	// A real pipe: for any other reader os/exec would start a copy that Wait waits for, and Kill with it.
	in, hold, err := os.Pipe()
	if err != nil {
		return err
	}
	defer hold.Close()
	lines := newLines()
	var errOut lockedBuffer
	p, err := w.Start(from.ns,
		lab.Cmd{Args: []string{b.tool("ztload"), "idle", "-to", at(to.ip, echoPort), "-n", fmt.Sprint(n)}, Stdin: in,
			Stdout: lines, Stderr: &errOut})
	in.Close() // the child has its own
	if err != nil {
		return err
	}
	defer p.Kill()
	type state struct {
		Open  int    `json:"open"`
		Alive bool   `json:"alive"`
		Error string `json:"error"`
	}
	next := func() (s state, err error) {
		select {
		case l := <-lines.c:
			err = json.Unmarshal(l, &s)
			if err == nil && s.Error != "" {
				err = errors.New(s.Error)
			}
			return s, err
		case <-p.Done():
			// Its last line may have come with its end.
			select {
			case l := <-lines.c:
				err = json.Unmarshal(l, &s)
				if err == nil && s.Error != "" {
					err = errors.New(s.Error)
				}
				return s, err
			default:
			}
			return s, fmt.Errorf("ztload idle ended: %w: %s", p.Err(), errOut.String())
		case <-ctx.Done():
			return s, fmt.Errorf("ztload idle: %w", ctx.Err())
		}
	}
	s, err := next()
	if err != nil {
		return err
	}
	if s.Open != n {
		return fmt.Errorf("%d of %d connections are open", s.Open, n)
	}
	if err := held(); err != nil {
		return err
	}
	hold.Close()
	if s, err = next(); err != nil {
		return err
	}
	if !s.Alive {
		return errors.New("the idle connections did not answer at the end")
	}
	return nil
}

// lines hands out what is written to it line by line; the few lines that nobody asks for are dropped.
type lines struct {
	c   chan []byte
	mu  sync.Mutex
	buf []byte
}

func newLines() *lines { return &lines{c: make(chan []byte, 8)} }

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buf = append(l.buf, p...)
	for {
		line, rest, ok := bytes.Cut(l.buf, []byte("\n"))
		if !ok {
			return len(p), nil
		}
		select {
		case l.c <- bytes.Clone(line):
		default:
		}
		l.buf = rest
	}
}

// lockedBuffer keeps the first 4 KiB of what a child says on its standard error.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.b.Write(p[:max(0, min(len(p), 4096-b.b.Len()))])
	return len(p), nil
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
