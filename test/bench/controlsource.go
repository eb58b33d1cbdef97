package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"ztun/admin/pb/discoverypb"
	"ztun/admin/pb/workloadpb"
	"ztun/proxy/ports"
	"ztun/test/lab"
)

// source is how the daemons of the control suite learn of the mesh.
type source interface {
	// offer puts the mesh where a daemon of the node will look and returns the environment that makes it look there.
	offer(n *lab.Node) (map[string]string, error)
	// update changes one invented workload, for all daemons. It returns when the change is on its way, not when it has
	// arrived.
	update() error
	// pace is how many updates per second make a storm that this source can take.
	pace() float64
	// err is what the daemons found wrong with the mesh.
	err() error
	close()
}

// sourceNames of --source.
func sourceNames() []string { return []string{"xds", "file"} }

// newSource makes the source that --source asks for.
func (b *bench) newSource(w *lab.World, m *bigMesh) (source, error) {
	if b.o.Source == "xds" {
		return newXDSSource(w, m)
	}
	return &fileSource{lab: w, mesh: m}, nil
}

// fileSource is LOCAL_XDS_PATH: an update rewrites the whole file, which the daemon reads and compares as a whole.
type fileSource struct {
	lab        *lab.World
	mesh       *bigMesh
	mu         sync.Mutex
	generation int
	written    bool
}

func (f *fileSource) write(generation int) error {
	b, err := f.mesh.yaml(generation)
	if err != nil {
		return err
	}
	return f.lab.WriteWorldBytes(b)
}

func (f *fileSource) offer(*lab.Node) (map[string]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.written { // one file for all
		return nil, nil
	}
	f.written = true
	return nil, f.write(0)
}

func (f *fileSource) update() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.generation++
	return f.write(f.generation)
}

func (f *fileSource) pace() float64 { return 0.2 }

// err: a daemon that cannot read the file does not become ready.
func (f *fileSource) err() error { return nil }

func (f *fileSource) close() {}

// xdsSource is a control plane within this process: delta xDS over TLS, one listener in each node's namespace. It
// answers every subscription with all that there is, in one response as istiod does, and sends an update as one
// response with one resource.
type xdsSource struct {
	discoverypb.UnimplementedAggregatedDiscoveryServiceServer
	lab  *lab.World
	mesh *bigMesh

	first   []*discoverypb.Resource // all addresses, encoded once
	root    string                  // file with the root certificate
	creds   credentials.TransportCredentials
	servers []*grpc.Server
	serving sync.WaitGroup

	mu         sync.Mutex
	streams    map[chan *discoverypb.DeltaDiscoveryResponse]bool
	generation int
	refused    error // the first NACK
}

const (
	addressType = "type.googleapis.com/istio.workload.Address"
	xdsPort     = ports.XDS
)

func newXDSSource(w *lab.World, m *bigMesh) (*xdsSource, error) {
	s := &xdsSource{lab: w, mesh: m, root: filepath.Join(w.Dir, "xds-root.pem"),
		streams: map[chan *discoverypb.DeltaDiscoveryResponse]bool{}}
	add := func(a *workloadpb.Address) error {
		r, err := resource(a, 0)
		s.first = append(s.first, r)
		return err
	}
	for i := range m.services {
		if err := add(m.service(i)); err != nil {
			return nil, err
		}
	}
	for i := range m.workloads {
		if err := add(m.workload(i, 0)); err != nil {
			return nil, err
		}
	}
	for _, x := range m.real.Workloads {
		a, err := actual(x)
		if err == nil {
			err = add(a)
		}
		if err != nil {
			return nil, err
		}
	}
	pem, tls, err := selfSigned()
	if err != nil {
		return nil, err
	}
	s.creds = credentials.NewTLS(tls)
	return s, os.WriteFile(s.root, pem, 0o644)
}

func resource(a *workloadpb.Address, generation int) (*discoverypb.Resource, error) {
	b, err := proto.Marshal(a)
	return &discoverypb.Resource{Name: resourceName(a), Version: fmt.Sprint(generation),
		Resource: &anypb.Any{TypeUrl: addressType, Value: b}}, err
}

func (s *xdsSource) offer(n *lab.Node) (map[string]string, error) {
	address := fmt.Sprintf("127.0.0.1:%d", xdsPort)
	l, err := n.NS.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	g := grpc.NewServer(grpc.Creds(s.creds), grpc.MaxRecvMsgSize(64<<20))
	discoverypb.RegisterAggregatedDiscoveryServiceServer(g, s)
	s.servers = append(s.servers, g)
	s.serving.Go(func() { _ = g.Serve(l) })
	return map[string]string{"XDS_ADDRESS": "https://" + address, "XDS_ROOT_CA": s.root, "LOCAL_XDS_PATH": lab.Unset}, nil
}

// DeltaAggregatedResources serves one daemon.
func (s *xdsSource) DeltaAggregatedResources(stream grpc.BidiStreamingServer[discoverypb.DeltaDiscoveryRequest,
	discoverypb.DeltaDiscoveryResponse]) error {
	requests := make(chan *discoverypb.DeltaDiscoveryRequest)
	ended := make(chan error, 1)
	go func() {
		for {
			r, err := stream.Recv()
			if err != nil {
				ended <- err
				return
			}
			select {
			case requests <- r:
			case <-stream.Context().Done():
				ended <- stream.Context().Err()
				return
			}
		}
	}()
	updates := make(chan *discoverypb.DeltaDiscoveryResponse, 1024)
	defer func() {
		s.mu.Lock()
		delete(s.streams, updates)
		s.mu.Unlock()
	}()
	answered := map[string]bool{}
	for {
		select {
		case err := <-ended:
			return err
		case u := <-updates:
			if err := stream.Send(u); err != nil {
				return err
			}
		case r := <-requests:
			if r.ErrorDetail != nil {
				s.mu.Lock()
				s.refused = errors.Join(s.refused, errors.New(r.ErrorDetail.Message))
				s.mu.Unlock()
			}
			if r.ResponseNonce != "" || answered[r.TypeUrl] {
				continue // ACK or NACK
			}
			answered[r.TypeUrl] = true
			resp := &discoverypb.DeltaDiscoveryResponse{TypeUrl: r.TypeUrl, Nonce: "first-" + r.TypeUrl}
			if r.TypeUrl == addressType {
				resp.Resources = s.first
				s.mu.Lock()
				s.streams[updates] = true // what changes from here on is sent after this
				s.mu.Unlock()
			}
			if err := stream.Send(resp); err != nil {
				return err
			}
		}
	}
}

func (s *xdsSource) update() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.generation++
	r, err := resource(s.mesh.workload(s.generation%s.mesh.workloads, s.generation), s.generation)
	if err != nil {
		return err
	}
	u := &discoverypb.DeltaDiscoveryResponse{TypeUrl: addressType, Nonce: fmt.Sprint(s.generation),
		Resources: []*discoverypb.Resource{r}}
	for c := range s.streams {
		select {
		case c <- u:
		default: // the daemon is behind; it is not to be helped by more
		}
	}
	return s.refused
}

func (s *xdsSource) pace() float64 { return 100 }

func (s *xdsSource) err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refused != nil {
		return fmt.Errorf("a daemon refused resources: %w", s.refused)
	}
	return nil
}

func (s *xdsSource) close() {
	for _, g := range s.servers {
		g.Stop()
	}
	s.serving.Wait()
}
