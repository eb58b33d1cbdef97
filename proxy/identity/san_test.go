package identity

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"slices"
	"testing"
)

// extensions is a list with something that is no SAN in it.
func extensions() []pkix.Extension {
	return []pkix.Extension{{Id: []int{2, 5, 29, 15}, Value: []byte{3, 2, 5, 160}}}
}

func TestSANs(t *testing.T) {
	// Kept as signed: neither unescaped, nor re-escaped, nor lower-cased; others passed over.
	uris := []string{"https://x/", "SPIFFE://td/ns/n/sa/upper", "spiffe://td/ns/n/sa/a%20b", "spiffe://td/ns/n/sa/b",
		"spiffe://td/ns/n/sa/b/"}
	cert := &x509.Certificate{Extensions: append(extensions(), sans(t, uris...))}
	if got := URIs(cert.Extensions); !slices.Equal(got, uris) {
		t.Fatalf("URIs: %q", got)
	}
	a, b := ID{"td", "n", "a%20b"}, ID{"td", "n", "b"}
	if got, ok := First(cert); got != a || !ok {
		t.Fatalf("First: %v %v", got, ok)
	}
	if got := All(cert); !slices.Equal(got, []ID{a, b}) {
		t.Fatalf("All: %v", got)
	}
	if got, ok := PeerID(tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert}}); got != a || !ok {
		t.Fatalf("PeerID: %v %v", got, ok)
	}
	if _, ok := PeerID(tls.ConnectionState{}); ok {
		t.Fatal("identity from nothing")
	}
	if _, ok := First(&x509.Certificate{Extensions: extensions()}); ok {
		t.Fatal("identity without a SAN")
	}
}

func FuzzSAN(f *testing.F) {
	f.Add(sans(f, "spiffe://td/ns/n/sa/s", "x").Value)
	f.Add([]byte{0x30, 0x02, 0x86, 0x00})
	f.Add([]byte{0x30, 0x03, 0x82, 0x01, 'x'})
	f.Add([]byte{0x30, 0x80, 0x86})
	f.Fuzz(func(t *testing.T, der []byte) {
		cert := &x509.Certificate{Extensions: []pkix.Extension{{Id: sanOID(), Value: der}}}
		all := All(cert)
		first, ok := First(cert)
		if ok != (len(all) > 0) || ok && first != all[0] {
			t.Fatalf("First %v %v, All %v", first, ok, all)
		}
	})
}
