package ambient

import (
	"fmt"
	"os/exec"
	"slices"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	citadel "istio.io/api/security/v1alpha1"

	"istio.io/istio/pkg/workloadapi"
	"istio.io/istio/pkg/workloadapi/security"
	"istio.io/istio/pkg/zdsapi"
)

// theirs is how Istio and Envoy name what ours are named otherwise. Names of messages are not on the wire.
var theirs = map[protoreflect.FullName]protoreflect.FullName{
	"envoy.service.discovery.v3.Node":   "envoy.config.core.v3.Node",
	"envoy.service.discovery.v3.Status": "google.rpc.Status",
	"istio.security.Rule":               "istio.security.Group",
	"istio.security.Clause":             "istio.security.Rules",
	"istio.security.Extension":          "istio.workload.Extension",
}

// renamed are fields that we name as ztunnel does: the number is what counts.
var renamed = map[protoreflect.FullName]protoreflect.Name{
	"istio.security.Authorization.rules": "groups",
	"istio.security.Rule.clauses":        "rules",
}

// complete are the packages of which a node proxy needs every message, field and value; of the others ours is a part.
var complete = []protoreflect.FileDescriptor{
	workloadapi.File_workloadapi_workload_proto, security.File_workloadapi_security_authorization_proto,
	(&citadel.IstioCertificateRequest{}).ProtoReflect().Descriptor().ParentFile(), zdsapi.File_zdsapi_zds_proto,
}

// leftOut are fields of the complete packages that ours lacks on purpose: none.
var leftOut = []protoreflect.FullName{}

// TestDescriptors: our wire types agree with Istio's own in numbers, types, labels, oneofs and enum values (checklist
// 41 in general).
func TestDescriptors(t *testing.T) {
	_ = &discovery.DeltaDiscoveryRequest{} // registers Envoy's
	cmd := exec.CommandContext(t.Context(), "go", "run", "../internal/ourpb")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v\n%s", cmd, err, stderrOf(err))
	}
	var set descriptorpb.FileDescriptorSet
	must(t, proto.Unmarshal(out, &set))
	ours, err := protodesc.NewFiles(&set)
	must(t, err)

	c := &comparison{t: t, met: map[protoreflect.FullName]bool{}}
	ours.RangeFiles(func(f protoreflect.FileDescriptor) bool {
		if f.Package() == "google.protobuf" {
			return true
		}
		for i := range f.Messages().Len() {
			c.message(f.Messages().Get(i))
		}
		for i := range f.Enums().Len() {
			c.enum(f.Enums().Get(i))
		}
		for i := range f.Services().Len() {
			c.service(f.Services().Get(i))
		}
		return true
	})
	for _, f := range complete {
		for i := range f.Messages().Len() {
			c.has(f.Messages().Get(i))
		}
		for i := range f.Enums().Len() {
			if e := f.Enums().Get(i); !c.met[e.FullName()] {
				t.Errorf("enum %s is missing from ours", e.FullName())
			}
		}
	}
	t.Logf("compared %d messages, %d fields, %d enums, %d methods", c.messages, c.fields, c.enums, c.methods)
	if c.messages < 25 || c.fields < 120 || c.enums < 10 || c.methods != 2 {
		t.Error("the comparison has not met what it has to compare")
	}
}

// comparison walks our descriptors beside those that are registered in this process.
type comparison struct {
	t                                *testing.T
	met                              map[protoreflect.FullName]bool // of theirs
	messages, fields, enums, methods int
}

func (c *comparison) find(name protoreflect.FullName) protoreflect.Descriptor {
	if other, ok := theirs[name]; ok {
		name = other
	}
	d, err := protoregistry.GlobalFiles.FindDescriptorByName(name)
	if err != nil {
		c.t.Errorf("%s: Istio has no such thing: %v", name, err)
		return nil
	}
	c.met[name] = true
	return d
}

func (c *comparison) message(m protoreflect.MessageDescriptor) {
	other, ok := c.find(m.FullName()).(protoreflect.MessageDescriptor)
	if !ok {
		return
	}
	c.messages++
	for i := range m.Fields().Len() {
		f := m.Fields().Get(i)
		o := other.Fields().ByNumber(f.Number())
		if o == nil {
			c.t.Errorf("%s = %d: Istio has no field of that number", f.FullName(), f.Number())
			continue
		}
		c.fields++
		c.met[o.FullName()] = true
		if got, want := shape(f), shape(o); got != want {
			c.t.Errorf("%s: ours is %s, Istio's is %s", f.FullName(), got, want)
		}
	}
	for i := range m.Messages().Len() {
		if n := m.Messages().Get(i); !n.IsMapEntry() { // an entry was compared with its field
			c.message(n)
		}
	}
	for i := range m.Enums().Len() {
		c.enum(m.Enums().Get(i))
	}
}

// shape is everything about a field that has to agree, names of types translated into theirs.
func shape(f protoreflect.FieldDescriptor) string {
	name := f.Name()
	if n, ok := renamed[f.FullName()]; ok {
		name = n
	}
	s := fmt.Sprintf("%s %s %s presence=%t packed=%t", f.Cardinality(), name, f.Kind(), f.HasPresence(), f.IsPacked())
	if o := f.ContainingOneof(); o != nil {
		s += fmt.Sprintf(" oneof=%s synthetic=%t", o.Name(), o.IsSynthetic())
	}
	switch {
	case f.IsMap():
		s += fmt.Sprintf(" map<%s, %s>", shape(f.MapKey()), shape(f.MapValue()))
	case f.Message() != nil:
		s += " " + string(translated(f.Message().FullName()))
	case f.Enum() != nil:
		s += " " + string(translated(f.Enum().FullName()))
	}
	return s
}

func translated(name protoreflect.FullName) protoreflect.FullName {
	if other, ok := theirs[name]; ok {
		return other
	}
	return name
}

func (c *comparison) enum(e protoreflect.EnumDescriptor) {
	other, ok := c.find(e.FullName()).(protoreflect.EnumDescriptor)
	if !ok {
		return
	}
	c.enums++
	values := func(e protoreflect.EnumDescriptor) []string {
		var s []string
		for i := range e.Values().Len() {
			v := e.Values().Get(i)
			s = append(s, fmt.Sprintf("%d=%s", v.Number(), v.Name()))
		}
		slices.Sort(s)
		return s
	}
	if got, want := values(e), values(other); !slices.Equal(got, want) {
		c.t.Errorf("%s: ours has %v, Istio's has %v", e.FullName(), got, want)
	}
}

func (c *comparison) service(s protoreflect.ServiceDescriptor) {
	other, ok := c.find(s.FullName()).(protoreflect.ServiceDescriptor)
	if !ok {
		return
	}
	signature := func(m protoreflect.MethodDescriptor) string {
		return fmt.Sprintf("(%t %s) (%t %s)", m.IsStreamingClient(), m.Input().FullName(), m.IsStreamingServer(),
			m.Output().FullName())
	}
	for i := range s.Methods().Len() {
		m := s.Methods().Get(i)
		o := other.Methods().ByName(m.Name())
		if o == nil {
			c.t.Errorf("%s: Istio has no such method", m.FullName())
			continue
		}
		c.methods++
		if got, want := signature(m), signature(o); got != want {
			c.t.Errorf("%s: ours is %s, Istio's is %s", m.FullName(), got, want)
		}
	}
}

// has complains of what ours lacks of a message of theirs.
func (c *comparison) has(m protoreflect.MessageDescriptor) {
	if m.IsMapEntry() {
		return
	}
	if !c.met[m.FullName()] {
		c.t.Errorf("message %s is missing from ours", m.FullName())
		return
	}
	for i := range m.Fields().Len() {
		if f := m.Fields().Get(i); !c.met[f.FullName()] && !slices.Contains(leftOut, f.FullName()) {
			c.t.Errorf("%s = %d is missing from ours", f.FullName(), f.Number())
		}
	}
	for i := range m.Messages().Len() {
		c.has(m.Messages().Get(i))
	}
	for i := range m.Enums().Len() {
		if e := m.Enums().Get(i); !c.met[e.FullName()] {
			c.t.Errorf("enum %s is missing from ours", e.FullName())
		}
	}
}
