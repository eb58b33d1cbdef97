package ca

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"log/slog"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"ztun/proxy/identity"
	"ztun/tun/replace"
)

// How `ztun control` tells its nodes what is revoked: a stream that answers an empty request (google.protobuf.Empty)
// with the revocation list in DER (google.protobuf.BytesValue), as it is now and after each change.
const (
	RevocationsService = "ztun.control.v1.Revocations"
	RevocationsWatch   = "Watch"
)

// RevocationsOptions configure a Revocations.
type RevocationsOptions struct {
	Connector Connector
	Path      string // where the list is kept, so that it is in force after a restart as well
	Put       func() // called when Path has a new list
	Logger    *slog.Logger
}

// Revocations follows the revocation list of `ztun control` and keeps it in a file, which CRLFile reads.
type Revocations struct {
	o    RevocationsOptions
	wait struct{ first, most time.Duration } // between attempts
}

// NewRevocations makes a Revocations; let Run run.
func NewRevocations(o RevocationsOptions) *Revocations {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	r := &Revocations{o: o}
	r.wait.first, r.wait.most = time.Second, 30*time.Second
	return r
}

// Run follows the list until ctx ends and returns nil. While the control plane cannot be reached, what is known stays.
func (r *Revocations) Run(ctx context.Context) error {
	wait, last := r.wait.first, ""
	for {
		got, err := r.follow(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if got {
			wait, last = r.wait.first, ""
		}
		if text := clip(err.Error()); text != last {
			last = text
			// By a target of its own, as ca::client is: who says himself that the control plane is away turns it down.
			say, log := "the control plane's revocation list cannot be followed, what is known stays in force",
				r.o.Logger.With("target", "crl::client")
			if status.Code(err) == codes.Unimplemented {
				say, log = "the control plane has no revocation list: is it older than this ztun?", r.o.Logger
			}
			log.Warn(say, "address", r.o.Connector.Address(), "error", text)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil
		}
		wait = min(2*wait, r.wait.most)
	}
}

// follow takes lists over one connection until that ends; got tells whether one came.
func (r *Revocations) follow(ctx context.Context) (got bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if ctx, err = r.o.Connector.Context(ctx); err != nil {
		return false, err
	}
	conn, err := r.o.Connector.Dial()
	if err != nil {
		return false, err
	}
	defer conn.Close()
	st, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, "/"+RevocationsService+"/"+RevocationsWatch,
		grpc.MaxCallRecvMsgSize(identity.MaxCRL+1024))
	if err != nil {
		return false, err
	}
	if err := errors.Join(st.SendMsg(&emptypb.Empty{}), st.CloseSend()); err != nil {
		return false, err
	}
	for {
		var m wrapperspb.BytesValue
		if err := st.RecvMsg(&m); err != nil {
			return got, err
		}
		got = true
		if err := r.put(m.Value); err != nil {
			r.o.Logger.Warn("the control plane's revocation list is not used, what is known stays in force", "error",
				err.Error())
		}
	}
}

// put keeps a list, if it is one.
func (r *Revocations) put(der []byte) error {
	if _, err := identity.ParseCRL(der); err != nil {
		return err
	}
	text := pem.EncodeToMemory(&pem.Block{Type: crlBlock, Bytes: der})
	if old, err := os.ReadFile(r.o.Path); err == nil && bytes.Equal(old, text) {
		return nil
	}
	if err := replace.File(r.o.Path, 0o600, text); err != nil {
		return err
	}
	r.o.Put()
	return nil
}

const crlBlock = "X509 CRL"
