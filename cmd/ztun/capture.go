package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"time"

	"ztun/admin"
	"ztun/admin/words"
	"ztun/proxy"
	"ztun/tun"
	"ztun/tun/capture"
)

// capturePath of the control socket answers with pcapng until there is enough of it, or its reader leaves.
const capturePath = "/v1/capture"

// Bounds of one capture.
const (
	captureQueue = 8 << 20                // bytes that wait for the reader; what comes on top is dropped, and counted
	captureHold  = 300 * time.Millisecond // how long a flow's first packet waits for the decision about it
	captureFlows = 1 << 16                // flows that are told apart
	captureWrite = 10 * time.Second       // for the reader to take something
	captureTime  = time.Hour              // at most
	captureSnap  = tun.MaxPacket          // bytes of a packet
)

func (d *daemon) captureHandler(w http.ResponseWriter, r *http.Request) (any, error) {
	q := r.URL.Query()
	p, err := d.pods.attached(q.Get("pod"))
	if err != nil {
		return nil, err
	}
	c := &capturing{pod: p, flows: map[flow]flowState{}}
	if err := c.read(q); err != nil {
		return nil, fmt.Errorf("%w: %w", admin.ErrPodInvalid, err)
	}
	tap := p.att.Tap()
	if tap == nil {
		return nil, fmt.Errorf("%w: pod %s has no device to look at", admin.ErrPodInvalid, p.label)
	}
	stop, err := tap.Look(c.queue.See)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", admin.ErrPodConflict, err)
	}
	defer stop()
	w.Header().Set("Content-Type", "application/x-pcapng")
	out := &patient{w: w, c: http.NewResponseController(w)}
	if c.w, err = capture.NewWriter(out, tap.Name(), "pod "+p.label+", in the clear, by ztun capture",
		c.snap); err != nil {
		return nil, nil // the reader has left
	}
	c.run(r.Context().Done(), tap.Done())
	return nil, nil
}

// patient writes to a reader who has a while for each piece.
type patient struct {
	w io.Writer
	c *http.ResponseController
}

func (p *patient) Write(b []byte) (int, error) {
	p.c.SetWriteDeadline(time.Now().Add(captureWrite))
	n, err := p.w.Write(b)
	return n, errors.Join(err, p.c.Flush())
}

// capturing is one capture.
type capturing struct {
	pod   *pod
	queue *capture.Queue
	w     *capture.Writer
	snap  int
	left  uint64 // packets that are still wanted
	time  time.Duration

	pending []capture.Captured
	flows   map[flow]flowState
	known   map[flow]string // what the proxy knows of flows
	asked   time.Time       // when it was asked
}

// flow is both ends of a connection, the smaller first.
type flow struct{ a, b netip.AddrPort }

func flowOf(a, b netip.AddrPort) flow {
	if b.Compare(a) < 0 {
		a, b = b, a
	}
	return flow{a, b}
}

type flowState uint8

const (
	flowNew    flowState = iota
	flowWaited           // its first packet has waited in vain
	flowTold
)

// read takes the bounds of a capture from its query.
func (c *capturing) read(q url.Values) error {
	want, err := capture.ParseFilter(q.Get("filter"))
	if err != nil {
		return err
	}
	number := func(name string, otherwise, most uint64) uint64 {
		text := q.Get(name)
		if text == "" {
			return otherwise
		}
		n, nerr := strconv.ParseUint(text, 10, 64)
		if nerr != nil || n == 0 || n > most {
			err = fmt.Errorf("%s %q is not from 1 to %d", name, text, most)
		}
		return n
	}
	c.left = number("count", 1<<62, 1<<62)
	c.snap = int(number("snaplen", captureSnap, captureSnap))
	c.time = time.Duration(number("seconds", uint64(captureTime/time.Second),
		uint64(captureTime/time.Second))) * time.Second
	c.queue = capture.NewQueue(want, c.snap, captureQueue)
	return err
}

// run writes packets until there are enough, the time is over, the pod stops, or the reader has left.
func (c *capturing) run(left, gone <-chan struct{}) {
	end := time.NewTimer(c.time)
	defer end.Stop()
	hold := time.NewTimer(time.Hour)
	defer hold.Stop()
	for over := false; !over; {
		select {
		case <-left:
			return
		case <-end.C:
			over = true
		case <-gone:
			over = true
		case <-hold.C:
		case <-c.queue.Wake():
		}
		c.pending = append(c.pending, c.queue.Take()...)
		wait, err := c.write(over)
		if err != nil {
			return
		}
		over = over || c.left == 0
		if wait > 0 {
			hold.Reset(wait)
		}
	}
	c.w.Dropped(time.Now(), c.queue.Dropped())
}

// write writes what waits, up to a packet that is to wait for longer; it says how long. now: none is.
func (c *capturing) write(now bool) (wait time.Duration, err error) {
	n := 0
	defer func() {
		left := copy(c.pending, c.pending[n:])
		clear(c.pending[left:])
		c.pending = c.pending[:left]
	}()
	for ; n < len(c.pending) && c.left > 0; n++ {
		x := &c.pending[n]
		comment, wait := c.comment(x)
		if wait > 0 && !now {
			return wait, nil
		}
		if err := c.w.Packet(x.At, x.Sent, x.Data, x.Length, comment); err != nil {
			return 0, err
		}
		c.queue.Give(x)
		c.left--
	}
	return 0, nil
}

// comment is what the first packet of a flow is marked with, or how long it is to wait for that: nothing is decided
// yet when a SYN passes.
func (c *capturing) comment(x *capture.Captured) (text string, wait time.Duration) {
	f := flowOf(x.Src, x.Dst)
	state, met := c.flows[f]
	if x.Proto != 6 || state == flowTold || !met && len(c.flows) >= captureFlows {
		return "", 0
	}
	if text = c.decision(x); text != "" {
		c.flows[f] = flowTold
		return text, 0
	}
	if age := time.Since(x.At); state == flowNew && age < captureHold {
		return "", min(captureHold-age, 50*time.Millisecond)
	}
	c.flows[f] = flowWaited
	return "", 0
}

// decision is what the proxy knows of a packet's flow.
func (c *capturing) decision(x *capture.Captured) string {
	if text := c.look(x); text != "" || time.Since(c.asked) < 40*time.Millisecond {
		return text
	}
	c.known, c.asked = map[flow]string{}, time.Now()
	for i := range c.pod.proxy.Ended() {
		c.learn(&i)
	}
	for i := range c.pod.proxy.Live() {
		c.learn(&i)
	}
	return c.look(x)
}

// look finds a flow. Towards the application a connection has a port that is netstack's: it is found by the client's
// address.
func (c *capturing) look(x *capture.Captured) string {
	noPort := func(e netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(e.Addr(), 0) }
	for _, f := range []flow{flowOf(x.Src, x.Dst), flowOf(noPort(x.Src), x.Dst), flowOf(x.Src, noPort(x.Dst))} {
		if text := c.known[f]; text != "" {
			return text
		}
	}
	return ""
}

func (c *capturing) learn(i *proxy.ConnectionInfo) {
	if len(c.known) >= captureFlows || i.State == "connecting" {
		return
	}
	src, dst := i.Source.Addr, i.Destination.Addr
	if i.Direction != "outbound" {
		src = netip.AddrPortFrom(src.Addr(), 0)
	} else if i.Called.IsValid() {
		dst = i.Called
	}
	who := func(p *proxy.Party) string {
		s := admin.Side{Workload: p.Workload, Namespace: p.Namespace, Identity: p.Identity}
		if s.Identity != "" {
			return s.Identity
		}
		if text := partyText(&s); text != "" {
			return text
		}
		return p.Addr.Addr().String()
	}
	text := fmt.Sprintf("%s %s, %s -> %s", i.Direction, i.Protocol, who(&i.Source), who(&i.Destination))
	if i.Direction == "outbound" {
		text += ", by " + i.Destination.Addr.String()
	}
	if i.Authority != "" {
		text += ", CONNECT " + i.Authority
	}
	if i.Service != "" {
		text += ", service " + i.Service
	}
	if i.Outcome != "" {
		text += ", " + i.Outcome
	}
	if i.Reason != "" {
		text += ": " + i.Reason
	}
	c.known[flowOf(src, dst)] = words.Printable(text)
}
