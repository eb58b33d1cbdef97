package attach

import (
	"log/slog"
	"net"
	"testing"

	"ztun/proxy/fair"
)

// tcpPair is a TCP connection of this host, as it is accepted.
func tcpPair(t *testing.T) (client net.Conn, accepted *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if client, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return client, c.(*net.TCPConn)
}

// closed tells whether our end of a connection is closed.
func closed(c *net.TCPConn) bool {
	rc, err := c.SyscallConn()
	return err != nil || rc.Control(func(uintptr) {}) != nil
}

// The greediest loses: a pod's calls, then a pod's clients; others keep theirs, attached pods get what they consist
// of, and who lost is said.
func TestDescriptorsAreShared(t *testing.T) {
	report := fair.NewReport(slog.New(slog.DiscardHandler))
	d := NewDescriptors(64, report) // 16 of its own, 48 to share, 12 at most for one pod's calls
	greedy, other := "default/greedy", "default/other"
	var calls []*net.TCPConn
	for i := range 20 {
		p := d.Outbound(greedy, func() { t.Error("a call was given up") })
		if (p != nil) != (i < 12) {
			t.Fatalf("call %d: %v", i, p)
		}
		if p != nil {
			_, c := tcpPair(t)
			d.Opened(p, c)
			calls = append(calls, c)
		}
	}
	var attached []*Share
	for i := range 4 {
		p := d.ForPod("default/" + string(rune('a'+i)))
		if p == nil {
			t.Fatalf("pod %d has no room", i)
		}
		attached = append(attached, p)
	}
	// 48 are gone: 40 of the pods, and 8 of the 12 calls, of which the oldest 4 were ended for the pods.
	for i, c := range calls {
		if closed(c) != (i < 4) {
			t.Errorf("call %d closed: %v", i, closed(c))
		}
	}
	_, in := tcpPair(t)
	mine := d.Inbound(other, in)
	if mine == nil || !closed(calls[4]) {
		t.Fatal("another pod's client got no place, or nobody lost one for it")
	}
	d.collect()
	if used := d.all.Used(); used != 48 {
		t.Errorf("%d are taken", used)
	}
	// A call that is still being made is given up.
	given := false
	for range 8 {
		Reset(calls[len(calls)-1])
		calls = calls[:len(calls)-1]
	}
	d.collect()
	var slow []*Share
	for range 7 {
		slow = append(slow, d.Outbound(greedy, func() { given = true }))
	}
	if extra := d.Outbound(other, func() {}); extra == nil || !given {
		t.Error("a call under way was not given up for another pod's")
	}
	// Evicted between the answer and its being told of.
	_, late := tcpPair(t)
	d.Opened(slow[0], late)
	if !closed(late) {
		t.Error("a connection without a place goes on")
	}
	if closed(in) {
		t.Error("the other pod's client lost its connection")
	}
	for _, p := range append(append(attached, slow...), mine) {
		p.Release()
		p.Release()
	}
	d.collect()
	if used := d.all.Used(); used != 1 { // extra's
		t.Errorf("%d are taken in the end", used)
	}
	if c := report.Counts(); len(c) != 1 || c[0].Pod != "default/greedy" || c[0].Resource != "descriptors" ||
		c[0].Evicted != 6 || c[0].Refused != 8 {
		t.Errorf("reported: %+v", c)
	}
}

// A crowd at one pod's door takes a part of the descriptors, by the fair share of its sources; another pod's clients
// find theirs.
func TestCrowdAtOnePod(t *testing.T) {
	d := NewDescriptors(64, nil)
	crowded, other := "crowded", "other"
	var held []*net.TCPConn
	for i := range 30 {
		_, c := tcpPair(t)
		if d.Inbound(crowded, c) == nil {
			t.Fatalf("the crowd's connection %d got no place: its own oldest has to go", i)
		}
		held = append(held, c)
	}
	open := 0
	for _, c := range held {
		if !closed(c) {
			open++
		}
	}
	if open != 12 || closed(held[29]) {
		t.Errorf("%d of the crowd's connections are open, want its share of 12", open)
	}
	_, c := tcpPair(t)
	if d.Inbound(other, c) == nil || closed(held[29]) {
		t.Error("another pod's client")
	}
}
