package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// CaptureOptions of one tcpdump.
type CaptureOptions struct {
	// bytes kept of each packet, default 256: headers and enough payload to find a marker; 0 < n <= 262144
	Snaplen   int
	Filter    string // a pcap filter expression, "" for everything
	Immediate bool   // every packet at once (costs a wake-up each): for short exchanges
}

// Capture is a running tcpdump.
type Capture struct {
	Iface  string
	path   string
	proc   *Process
	stderr *syncBuffer
	imm    bool
}

// Capture starts tcpdump on an interface of ns ("any" for all, those that appear later included) and returns when it
// listens.
func (w *World) Capture(ns *NS, iface string, o CaptureOptions) (*Capture, error) {
	if o.Snaplen == 0 {
		o.Snaplen = 256
	}
	f, err := os.CreateTemp(w.Dir, "capture-*.pcap")
	if err != nil {
		return nil, err
	}
	f.Close()
	c := &Capture{Iface: iface, path: f.Name(), stderr: &syncBuffer{}, imm: o.Immediate}
	// -Z root: Debian's tcpdump gives up root before it opens the file, and then may not write it.
	args := []string{"tcpdump", "-i", iface, "-n", "-p", "-U", "-Z", "root", "-B", "32768", "-s", strconv.Itoa(o.Snaplen),
		"-w", c.path}
	if o.Immediate {
		args = append(args, "--immediate-mode")
	}
	if o.Filter != "" {
		args = append(args, o.Filter)
	}
	if c.proc, err = w.Start(ns, Cmd{Args: args, Stderr: c.stderr}); err != nil {
		return nil, err
	}
	deadline := time.Now().Add(10 * time.Second)
	for !strings.Contains(c.stderr.String(), "listening on") {
		select {
		case <-c.proc.Done():
			return nil, fmt.Errorf("tcpdump on %s in %s ended: %v: %s", iface, ns.Name, c.proc.Err(), c.stderr.String())
		case <-time.After(10 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			c.proc.Kill()
			return nil, fmt.Errorf("tcpdump on %s in %s does not listen: %s", iface, ns.Name, c.stderr.String())
		}
	}
	return c, nil
}

// ErrDropped is in the error of Stop when the kernel gave packets up before tcpdump had them.
var ErrDropped = errors.New("packets were lost")

var droppedRE = regexp.MustCompile(`(\d+) packets? dropped by kernel`)

// Stop ends the capture and reads what it saw. A capture that lost packets is an error beside the packets: "nothing
// was seen" would prove nothing.
func (c *Capture) Stop() (Packets, error) {
	// libpcap hands over a block of packets when it is full or after a second; a signal would throw the last one away.
	wait := 1300 * time.Millisecond
	if c.imm {
		wait = 150 * time.Millisecond
	}
	select {
	case <-time.After(wait):
	case <-c.proc.Done():
	}
	_ = c.proc.Signal(syscall.SIGINT)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if _, err := c.proc.Wait(ctx); err != nil {
		c.proc.Kill()
		return nil, fmt.Errorf("tcpdump: %w: %s", err, c.stderr.String())
	}
	b, err := os.ReadFile(c.path)
	if err != nil {
		return nil, err
	}
	_ = os.Remove(c.path)
	ps, err := ParsePcap(b)
	if m := droppedRE.FindStringSubmatch(c.stderr.String()); m != nil && m[1] != "0" {
		err = errors.Join(err, fmt.Errorf("tcpdump on %s: %w: %s", c.Iface, ErrDropped, m[0]))
	}
	return ps, err
}

// Discard ends the capture without looking at it.
func (c *Capture) Discard() { c.proc.Kill(); _ = os.Remove(c.path) }
