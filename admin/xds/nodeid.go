package xds

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/types/known/structpb"

	"ztun/admin/pb/discoverypb"
)

// NodeInfo is what a node tells the control plane about itself.
type NodeInfo struct {
	IP        string // INSTANCE_IP; "" is 1.1.1.1, as in ztunnel
	Pod       string // POD_NAME
	Namespace string // POD_NAMESPACE
	NodeName  string // NODE_NAME

	Metadata map[string]string          // the proxy metadata: ISTIO_META_*, without that prefix
	JSON     map[string]json.RawMessage // ISTIO_METAJSON_*, without that prefix
}

// Node identifies a client to its control plane.
type Node struct {
	ID       string
	Metadata map[string]any // what encoding/json makes of JSON
	Problems []string       // what of NodeInfo could not be used; the Client logs it
}

// NewNode makes ztunnel's Node (spec controlplane 2.2). The proxy metadata
// replaces equal keys of the node's own, and the JSON replaces those; JSON that
// cannot be parsed is left out and reported in Problems.
func NewNode(i NodeInfo) Node {
	ip := cmp.Or(i.IP, "1.1.1.1")
	n := Node{
		// The suffix is literal whatever the cluster's domain is.
		ID: fmt.Sprintf("ztunnel~%s~%s.%s~%s.svc.cluster.local", ip, i.Pod, i.Namespace, i.Namespace),
		Metadata: map[string]any{
			"NAME": i.Pod, "NAMESPACE": i.Namespace, "INSTANCE_IPS": ip, "NODE_NAME": i.NodeName,
		},
	}
	for k, v := range i.Metadata {
		n.Metadata[k] = v
	}
	for k, text := range i.JSON {
		var v any
		err := json.Unmarshal(text, &v)
		if err == nil {
			_, err = structpb.NewValue(v)
		}
		if err != nil {
			n.Problems = append(n.Problems, fmt.Sprintf("ISTIO_METAJSON_%s is not sent: not JSON: %v", k, err))
			continue
		}
		n.Metadata[k] = v
	}
	slices.Sort(n.Problems)
	return n
}

// wire returns the message. Text that is not UTF-8 is mended: it would keep the
// message from being sent at all.
func (n Node) wire() *discoverypb.Node {
	out := &discoverypb.Node{Id: strings.ToValidUTF8(n.ID, "?"),
		Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{}}}
	for k, v := range n.Metadata {
		if s, ok := v.(string); ok {
			v = strings.ToValidUTF8(s, "?")
		}
		if x, err := structpb.NewValue(v); err == nil {
			out.Metadata.Fields[strings.ToValidUTF8(k, "?")] = x
		}
	}
	return out
}
