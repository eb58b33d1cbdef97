package proc

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseNetstat(t *testing.T) {
	got, err := ParseNetstat("Ip: Forwarding InReceives\nIp: 1 42\nTcp: MaxConn RetransSegs\nTcp: -1 7\n")
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(map[string]uint64{"Ip.Forwarding": 1, "Ip.InReceives": 42, "Tcp.RetransSegs": 7}, got); d != "" {
		t.Error(d)
	}
	for _, in := range []string{"Ip: A B\nTcp: 1 2\n", "Ip: A B\nIp: 1\n"} {
		if _, err := ParseNetstat(in); err == nil {
			t.Errorf("%q: no error", in)
		}
	}
}

func TestParseDevDrops(t *testing.T) {
	got := ParseDevDrops(`Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16
 ztun0:1 2 3 0 5 6 7 8 9 10 11 0 13 14 15 16
  bad0: 1 2 3 x 5 6 7 8 9 10 11 0 13 14 15 16
`)
	if d := cmp.Diff(map[string]uint64{"lo": 16, "ztun0": 0}, got); d != "" {
		t.Error(d)
	}
}
