package dns

import (
	"context"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// TestLookup: what SOCKS5 clients get names resolved by.
func TestLookup(t *testing.T) {
	up := &upstream{answer: func(protocol string, dst netip.AddrPort, raw []byte) [][]byte {
		m := mustUnpack(t, raw)
		if m.Question[0].Name == "nowhere.example." {
			return [][]byte{mustPack(new(dns.Msg).SetRcode(m, dns.RcodeNameError))}
		}
		return echo(protocol, dst, raw)
	}}
	s := start(t, Config{Upstream: up, Nameservers: []netip.AddrPort{kubeDNS}, Options: Options{IPv6: true}})
	got, err := s.Lookup(context.Background(), "cart")
	if want := []netip.Addr{netip.MustParseAddr("10.96.0.10")}; err != nil || !reflect.DeepEqual(got, want) {
		t.Error(got, err)
	}
	if got, err := s.Lookup(context.Background(), "hl.blue"); err != nil || len(got) != 3 || !got[0].Is4() ||
		!got[2].Is6() {
		t.Error("both families, IPv4 first:", got, err)
	}
	// What the mesh does not know is asked upstream.
	if got, err := s.Lookup(context.Background(), "elsewhere.example"); err != nil || len(got) == 0 ||
		got[0] != netip.MustParseAddr("192.0.2.1") {
		t.Error(got, err)
	}
	for host, text := range map[string]string{
		"nowhere.example":         `no address for "nowhere.example": A NXDOMAIN, AAAA NXDOMAIN`,
		strings.Repeat("a.", 200): "FORMERR", strings.Repeat("a", 70) + ".example": "no",
	} {
		if _, err := s.Lookup(context.Background(), host); err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%q: %v", host, err)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	<-ctx.Done()
	if _, err := s.Lookup(ctx, "far.elsewhere.example"); err == nil {
		t.Error("an ended context gave an answer")
	}
}
