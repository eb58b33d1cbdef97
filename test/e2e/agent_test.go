package e2e

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"ztun/admin/pb/zdspb"
	"ztun/test/lab"
)

// agent is a node agent as istio-cni is one: it listens, and says over ZDS which pods there are.
type agent struct {
	t    testing.TB
	path string
	l    *net.UnixListener
	conn *net.UnixConn // the newest connection
}

func newAgent(t testing.TB, path string) *agent {
	t.Helper()
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	must(t, err)
	a := &agent{t: t, path: path, l: l}
	t.Cleanup(func() {
		l.Close()
		if a.conn != nil {
			a.conn.Close()
		}
	})
	return a
}

const agentPatience = 60 * time.Second

// accept waits for the next connection and its hello. An older one stays open.
func (a *agent) accept() (old *net.UnixConn) {
	a.t.Helper()
	old = a.conn
	must(a.t, a.l.SetDeadline(time.Now().Add(agentPatience)))
	c, err := a.l.AcceptUnix()
	must(a.t, err)
	a.conn = c
	if b, err := a.read(); string(b) != "\x08\x01" {
		a.t.Fatalf("hello is %x, %v", b, err)
	}
	return old
}

func (a *agent) read() ([]byte, error) {
	if err := a.conn.SetReadDeadline(time.Now().Add(agentPatience)); err != nil {
		return nil, err
	}
	b := make([]byte, 1024)
	n, err := a.conn.Read(b)
	return b[:n], err
}

// raw sends bytes, with open files beside them, and returns the reason of a refusal.
func (a *agent) raw(b []byte, files ...string) string {
	a.t.Helper()
	var fds []int
	for _, name := range files {
		f, err := os.Open(name)
		must(a.t, err)
		defer f.Close()
		fds = append(fds, int(f.Fd()))
	}
	_, _, err := a.conn.WriteMsgUnix(b, unix.UnixRights(fds...), nil)
	must(a.t, err)
	answer, err := a.read()
	must(a.t, err)
	var r zdspb.WorkloadResponse
	if err := proto.Unmarshal(answer, &r); err != nil || r.GetAck() == nil {
		a.t.Fatalf("no ack: %x, %v", answer, err)
	}
	return r.GetAck().GetError()
}

func message(t testing.TB, r *zdspb.WorkloadRequest) []byte {
	t.Helper()
	b, err := proto.Marshal(r)
	must(t, err)
	return b
}

// addOf is the message that adds a pod.
func addOf(t testing.TB, uid, namespace, name, account string) []byte {
	t.Helper()
	return message(t, &zdspb.WorkloadRequest{Payload: &zdspb.WorkloadRequest_Add{Add: &zdspb.AddWorkload{Uid: uid,
		WorkloadInfo: &zdspb.WorkloadInfo{Name: name, Namespace: namespace, ServiceAccount: account}}}})
}

func (a *agent) add(p *lab.Pod) string {
	a.t.Helper()
	return a.raw(addOf(a.t, "uid-"+p.Name, p.Namespace, p.Name, p.ServiceAccount), p.NS.Path())
}

func delOf(uid string) []byte {
	return append([]byte{0x12, byte(len(uid) + 2), 0x12, byte(len(uid))}, uid...)
}

func keepOf(t testing.TB, uid string) []byte {
	t.Helper()
	return message(t, &zdspb.WorkloadRequest{Payload: &zdspb.WorkloadRequest_Keep{Keep: &zdspb.KeepWorkload{Uid: uid}}})
}

// snapshotSent ends a snapshot.
var snapshotSent = []byte{0x1a, 0}

// want fails unless a pod, or whatever was asked for, was taken.
func (a *agent) want(refused string) {
	a.t.Helper()
	if refused != "" {
		a.t.Fatalf("refused: %s", refused)
	}
}

// hungUp waits for the other side's end of a connection.
func (a *agent) hungUp(c *net.UnixConn) {
	a.t.Helper()
	must(a.t, c.SetReadDeadline(time.Now().Add(agentPatience)))
	if n, err := c.Read(make([]byte, 1)); n > 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		a.t.Errorf("the connection is open: %d, %v", n, err)
	}
	c.Close()
}
