package control

import (
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"ztun/admin/pb/discoverypb"
)

// FuzzRequests feeds a subscription with whatever a node may send: a first request and a second. It must not panic, and
// every message must keep to its limit.
func FuzzRequests(f *testing.F) {
	snap := snapshotOf(f, nil, fromLocal(f, "a", parse(f, meshYAML)))
	add := func(requests ...*discoverypb.DeltaDiscoveryRequest) {
		var raw [2][]byte
		for i, r := range requests {
			b, err := proto.Marshal(r)
			check(f, err)
			raw[i] = b
		}
		f.Add(raw[0], raw[1])
	}
	add(request("", ""))
	add(request("*", "*", "/10.0.0.2=", "u/x=1"), request("/10.0.0.2 shop/stock.host //", "u/x *"))
	add(request("* /10.10.0.1", "*"), &discoverypb.DeltaDiscoveryRequest{ResponseNonce: "v1-1",
		ErrorDetail: &discoverypb.Status{Message: "x"}})
	f.Fuzz(func(t *testing.T, first, second []byte) {
		for _, url := range []string{typeAddress, typeAuthorization} {
			d := newSubscription(url, "node-a")
			d.publish(snap)
			for _, raw := range [][]byte{first, second} {
				req := &discoverypb.DeltaDiscoveryRequest{}
				if proto.Unmarshal(raw, req) != nil || d.request(req, time.Now()) != nil {
					return
				}
				const limit = 200
				for range 1000 {
					m := d.next(limit)
					if m == nil {
						break
					}
					size := 0
					for _, it := range m.items {
						size += it.size()
					}
					if len(m.items) > 1 && size > limit {
						t.Fatalf("%d resources of %d bytes", len(m.items), size)
					}
					if raw := m.encode(url); proto.Size(raw) == 0 {
						t.Fatal("an empty message")
					}
					d.sent(m, time.Now())
					if err := d.request(&discoverypb.DeltaDiscoveryRequest{ResponseNonce: m.nonce}, time.Now()); err != nil {
						t.Fatal(err)
					}
				}
				if d.stats.synced != snap.version {
					t.Fatal("never in sync")
				}
			}
		}
	})
}
