package xds

import (
	"bytes"
	"errors"
	"fmt"
	"unicode/utf8"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// The resource types of the protocol.
const (
	TypeAddress       = "type.googleapis.com/istio.workload.Address"
	TypeAuthorization = "type.googleapis.com/istio.security.Authorization"
)

// codec sends messages as they are generated and receives bytes. The first
// response holds the whole mesh: read resource by resource it takes no more
// memory than its bytes, and many small resources cannot make it grow.
type codec struct{}

// Name is empty for the plain content type, application/grpc.
func (codec) Name() string { return "" }

func (codec) Marshal(v any) (mem.BufferSlice, error) {
	m, ok := v.(proto.Message)
	if !ok {
		return nil, fmt.Errorf("%T is not a protobuf message", v)
	}
	b, err := proto.Marshal(m)
	return mem.BufferSlice{mem.SliceBuffer(b)}, err
}

func (codec) Unmarshal(data mem.BufferSlice, v any) error {
	b, ok := v.(*[]byte)
	if !ok {
		return fmt.Errorf("%T is not *[]byte", v)
	}
	*b = data.Materialize()
	return nil
}

// message is one DeltaDiscoveryResponse.
type message struct {
	raw       []byte
	typeURL   string
	nonce     string
	resources int
	removed   int
	more      bool // the server has more to say of the same state
}

// MoreFollows ends the system_version_info of `ztun control` in all but the last of the responses that it divides a
// large state into. istiod divides nothing.
const MoreFollows = " (more follows)"

var errText = errors.New("text that is not UTF-8")

// parseMessage checks the outer form; the resources themselves are read by each.
func parseMessage(raw []byte) (m message, err error) {
	m.raw = raw
	err = fields(raw, func(n protowire.Number, b []byte) error {
		switch n {
		case 1:
			m.more = bytes.HasSuffix(b, []byte(MoreFollows))
			return nil
		case 2:
			m.resources++
			return nil
		case 4:
			m.typeURL = string(b)
		case 5:
			m.nonce = string(b)
		case 6:
			m.removed++
		default:
			return nil
		}
		if !utf8.Valid(b) {
			return errText
		}
		return nil
	})
	if err != nil {
		err = fmt.Errorf("not a DeltaDiscoveryResponse: %w", err)
	}
	return m, err
}

// resource is one Resource of a message. Its slices belong to the message.
type resource struct {
	name    string
	version []byte
	payload []byte // value of the Any; its type is not looked at, as in ztunnel
	given   bool   // there is an Any
	raw     []byte // for the aliases
	err     error  // why it cannot be read
}

// each yields the resources in their order.
func (m *message) each(yield func(resource)) {
	_ = fields(m.raw, func(n protowire.Number, b []byte) error {
		if n == 2 {
			yield(parseResource(b))
		}
		return nil
	})
}

// eachRemoved yields the names of removed resources.
func (m *message) eachRemoved(yield func(name string)) {
	_ = fields(m.raw, func(n protowire.Number, b []byte) error {
		if n == 6 {
			yield(string(b))
		}
		return nil
	})
}

func parseResource(raw []byte) (r resource) {
	r.raw = raw
	r.err = fields(raw, func(n protowire.Number, b []byte) error {
		switch n {
		case 1:
			r.version = b
			if !utf8.Valid(b) {
				return errText
			}
		case 2:
			r.given = true
			return fields(b, func(n protowire.Number, b []byte) error {
				if n == 2 {
					r.payload = b
				}
				return nil
			})
		case 3:
			if !utf8.Valid(b) {
				return errText
			}
			r.name = string(b)
		}
		return nil
	})
	switch {
	case r.err != nil:
		r.err = &wireError{"cannot decode: " + r.err.Error()}
	case r.name == "":
		r.err = &wireError{"resource without a name"}
	case !r.given:
		r.err = &wireError{"resource without content"}
	}
	return r
}

// aliases yields the further names under which the resource may be asked for.
func (r *resource) aliases(yield func(string)) {
	_ = fields(r.raw, func(n protowire.Number, b []byte) error {
		if n == 4 {
			yield(string(b))
		}
		return nil
	})
}

// fields yields the length-delimited fields of a protobuf message and skips the
// others. It ends at the first error.
func fields(b []byte, yield func(protowire.Number, []byte) error) error {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		if typ != protowire.BytesType {
			if n = protowire.ConsumeFieldValue(num, typ, b); n < 0 {
				return protowire.ParseError(n)
			}
			b = b[n:]
			continue
		}
		v, n := protowire.ConsumeBytes(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		if err := yield(num, v); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}
