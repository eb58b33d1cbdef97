package control

import (
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"ztun/admin/ca"
)

// revocationsDesc is the service by which nodes follow the revocation list: ca.RevocationsMethod, an empty request, and
// the list in DER as it is now and after each change.
func revocationsDesc() *grpc.ServiceDesc {
	return &grpc.ServiceDesc{
		ServiceName: ca.RevocationsService,
		HandlerType: (*any)(nil),
		Streams: []grpc.StreamDesc{{StreamName: ca.RevocationsWatch, ServerStreams: true,
			Handler: func(srv any, st grpc.ServerStream) error {
				return srv.(*Server).watchRevocations(st)
			}}},
	}
}

func (s *Server) watchRevocations(st grpc.ServerStream) error {
	c := callerOf(st.Context())
	place := s.places.watches.Take(c.node, 1, nil)
	if place == nil {
		return status.Errorf(codes.ResourceExhausted, "node %s follows the revocation list %d times already", c.node,
			s.places.watches.Held(c.node))
	}
	defer place.Release()
	if err := st.RecvMsg(&emptypb.Empty{}); err != nil {
		return err
	}
	for {
		gone := s.nodes.watch()
		if !s.nodes.valid(c) {
			return status.Error(codes.Unauthenticated, "the node's credentials have been replaced or removed")
		}
		list, changed := s.issued.current()
		if list != nil {
			if err := st.SendMsg(wrapperspb.Bytes(list)); err != nil {
				return err
			}
		}
	wait:
		for {
			select {
			case <-changed:
				break wait
			case <-gone:
				gone = s.nodes.watch()
				if !s.nodes.valid(c) {
					return status.Error(codes.Unauthenticated, "the node's credentials have been replaced or removed")
				}
			case <-st.Context().Done():
				return status.FromContextError(st.Context().Err()).Err()
			}
		}
	}
}

// revoke looks at which nodes have left.
func (s *Server) revoke() {
	before, _ := s.issued.current()
	problem := s.issued.status().Problem
	scanned := false
	if err := s.issued.refresh(func() (map[string]bool, bool) {
		s.nodes.rescan()
		scanned = true
		return s.nodes.members()
	}, time.Now()); err != nil && err.Error() != problem {
		s.logger.Error("what was signed for nodes that have left may not be revoked", "error", err.Error())
	}
	if !scanned { // somebody keeps the members for long; who has left is out all the same
		s.nodes.rescan()
	}
	if now, _ := s.issued.current(); before != nil && string(now) != string(before) {
		s.logger.Info("a new revocation list is served", "certificates", s.issued.status().Certificates)
	}
}
