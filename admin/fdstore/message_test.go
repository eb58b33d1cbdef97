package fdstore_test

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"ztun/admin/fdstore"
)

func TestParse(t *testing.T) {
	for _, c := range []struct {
		text string
		want fdstore.Message
		bad  bool
	}{
		{"FDSTORE=1\nFDNAME=a.b", fdstore.Message{Store: true, Name: "a.b"}, false},
		{"FDSTORE=1\nFDNAME=a\nFDPOLL=0\n", fdstore.Message{Store: true, Name: "a"}, false},
		{"FDSTOREREMOVE=1\nFDNAME=a", fdstore.Message{Remove: true, Name: "a"}, false},
		{"BARRIER=1", fdstore.Message{Barrier: true}, false},
		{"READY=1\nSTATUS=all = well\nX_OWN=\n", fdstore.Message{Ready: true}, false},
		{"STOPPING=1", fdstore.Message{Stopping: true}, false},
		{"", fdstore.Message{}, false},
		{"FDSTORE=yes", fdstore.Message{}, false},
		{"FDSTORE=1", fdstore.Message{}, true},
		{"FDSTORE=1\nFDNAME=", fdstore.Message{}, true},
		{"FDSTORE=1\nFDNAME=a:b", fdstore.Message{}, true},
		{"FDSTORE=1\nFDNAME=ä", fdstore.Message{}, true},
		{"FDSTORE=1\nFDNAME=a\x01", fdstore.Message{}, true},
		{"FDSTORE=1\nFDNAME=" + strings.Repeat("a", 256), fdstore.Message{}, true},
		{"FDSTORE=1\nFDNAME=" + strings.Repeat("a", 255), fdstore.Message{Store: true, Name: strings.Repeat("a", 255)}, false},
		{"FDSTORE=1\nFDSTOREREMOVE=1\nFDNAME=a", fdstore.Message{}, true},
		{"FDSTOREREMOVE=1", fdstore.Message{}, true},
		{"garbage", fdstore.Message{}, true},
		{"\x00\xff", fdstore.Message{}, true},
		{"X=" + strings.Repeat("x", fdstore.MaxMessage), fdstore.Message{}, true},
	} {
		got, err := fdstore.Parse([]byte(c.text))
		if got != c.want || (err != nil) != c.bad || err != nil && !errors.Is(err, fdstore.ErrMessage) {
			t.Errorf("%q: %+v, %v", c.text, got, err)
		}
	}
}

// FuzzParse: whatever comes is a message or an error, and what is a message can be sent as one.
func FuzzParse(f *testing.F) {
	for _, m := range []fdstore.Message{{Store: true, Name: "a.4.t15008.__"}, {Remove: true, Name: "a"}, {Barrier: true},
		{Ready: true, Stopping: true}} {
		f.Add([]byte(m.String()))
	}
	f.Add([]byte("FDSTORE=1\nFDSTOREREMOVE=1\nFDNAME=:\n"))
	f.Add([]byte("FDNAME=a\nFDNAME=b\n\n=\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := fdstore.Parse(b)
		if err != nil {
			if m != (fdstore.Message{}) {
				t.Errorf("%+v beside %v", m, err)
			}
			return
		}
		if len(m.Name) > fdstore.MaxName || strings.ContainsAny(m.Name, ":\n\x00") {
			t.Errorf("a name that cannot be handed on: %q", m.Name)
		}
		if again, err := fdstore.Parse([]byte(m.String())); err != nil || again != m {
			t.Errorf("%+v comes back as %+v, %v", m, again, err)
		}
	})
}

// TestName: names differ wherever the sockets do, and are names.
func TestName(t *testing.T) {
	seen := map[string]bool{}
	for _, ino := range []uint64{4026532312, 4026532313} {
		for _, network := range []string{"tcp", "udp"} {
			for _, at := range []string{"[::]:15008", "0.0.0.0:15008", "[::]:15001", "[::1]:15053", "127.0.0.1:15053",
				"[fd00:1234:5678:9abc:def0:1234:5678:9abc]:65535"} {
				n := fdstore.Name(4, ino, network, netip.MustParseAddrPort(at))
				if seen[n] {
					t.Errorf("%s twice", n)
				}
				seen[n] = true
				if m, err := fdstore.Parse([]byte(fdstore.Message{Store: true, Name: n}.String())); err != nil || m.Name != n {
					t.Errorf("%q: %v", n, err)
				}
			}
		}
	}
}
