package capture

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
)

// packet is an IP packet with as much of a header as anybody looks at.
func packet(src, dst string, proto uint8, payload string) []byte {
	s, d := netip.MustParseAddrPort(src), netip.MustParseAddrPort(dst)
	var b []byte
	l4 := binary.BigEndian.AppendUint16(nil, s.Port())
	l4 = binary.BigEndian.AppendUint16(l4, d.Port())
	if proto == protoTCP {
		l4 = append(l4, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0)
	} else {
		l4 = append(l4, 0, byte(8+len(payload)), 0, 0)
	}
	l4 = append(l4, payload...)
	if s.Addr().Is4() {
		b = append(b, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, proto, 0, 0)
		b = append(append(b, s.Addr().AsSlice()...), d.Addr().AsSlice()...)
		binary.BigEndian.PutUint16(b[2:], uint16(20+len(l4)))
	} else {
		b = append(b, 0x60, 0, 0, 0, byte(len(l4)>>8), byte(len(l4)), proto, 64)
		b = append(append(b, s.Addr().AsSlice()...), d.Addr().AsSlice()...)
	}
	return append(b, l4...)
}

func TestFilter(t *testing.T) {
	packets := map[string][]byte{
		"out":  packet("10.1.0.2:4000", "10.2.0.2:80", protoTCP, "GET"),
		"back": packet("10.2.0.2:80", "10.1.0.2:4000", protoTCP, "200"),
		"dns":  packet("10.1.0.2:4001", "10.1.0.53:53", protoUDP, "?"),
		"six":  packet("[fd00::1]:5000", "[fd00::2]:80", protoTCP, "six"),
		"ping": packet("[fd00::1]:0", "[fd00::2]:0", protoICMPv6, ""),
	}
	for filter, want := range map[string]string{
		"":                                    "back dns out ping six",
		"tcp":                                 "back out six",
		"udp or icmp":                         "dns ping",
		"port 80":                             "back out six",
		"dst port 80":                         "out six",
		"src port 80":                         "back",
		"host fd00::2":                        "ping six",
		"dst host 10.2.0.2":                   "out",
		"net 10.1.0.0/16":                     "back dns out",
		"src net 10.1.0.0/16 and not udp":     "out",
		"not tcp and not udp":                 "ping",
		"not (tcp or udp)":                    "ping",
		"port 53 or port 80 and host fd00::1": "dns six",
		"not not udp":                         "dns",
	} {
		f, err := ParseFilter(filter)
		if err != nil {
			t.Errorf("%q: %v", filter, err)
			continue
		}
		var got []string
		for _, name := range []string{"back", "dns", "out", "ping", "six"} {
			if p, ok := Parse(packets[name]); ok && f(p) {
				got = append(got, name)
			}
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%q takes %v, want %s", filter, got, want)
		}
	}
	for filter, want := range map[string]string{
		"host": "no address", "host nowhere": "no address", "port 0": "1 to 65535", "net 10.0.0.0": "no prefix",
		"tcp udp": `"udp" is not expected`,
		"(tcp":    "not closed", "tcp and": "it ends where", "src": "it ends where", "dst tcp": "no word", "ether": "no word",
		")":                             "no word",
		strings.Repeat("tcp or ", 1000): "at most",
	} {
		if _, err := ParseFilter(filter); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.20q: %v, want %q", filter, err, want)
		}
	}
}

func FuzzFilter(f *testing.F) {
	f.Add("tcp and (port 80 or not host ::1)", packet("10.1.0.2:4000", "10.2.0.2:80", protoTCP, "GET"))
	f.Add("src net 10.0.0.0/8", []byte{0x45})
	f.Fuzz(func(_ *testing.T, text string, b []byte) {
		p, ok := Parse(b)
		if want, err := ParseFilter(text); err == nil && ok {
			want(p)
		}
	})
}

// TestPcapng: what is written is read back by others: gopacket, and tcpdump.
func TestPcapng(t *testing.T) {
	var file bytes.Buffer
	w, err := NewWriter(&file, "ztun0", "pod default/a", 65535)
	if err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 11, 28, 12, 0, 0, 123456789, time.UTC)
	out, in := packet("10.1.0.2:4000", "10.2.0.2:80", protoTCP, "odd"),
		packet("[fd00::1]:5000", "[fd00::2]:80", protoTCP, "")
	if err := errors.Join(w.Packet(at, true, out, len(out), "spiffe://td/ns/a/sa/a"),
		w.Packet(at, false, in[:44], len(in), ""), w.Dropped(at, 7)); err != nil {
		t.Fatal(err)
	}
	r, err := pcapgo.NewNgReader(bytes.NewReader(file.Bytes()), pcapgo.NgReaderOptions{})
	if err != nil {
		t.Fatal(err)
	}
	data, ci, opts, err := r.ReadPacketDataWithOptions()
	if err != nil || !bytes.Equal(data, out) || !ci.Timestamp.Equal(at) || len(opts.Comments) != 1 ||
		opts.Comments[0] != "spiffe://td/ns/a/sa/a" ||
		opts.Flags == nil || opts.Flags.Direction != pcapgo.NgEpbFlagDirectionOutbound {
		t.Errorf("read back as %x at %v, %+v, %v", data, ci.Timestamp, opts, err)
	}
	data, ci, opts, err = r.ReadPacketDataWithOptions()
	if err != nil || !bytes.Equal(data, in[:44]) || ci.Length != len(in) || len(opts.Comments) != 0 {
		t.Errorf("read back as %x of %d, %+v, %v", data, ci.Length, opts, err)
	}
	if _, _, _, err = r.ReadPacketDataWithOptions(); err != io.EOF {
		t.Errorf("after the last packet: %v", err)
	}
	if i, err := r.Interface(0); err != nil || i.Name != "ztun0" || i.LinkType != layers.LinkTypeRaw ||
		i.Statistics.PacketsDropped != 7 {
		t.Errorf("interface %+v, %v", i, err)
	}
	cmd := exec.Command("tcpdump", "-nr", "-")
	cmd.Stdin = &file
	text, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(text), "IP 10.1.0.2.4000 > 10.2.0.2.80: Flags [S]") ||
		!strings.Contains(string(text), "fd00::2") {
		t.Errorf("tcpdump: %v\n%s", err, text)
	}
}

// TestQueue: what does not fit is dropped and counted, and the room comes back.
func TestQueue(t *testing.T) {
	q := NewQueue(func(p Packet) bool { return p.Dst.Port() == 80 }, 60, 3*(60+overhead))
	b := packet("10.1.0.2:4000", "10.2.0.2:80", protoTCP, strings.Repeat("x", 400))
	for range 5 {
		q.See(true, [][]byte{b[:7], b[7:50], b[50:], make([]byte, 9)}, len(b))
	}
	other := packet("10.1.0.2:4000", "10.2.0.2:81", protoTCP, "")
	q.See(true, [][]byte{other}, len(other))
	got := q.Take()
	if len(got) != 3 || q.Dropped() != 2 || !bytes.Equal(got[0].Data, b[:60]) || got[0].Length != len(b) || !got[0].Sent {
		t.Fatalf("%d taken, %d dropped: %+v", len(got), q.Dropped(), got)
	}
	q.See(true, [][]byte{b}, len(b))
	if q.Dropped() != 3 {
		t.Error("there is room for what was not given back")
	}
	q.Give(&got[0])
	q.See(false, [][]byte{b}, len(b))
	if got := q.Take(); len(got) != 1 || got[0].Sent {
		t.Errorf("%+v", got)
	}
}
