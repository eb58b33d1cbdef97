package attach

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func TestParseTCPTable(t *testing.T) {
	// Of a little-endian machine, as all are that the tests run on.
	const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:3A98 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 02015B0A:1F90 6401020A:C350 01 00000000:00000000 00:00000000 00000000     0        0 1 1 0 20 4 30 10 -1
   2: 02015B0A:1F91 6401020A:C351 08 00000000:00000000 00:00000000 00000000     0        0 1 1 0 20 4 30 10 -1
   3: 02015B0A:1F92 6401020A:C352 06 00000000:00000000 00:00000000 00000000     0        0 1 1 0 20 4 30 10 -1
   4: 0000000000000000FFFF000002015B0A:1F93 0000000000000000FFFF00006401020A:C353 05 00000000:00000000 00:00000000 00000000 0 0 1
   5: 000091FD010000000000000002000000:0050 B80D0120000000000000000001000000:0051 01 00000000:00000000 00:00000000 00000000 0 0 1
`
	got, err := parseTCPTable(strings.NewReader(table))
	a := netip.MustParseAddrPort
	want := []connection{
		{Conn{a("127.0.0.1:15000"), a("0.0.0.0:0"), 1}, tcpListen},
		{Conn{a("10.91.1.2:8080"), a("10.2.1.100:50000"), 1}, tcpEstablished},
		{Conn{a("10.91.1.2:8081"), a("10.2.1.100:50001"), 1}, tcpCloseWait},
		{Conn{a("10.91.1.2:8082"), a("10.2.1.100:50002"), 1}, tcpTimeWait},
		{Conn{a("10.91.1.2:8083"), a("10.2.1.100:50003"), 1}, tcpFinWait2},
		{Conn{a("[fd91:0:0:1::2]:80"), a("[2001:db8::1]:81"), 1}, tcpEstablished},
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v\nwant %v", got, err, want)
	}
	for _, bad := range []string{"x", "0: 0100007F:1 00000000:0 ZZ 0 0 0 0 0 1", "0: 010000:1 00000000:0 01 0 0 0 0 0 1",
		"0: 0100007F 0100007F:1 01 0 0 0 0 0 1", "0: 0100007F:12345 0100007F:1 01 0 0 0 0 0 1",
		"0: 0100007F:1 0100007F:1 01 0 0 0 0 0 x", "0: 0100007F:1 0100007F:1 01"} {
		if _, err := parseTCPTable(strings.NewReader("head\n" + bad + "\n")); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}
