package control

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"ztun/admin/pb/discoverypb"
)

// Whoever connects and cannot say who he is gives his place back, also if he keeps calling; a node that is quiet keeps its.
func TestStrangersLeave(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": workloadsYAML("x:10.0.0.1:node-a")}, func(l *limits) { l.connections, l.firstRequest = 3, 2*time.Second })
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
	eventually(t, "the places are free", func() bool { return len(w.srv.listeners[0].(*boundedListener).slots) == 1 })
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
	w.srv.mu.Lock()
	equal(t, "counted", w.srv.conns["node-a"], 2)
	w.srv.mu.Unlock()
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
