// Command ourpb prints the descriptors of ztun's generated wire types (a serialized FileDescriptorSet with all that
// they import). It is a program of its own because a process that links them beside Istio's types for the same
// messages panics while it starts.
package main

import (
	"log"
	"os"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"

	"ztun/admin/pb/citadelpb"
	"ztun/admin/pb/discoverypb"
	"ztun/admin/pb/securitypb"
	"ztun/admin/pb/workloadpb"
	"ztun/admin/pb/zdspb"
)

func main() {
	set, seen := &descriptorpb.FileDescriptorSet{}, map[string]bool{}
	var add func(protoreflect.FileDescriptor)
	add = func(f protoreflect.FileDescriptor) {
		if seen[f.Path()] {
			return
		}
		seen[f.Path()] = true
		for i := range f.Imports().Len() {
			add(f.Imports().Get(i).FileDescriptor)
		}
		set.File = append(set.File, protodesc.ToFileDescriptorProto(f))
	}
	for _, m := range []proto.Message{
		&citadelpb.IstioCertificateRequest{}, &discoverypb.DeltaDiscoveryRequest{}, &securitypb.Authorization{},
		&workloadpb.Address{}, &zdspb.WorkloadRequest{},
	} {
		add(m.ProtoReflect().Descriptor().ParentFile())
	}
	b, err := proto.Marshal(set)
	if err == nil {
		_, err = os.Stdout.Write(b)
	}
	if err != nil {
		log.Fatal(err)
	}
}
