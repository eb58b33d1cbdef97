package zds

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Pod is a pod that the proxies of the node are to have.
type Pod struct {
	Workload
	Netns *os.File // nil: nobody knows it any more; a proxy that has the pod is to keep it
}

// ServerOptions configure a Server.
type ServerOptions struct {
	Path     string        // of the socket
	MaxPods  int           // default 4096; Kubernetes runs 110 on a node unless told otherwise
	MaxConns int           // default 8: two proxies in an upgrade, and some that are stuck
	Wait     time.Duration // for a hello or an ack; default 10 s, twice what the protocol gives a proxy
	// Answered is called when a proxy has answered for a pod, and when one is there anew. No lock is held.
	Answered func(uid string)
	Logger   *slog.Logger
}

const (
	defaultMaxPods  = 4096
	defaultMaxConns = 8
	defaultWait     = 10 * time.Second
)

// Server is a node agent's side: it says to each proxy that connects which pods there are, and what changes.
type Server struct {
	o        ServerOptions
	listener *net.UnixListener

	mu      sync.Mutex
	pods    map[string]*wanted
	unheard map[string]bool // pods that a proxy has had, and of whose end none has heard
	last    uint64          // generation
	peers   map[*peer]bool
	changed chan struct{} // closed when a proxy has answered or has gone
	stats   ServerStats   // Pods, Proxies, Complete are not kept here
}

// wanted is a pod as the proxies are to have it.
type wanted struct {
	Pod
	generation uint64 // changes with what a proxy would be told
	acked      bool   // by a proxy, in this generation, which may have gone
}

// ServerStats are a server's figures since its start.
type ServerStats struct {
	Pods, Proxies, Complete    int    // now; Complete are proxies that have acked their snapshot
	Connections, Turned        uint64 // made; of them turned away for want of a place
	Adds, Keeps, Dels, Refused uint64 // messages sent; of Adds those that a proxy refused
	TimedOut                   uint64 // connections that ended because no hello or ack came
	Full                       uint64 // pods for which there was no place
}

// NewServer makes a server, which does nothing before Listen and Run.
func NewServer(o ServerOptions) *Server {
	if o.MaxPods == 0 {
		o.MaxPods = defaultMaxPods
	}
	if o.MaxConns == 0 {
		o.MaxConns = defaultMaxConns
	}
	if o.Wait == 0 {
		o.Wait = defaultWait
	}
	return &Server{o: o, pods: map[string]*wanted{}, unheard: map[string]bool{}, peers: map[*peer]bool{},
		changed: make(chan struct{})}
}

// Put has the proxies take a pod, or take it anew where a proxy has refused it or its namespace is another. The
// namespace becomes the server's, also on an error. A pod without one is kept by proxies that have it, and changes
// nothing about one that is known here.
func (s *Server) Put(p Pod) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.pods[p.UID]
	switch {
	case old != nil && (p.Netns == nil || old.Netns != nil && old.Workload == p.Workload && sameFile(old.Netns, p.Netns)):
		closeNetns(p.Netns)
	case old == nil && len(s.pods) >= s.o.MaxPods:
		closeNetns(p.Netns)
		s.stats.Full++
		return fmt.Errorf("pod %s/%s: there are %d pods already", p.Namespace, p.Name, s.o.MaxPods)
	default:
		if old != nil {
			closeNetns(old.Netns)
		}
		delete(s.unheard, p.UID)
		s.last++
		s.pods[p.UID] = &wanted{Pod: p, generation: s.last}
	}
	s.tell(p.UID)
	return nil
}

// Remove has the proxies let go of a pod. An unknown one is no error.
func (s *Server) Remove(uid string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if w := s.pods[uid]; w != nil {
		delete(s.pods, uid)
		closeNetns(w.Netns)
		had := w.acked
		for p := range s.peers {
			_, told := p.told[uid]
			had = had || told
		}
		if had && len(s.unheard) < s.o.MaxPods {
			s.unheard[uid] = true
		}
		s.tell(uid)
		s.announce()
	}
}

func closeNetns(f *os.File) {
	if f != nil {
		f.Close()
	}
}

// sameFile says whether two descriptors are of one file: namespaces are told apart by device and inode.
func sameFile(a, b *os.File) bool {
	x, errX := a.Stat()
	y, errY := b.Stat()
	return errX == nil && errY == nil && os.SameFile(x, y)
}

// tell has all proxies hear of a pod, also those that have refused it. The caller holds mu.
func (s *Server) tell(uid string) {
	for p := range s.peers {
		if t, ok := p.told[uid]; ok && t.err != nil {
			p.told[uid] = told{0, t.err}
		}
		p.queue(uid)
	}
}

// announce wakes those who wait in Await. The caller holds mu.
func (s *Server) announce() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// State is what the proxies say of a pod.
type State uint8

const (
	Unknown State = iota // the pod is not known here
	Waiting              // no proxy has answered yet
	Acked                // a proxy has it
	Refused              // every proxy that is connected has refused it
)

// State is what the proxies say of a pod; for Refused with a proxy's reason.
func (s *Server) State(uid string) (State, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state(uid)
}

func (s *Server) state(uid string) (State, error) {
	w := s.pods[uid]
	switch {
	case w == nil:
		return Unknown, fmt.Errorf("pod %s is not known any more", quote(uid))
	case w.Netns == nil:
		return Waiting, errors.New("its network namespace is not known")
	}
	var refusal error
	refused := 0
	for p := range s.peers {
		t, ok := p.told[uid]
		switch {
		case !ok || t.generation != w.generation:
		case t.err == nil:
			return Acked, nil
		default:
			refusal = t.err
			refused++
		}
	}
	switch {
	case refused > 0 && refused == len(s.peers):
		return Refused, refusal
	case w.acked:
		return Acked, nil
	case len(s.peers) == 0:
		return Waiting, errors.New("no proxy is connected")
	}
	return Waiting, errors.New("no proxy has answered")
}

// Await waits until a proxy has a pod. The error says what was missing when ctx ended, or why all proxies refuse it.
func (s *Server) Await(ctx context.Context, uid string) error {
	for {
		s.mu.Lock()
		st, err := s.state(uid)
		changed := s.changed
		s.mu.Unlock()
		if st != Waiting {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return err
		}
	}
}

// Flush waits until a proxy has heard of the end of every pod that one has had, as long as any is connected. It returns
// of how many none has heard.
func (s *Server) Flush(ctx context.Context) (left int) {
	for {
		s.mu.Lock()
		left, peers, changed := len(s.unheard), len(s.peers), s.changed
		s.mu.Unlock()
		if left == 0 || peers == 0 {
			return left
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return left
		}
	}
}

// Stats are the figures as they are.
func (s *Server) Stats() ServerStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.stats
	st.Pods, st.Proxies = len(s.pods), len(s.peers)
	for p := range s.peers {
		if p.complete {
			st.Complete++
		}
	}
	return st
}

// Listen makes the socket, in place of one that nobody listens on any more.
func (s *Server) Listen() error {
	l, err := ListenUnix("unixpacket", s.o.Path)
	if err != nil {
		return fmt.Errorf("the socket for the proxies: %w", err)
	}
	s.listener = l
	return nil
}

// ListenUnix listens on a path of the node that only root may use. A socket that an earlier process has left there is
// replaced, one that somebody serves is not. Nothing is removed when the listener is closed, since it may be the next
// process' by then.
func ListenUnix(network, path string) (*net.UnixListener, error) {
	if c, err := net.DialTimeout(network, path, time.Second); err == nil {
		c.Close()
		return nil, fmt.Errorf("%s is served by another process (istio-cni? another agent?)", path)
	} else if errors.Is(err, unix.EPROTOTYPE) {
		return nil, fmt.Errorf("%s is served by another process, which speaks something else", path)
	}
	if fi, err := os.Lstat(path); err == nil && fi.Mode()&fs.ModeSocket == 0 {
		return nil, fmt.Errorf("%s is there and no socket", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix(network, &net.UnixAddr{Name: path, Net: network})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// Run serves proxies until ctx ends, and closes all namespaces then.
func (s *Server) Run(ctx context.Context) error {
	var serving sync.WaitGroup
	defer s.close()
	defer serving.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { s.listener.Close() })()
	for {
		conn, err := s.listener.AcceptUnix()
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, net.ErrClosed) {
			return err
		}
		if err != nil { // no descriptor is left, say
			s.o.Logger.Warn("a proxy cannot be accepted", "error", err)
			select {
			case <-time.After(time.Second):
			case <-ctx.Done():
			}
			continue
		}
		p := newPeer(conn)
		if !s.enter(p) {
			conn.Close()
			s.o.Logger.Warn("a proxy is turned away: too many are connected", "connected", s.o.MaxConns)
			continue
		}
		serving.Go(func() {
			defer conn.Close()
			err := s.serve(ctx, p)
			s.leave(p)
			if ctx.Err() == nil {
				s.o.Logger.Info("a proxy's connection has ended", "reason", err)
			}
		})
	}
}

// enter gives a proxy a place and notes all pods for its snapshot.
func (s *Server) enter(p *peer) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stats.Connections++
	if len(s.peers) >= s.o.MaxConns {
		s.stats.Turned++
		return false
	}
	uids := make([]string, 0, len(s.pods))
	for uid := range s.pods {
		uids = append(uids, uid)
	}
	slices.SortFunc(uids, func(a, b string) int { // the oldest first
		return int(int64(s.pods[a].generation) - int64(s.pods[b].generation))
	})
	for _, uid := range append(uids, snapshotSent) {
		p.queue(uid)
	}
	s.peers[p] = true
	return true
}

func (s *Server) leave(p *peer) {
	s.mu.Lock()
	delete(s.peers, p)
	s.announce()
	s.mu.Unlock()
}

func (s *Server) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for uid, w := range s.pods {
		closeNetns(w.Netns)
		delete(s.pods, uid)
	}
	s.announce()
}
