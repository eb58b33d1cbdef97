package control

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"ztun/admin/pb/discoverypb"
)

// Whoever connects and cannot say who he is gives his place back, also if he keeps calling; a node that is quiet
// keeps its.
func TestStrangersLeave(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": workloadsYAML("x:10.0.0.1:node-a")}, func(l *limits) {
		l.strangers, l.firstRequest = 3, 5*time.Second // time for a busy machine to connect
	})
	node := w.connect("node-a")
	node.begin(typeAddress, nil)
	node.ack(node.recv())

	mute, err := net.Dial("tcp", w.addr)
	check(t, err)
	defer mute.Close()
	cfg := w.tls("")
	cfg.NextProtos, cfg.ServerName = []string{"h2"}, "localhost"
	shaken, err := tls.Dial("tcp", w.addr, cfg)
	check(t, err)
	defer shaken.Close()
	for _, c := range []net.Conn{mute, shaken} {
		check(t, c.SetReadDeadline(time.Now().Add(patience)))
		if _, err := io.Copy(io.Discard, c); err != nil {
			if ne, ok := err.(net.Error); ok && ne.Timeout() {
				t.Fatal("a stranger keeps its place")
			}
		}
	}
	eventually(t, "the places are free", func() bool {
		return w.srv.places.strangers.Used() == 0 && w.srv.places.nodes.Used() == 1
	})
	// The node's is as it was.
	w.write("b.yaml", workloadsYAML("y:10.0.0.2:node-a"))
	equal(t, "update", names(node.recv()), "u/y")
}

// One node cannot take the connections of all.
func TestConnectionsOfANode(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": workloadsYAML("x:10.0.0.1:node-a")}, func(l *limits) { l.connsOfNode = 2 })
	for range 2 {
		c := w.connect("node-a")
		c.begin(typeAddress, nil)
		c.ack(c.recv())
	}
	third := w.connect("node-a")
	third.fails(codes.ResourceExhausted, "node node-a has 2 connections already")
	other := w.connect("node-b")
	other.begin(typeAddress, nil)
	other.ack(other.recv())
	// A connection that ends makes room.
	equal(t, "counted", w.srv.places.nodes.Held("node-a"), 2)
	cc := w.dial(w.tls(""))
	check(t, w.stopOne("node-a"))
	eventually(t, "there is room", func() bool {
		ctx, cancel := context.WithTimeout(withToken(t.Context(), w.token("node-a")), patience)
		defer cancel()
		rpc, err := discoverypb.NewAggregatedDiscoveryServiceClient(cc).DeltaAggregatedResources(ctx)
		check(t, err)
		check(t, rpc.Send(&discoverypb.DeltaDiscoveryRequest{Node: nodeOf("node-a"), TypeUrl: typeAddress}))
		_, err = rpc.Recv()
		return err == nil
	})
}

// stopOne cuts one connection of a node, as a network does.
func (w *world) stopOne(node string) error {
	for _, st := range w.srv.open() {
		if st.caller.node == node {
			return connOf(st.rpc.Context()).Close()
		}
	}
	return net.ErrClosed
}

// TestSilentCrowd: thousands of silent connections, some of them after a handshake, do not keep a node out, neither
// from another address nor from their own; its calls all succeed, and its connections stay.
func TestSilentCrowd(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": workloadsYAML("x:10.0.0.1:node-a")}, func(l *limits) { l.strangers = 64 })
	node := w.connect("node-a")
	node.begin(typeAddress, nil)
	node.ack(node.recv())
	cfg := w.tls("")
	cfg.NextProtos, cfg.ServerName = []string{"h2"}, "localhost"
	var shaking sync.WaitGroup
	defer shaking.Wait()
	for i := range 1000 {
		c, err := net.Dial("tcp", w.addr)
		check(t, err)
		t.Cleanup(func() { c.Close() })
		check(t, c.SetDeadline(time.Now().Add(patience)))
		if i%10 == 0 {
			shaking.Go(func() { tls.Client(c, cfg).Handshake() }) // it may be cut meanwhile
		}
		if i%100 != 99 {
			continue
		}
		other := w.connect("node-b")
		other.begin(typeAddress, nil)
		other.ack(other.recv())
		other.cancel()
	}
	if n := w.srv.places.strangers.Used(); n > 64 {
		t.Errorf("%d strangers", n)
	}
	if n := w.srv.report.Counts(); len(n) != 1 || n[0].Resource != "control_strangers" || n[0].Evicted < 800 {
		t.Errorf("reported: %+v", n)
	}
	equal(t, "shown", w.srv.Status().Counters["bounded.control_strangers.evicted"] >= 800, true)
	w.write("b.yaml", workloadsYAML("y:10.0.0.2:node-a"))
	equal(t, "the node's old stream", names(node.recv()), "u/y")
}

func TestLimitsFitOpenFiles(t *testing.T) {
	d := defaultLimits()
	equal(t, "many files", d.fit(1<<16).strangers, d.strangers)
	for _, files := range []uint64{100, 1024, 4096} {
		l := d.fit(files)
		if l.strangers < 16 || l.connections < 16 || files > 1000 && l.strangers+l.connections+200 > int(files) {
			t.Errorf("%d files: %d strangers, %d connections", files, l.strangers, l.connections)
		}
	}
}
