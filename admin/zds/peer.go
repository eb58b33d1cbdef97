package zds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"ztun/admin/pb/zdspb"
)

// peer is a proxy that is connected. What it is to hear of are uids and not messages, so that a slow one costs no more
// than there are pods, and hears the newest of each.
type peer struct {
	conn *net.UnixConn
	wake chan struct{} // something is queued

	// Under the server's mu:
	told     map[string]told // what it has answered for
	order    []string
	queued   map[string]bool // what is in order, or under way
	complete bool            // it has acked the snapshot
}

// told is a proxy's answer for a pod.
type told struct {
	generation uint64
	err        error
}

// snapshotSent stands in a peer's queue for the end of the snapshot. No pod has an empty uid.
const snapshotSent = ""

func newPeer(conn *net.UnixConn) *peer {
	return &peer{conn: conn, wake: make(chan struct{}, 1), told: map[string]told{}, queued: map[string]bool{}}
}

// queue has the proxy hear of a pod, after what is queued already.
func (p *peer) queue(uid string) {
	if p.queued[uid] {
		return
	}
	p.queued[uid] = true
	p.order = append(p.order, uid)
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// say is a message to a proxy.
type say struct {
	kind       kind
	workload   Workload
	netns      *os.File
	generation uint64
}

// next is what the proxy is to hear next, if anything.
func (s *Server) next(p *peer) (say, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(p.order) > 0 {
		uid := p.order[0]
		p.order = p.order[1:]
		delete(p.queued, uid) // what changes from here on is queued again
		if uid == snapshotSent {
			return say{kind: kindSnapshotSent}, true
		}
		w := s.pods[uid]
		t, known := p.told[uid]
		switch {
		case w == nil && known:
			delete(p.told, uid)
			s.stats.Dels++
			return say{kind: kindDel, workload: Workload{UID: uid}}, true
		case w == nil || known && t.err == nil && t.generation == w.generation:
		case w.Netns != nil:
			s.stats.Adds++
			return say{kindAdd, w.Workload, w.Netns, w.generation}, true
		case !p.complete: // Keep belongs into the snapshot
			s.stats.Keeps++
			return say{kind: kindKeep, workload: Workload{UID: uid}, generation: w.generation}, true
		}
	}
	return say{}, false
}

// answered notes what the proxy says to m.
func (s *Server) answered(p *peer, m say, err error) {
	s.mu.Lock()
	uid := m.workload.UID
	switch m.kind {
	case kindSnapshotSent:
		p.complete = true
		for uid := range s.unheard { // a proxy lets go of what its snapshot does not name
			if _, named := p.told[uid]; !named {
				delete(s.unheard, uid)
			}
		}
	case kindDel:
		delete(s.unheard, uid)
	case kindAdd, kindKeep:
		p.told[uid] = told{m.generation, err}
		if w := s.pods[uid]; w != nil && w.generation == m.generation && err == nil && m.kind == kindAdd {
			w.acked = true
		}
		if err != nil {
			s.stats.Refused++
		}
	}
	s.announce()
	s.mu.Unlock()
	switch {
	case err != nil:
		s.o.Logger.Warn("a proxy refuses a request", "request", m.kind, "pod", m.workload.Namespace+"/"+m.workload.Name,
			"uid", uid, "error", err)
	default:
		s.o.Logger.Debug("a proxy has answered", "request", m.kind, "uid", uid)
	}
	if m.kind == kindAdd && s.o.Answered != nil {
		s.o.Answered(uid)
	}
}

// serve speaks to one proxy until the connection ends, which is the error.
func (s *Server) serve(ctx context.Context, p *peer) error {
	defer context.AfterFunc(ctx, func() { p.conn.Close() })()
	heard := make(chan packet)
	done := make(chan struct{})
	ended := make(chan struct{})
	defer func() { <-ended }()
	defer close(done)
	defer p.conn.Close()
	go func() {
		defer close(ended)
		listen(p.conn, heard, done)
	}()
	b, err := s.hear(heard, "hello")
	if err != nil {
		return err
	}
	var h zdspb.ZdsHello
	if err := proto.Unmarshal(b, &h); err != nil || h.Version != zdspb.Version_V1 {
		return fmt.Errorf("no hello that is known here: %q", b[:min(len(b), 64)])
	}
	s.o.Logger.Info("a proxy has connected")
	for {
		m, ok := s.next(p)
		if !ok {
			select {
			case <-p.wake:
			case h := <-heard:
				if h.err == nil {
					h.err = errors.New("the proxy has said something unasked")
				}
				return h.err
			}
			continue
		}
		sent, err := p.send(m)
		if err != nil {
			return fmt.Errorf("%s: %w", m.kind, err)
		}
		if !sent {
			continue // the pod has another namespace meanwhile, or is gone: it is queued
		}
		b, err := s.hear(heard, "ack of "+m.kind.String())
		if err != nil {
			return err
		}
		reason, err := readAck(b)
		if err != nil {
			return err
		}
		s.answered(p, m, reason)
	}
}

// packet is what a proxy has sent.
type packet struct {
	b   []byte
	err error
}

// listen reads until an error, which it hands on as well, or until done.
func listen(conn *net.UnixConn, heard chan<- packet, done <-chan struct{}) {
	for {
		b := make([]byte, maxMessage)
		n, err := conn.Read(b)
		if err == nil && n == 0 {
			err = io.EOF
		}
		select {
		case heard <- packet{b[:n], err}:
		case <-done:
			return
		}
		if err != nil {
			return
		}
	}
}

// hear waits for the proxy's next packet.
func (s *Server) hear(heard <-chan packet, what string) ([]byte, error) {
	t := time.NewTimer(s.o.Wait)
	defer t.Stop()
	select {
	case h := <-heard:
		if h.err != nil {
			return nil, fmt.Errorf("%s: %w", what, h.err)
		}
		return h.b, nil
	case <-t.C:
		s.mu.Lock()
		s.stats.TimedOut++
		s.mu.Unlock()
		// One that came later would be taken for the next message's.
		return nil, fmt.Errorf("%s: nothing came within %v", what, s.o.Wait)
	}
}

// readAck reads an answer: its reason for a refusal, or an error where it is none.
func readAck(b []byte) (reason, err error) {
	var r zdspb.WorkloadResponse
	if err := proto.Unmarshal(b, &r); err != nil || r.GetAck() == nil {
		return nil, fmt.Errorf("no ack: %q", b[:min(len(b), 64)])
	}
	if text := r.GetAck().GetError(); text != "" {
		return errors.New(text), nil
	}
	return nil, nil
}

// send writes one message, an Add with its namespace. It sends nothing where that is closed.
func (p *peer) send(m say) (sent bool, err error) {
	p.conn.SetWriteDeadline(time.Now().Add(sendTimeout))
	b := request(m)
	if m.netns == nil {
		_, err := p.conn.Write(b)
		return true, err
	}
	rc, err := m.netns.SyscallConn()
	if err != nil {
		return false, nil
	}
	// It is not closed while this runs.
	closed := rc.Control(func(fd uintptr) {
		_, _, err = p.conn.WriteMsgUnix(b, unix.UnixRights(int(fd)), nil)
	})
	return closed == nil, err
}

// request is a message's bytes.
func request(m say) []byte {
	r := &zdspb.WorkloadRequest{}
	uid := m.workload.UID
	switch m.kind {
	case kindAdd:
		r.Payload = &zdspb.WorkloadRequest_Add{Add: &zdspb.AddWorkload{Uid: uid, WorkloadInfo: &zdspb.WorkloadInfo{
			Name: m.workload.Name, Namespace: m.workload.Namespace, ServiceAccount: m.workload.ServiceAccount}}}
	case kindKeep:
		r.Payload = &zdspb.WorkloadRequest_Keep{Keep: &zdspb.KeepWorkload{Uid: uid}}
	case kindDel:
		r.Payload = &zdspb.WorkloadRequest_Del{Del: &zdspb.DelWorkload{Uid: uid}}
	case kindSnapshotSent:
		r.Payload = &zdspb.WorkloadRequest_SnapshotSent{SnapshotSent: &zdspb.SnapshotSent{}}
	}
	return encode(r)
}
