package zds

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	"ztun/admin/pb/zdspb"
)

// Workload is the pod of an Add.
type Workload struct {
	UID                             string // the Kubernetes pod's, not that of the workload record
	Name, Namespace, ServiceAccount string
}

// kind is what a request asks for.
type kind uint8

const (
	kindAdd kind = iota
	kindKeep
	kindDel
	kindSnapshotSent
)

func (k kind) String() string {
	return [...]string{"Add", "Keep", "Del", "SnapshotSent"}[k]
}

// message is a request as it was read.
type message struct {
	kind     kind
	workload Workload // its UID alone, but for an Add
	noInfo   bool     // an Add says nothing but the uid
	netns    *os.File // of an Add, never nil there; nil in all others
}

const (
	// maxMessage is the longest request that is read, in bytes.
	maxMessage = 4 << 10
	// maxReason is the longest text of an ack: istio-cni reads 1024 bytes.
	maxReason = 900
	// maxUID bounds a uid; Kubernetes' have 36 bytes, the config hash of a static pod 32.
	maxUID = 253
)

// decode reads a request and the descriptor that came with it, if any. On an error the descriptor stays the caller's.
func decode(b []byte, netns *os.File) (message, error) {
	var r zdspb.WorkloadRequest
	if err := proto.Unmarshal(b, &r); err != nil {
		return message{}, fmt.Errorf("no ZDS request: %w", err)
	}
	var m message
	switch p := r.Payload.(type) {
	case *zdspb.WorkloadRequest_Add:
		i := p.Add.GetWorkloadInfo()
		m = message{kind: kindAdd, noInfo: i == nil, netns: netns, workload: Workload{UID: p.Add.GetUid(),
			Name: i.GetName(), Namespace: i.GetNamespace(), ServiceAccount: i.GetServiceAccount()}}
		if netns == nil {
			return message{}, fmt.Errorf("%s of %s: no network namespace came with it (SCM_RIGHTS)", m.kind,
				quote(m.workload.UID))
		}
	case *zdspb.WorkloadRequest_Keep:
		m = message{kind: kindKeep, workload: Workload{UID: p.Keep.GetUid()}}
	case *zdspb.WorkloadRequest_Del:
		m = message{kind: kindDel, workload: Workload{UID: p.Del.GetUid()}}
	case *zdspb.WorkloadRequest_SnapshotSent:
		m = message{kind: kindSnapshotSent}
	default:
		return message{}, errors.New("a ZDS request without a payload that is known here")
	}
	switch uid := m.workload.UID; {
	case m.kind != kindAdd && netns != nil:
		return message{}, fmt.Errorf("%s of %s came with a descriptor, which only Add has", m.kind, quote(uid))
	case m.kind != kindSnapshotSent && uid == "":
		return message{}, fmt.Errorf("%s without a uid", m.kind)
	case len(uid) > maxUID:
		return message{}, fmt.Errorf("%s: the uid has %d bytes, more than %d", m.kind, len(uid), maxUID)
	}
	return m, nil
}

// quote is a uid in a message to the agent or in the log, short whatever it is.
func quote(uid string) string { return strconv.Quote(uid[:min(len(uid), 64)]) }

// hello begins a connection.
func hello() []byte { return encode(&zdspb.ZdsHello{Version: zdspb.Version_V1}) }

// ack answers a request; nil is success.
func ack(reason error) []byte {
	text := ""
	if reason != nil {
		text = strings.ToValidUTF8(reason.Error(), "?")
		if len(text) > maxReason {
			text = text[:maxReason]
			for !utf8.ValidString(text) {
				text = text[:len(text)-1]
			}
		}
	}
	return encode(&zdspb.WorkloadResponse{Payload: &zdspb.WorkloadResponse_Ack{Ack: &zdspb.Ack{Error: text}}})
}

// encode cannot fail: ours are made of numbers and valid UTF-8.
func encode(m proto.Message) []byte {
	b, err := proto.Marshal(m)
	if err != nil {
		panic(err)
	}
	return b
}
