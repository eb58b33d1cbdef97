package zds

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	"ztun/admin/backoff"
	"ztun/admin/pb/zdspb"
)

// What an agent says on one connection, and what is made of it: +uid attaches, -uid detaches, ! refuses.
func TestSession(t *testing.T) {
	for _, c := range []struct{ name, known, says, want string }{
		{"a first snapshot", "", "add a, add b, snap", "+a, +b, ."},
		{"pods that the snapshot does not name end with it, not earlier", "a b c", "add b, snap", "+b, -a -c"},
		{"an empty snapshot ends all", "a b", "snap", "-a -b"},
		{"keep needs no namespace", "a b", "keep a, snap", "., -b"},
		{"a pod kept that nobody knows", "", "keep x, snap", "., ."},
		{"deleted within the snapshot: it goes at its end", "a b", "add a, add b, del a, snap", "+a, +b, ., -a"},
		{"deleted after it: at once, each time", "a", "add a, snap, del a, del a, del nobody", "+a, ., -a, -a, -nobody"},
		{"the same again", "a", "add a, add a, snap, add a", "+a, +a, ., +a"},
		{"what ztunnel ends for: refused, and all goes on", "a", "bare x, add a, snap, keep a, snap, bare x, add b",
			"!, +a, ., !, !, !, +b"},
		{"one without workload_info is not named", "x", "bare x, snap", "!, -x"},
	} {
		s := newSession()
		var got []string
		for say := range strings.SplitSeq(c.says, ", ") {
			verb, uid, _ := strings.Cut(say, " ")
			m := message{workload: Workload{UID: uid}}
			switch verb {
			case "bare":
				m.kind, m.noInfo = kindAdd, true
			case "keep":
				m.kind = kindKeep
			case "del":
				m.kind = kindDel
			case "snap":
				m.kind = kindSnapshotSent
			}
			what, err := s.take(m, strings.Fields(c.known))
			did := ""
			if what.attach {
				did = "+" + uid
			}
			for _, u := range what.detach {
				did += " -" + u
			}
			if err != nil {
				did += "!"
			}
			if did == "" {
				did = "."
			}
			got = append(got, strings.TrimSpace(did))
		}
		if g := strings.Join(got, ", "); g != c.want {
			t.Errorf("%s: %s\n  did  %s\n  want %s", c.name, c.says, g, c.want)
		}
	}
}

// A snapshot without end takes a bounded part of the memory.
func TestSnapshotIsBounded(t *testing.T) {
	s := newSession()
	for i := range maxNamed {
		if _, err := s.take(message{kind: kindKeep, workload: Workload{UID: fmt.Sprint(i)}}, nil); err != nil {
			t.Fatal(i, err)
		}
	}
	_, err := s.take(message{kind: kindKeep, workload: Workload{UID: "more"}}, nil)
	if err == nil || len(s.named) > maxNamed {
		t.Errorf("one more: %v, %d named", err, len(s.named))
	}
	if _, err := s.take(message{kind: kindKeep, workload: Workload{UID: "7"}}, nil); err != nil {
		t.Errorf("one that is named already: %v", err)
	}
}

// The bytes are those that a real ztunnel and istio-cni exchange (samples/zds-sequences.txt).
func TestWire(t *testing.T) {
	netns, err := os.Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer netns.Close()
	if got := fmt.Sprintf("%x %x", hello(), ack(nil)); got != "0801 0a00" {
		t.Errorf("hello and ack are %s", got)
	}
	for _, c := range []struct {
		bytes string
		fd    *os.File
		want  string
	}{
		{"\x0a\x1a\x0a\x05uid-a\x12\x11\x0a\x03web\x12\x04shop\x1a\x04user", netns, "Add {uid-a web shop user}"},
		{"\x0a\x07\x0a\x05uid-a", netns, "Add {uid-a   } bare"},
		{"\x12\x06\x12\x04uid1", nil, "Del {uid1   }"},
		{"\x1a\x00", nil, "SnapshotSent {   }"},
		{"\x2a\x06\x0a\x04uid1", nil, "Keep {uid1   }"},
		{"\x0a\x1a\x0a\x05uid-a\x12\x11\x0a\x03web\x12\x04shop\x1a\x04user", nil, "no network namespace came with it"},
		{"\x12\x06\x12\x04uid1", netns, "only Add has"},
		{"\x1a\x00", netns, "only Add has"},
		{"\x12\x06\x12\x04ui", nil, "no ZDS request"},
		{"\xff\xff\xff", nil, "no ZDS request"},
		{"\x0a\x00", netns, "Add without a uid"},
		{"\x12\x03\x0a\x01a", nil, "Del without a uid"}, // its uid is field 2
		{"\x7a\x01a", nil, "without a payload"},
		{"", nil, "without a payload"},
	} {
		m, err := decode([]byte(c.bytes), c.fd)
		got := fmt.Sprintf("%s %v", m.kind, m.workload)
		if m.noInfo {
			got += " bare"
		}
		if err != nil {
			got = err.Error()
		}
		if got != c.want && (err == nil || !strings.Contains(got, c.want)) {
			t.Errorf("%x: %s, want %s", c.bytes, got, c.want)
		}
	}
}

// A reason of any length and content is an ack that istio-cni can read: in one read of 1024 bytes.
func TestLongReason(t *testing.T) {
	for _, text := range []string{strings.Repeat("ä", 2000), "x" + strings.Repeat("€", 2000),
		"\xff\x00" + strings.Repeat("\xfe", 3000)} {
		b := ack(fmt.Errorf("%s", text))
		var r zdspb.WorkloadResponse
		if err := proto.Unmarshal(b, &r); err != nil || len(b) > 1024 || r.GetAck().GetError() == "" ||
			!utf8.ValidString(r.GetAck().GetError()) {
			t.Errorf("%d bytes, %v: %q", len(b), err, r.GetAck().GetError())
		}
	}
}

// Whatever the bytes: an error, or a message that has what its kind needs, and that can be judged.
func FuzzDecode(f *testing.F) {
	netns, err := os.Open("/proc/self/ns/net")
	if err != nil {
		f.Fatal(err)
	}
	defer netns.Close()
	for _, seed := range []string{"\x0a\x1a\x0a\x05uid-a\x12\x11\x0a\x03web\x12\x04shop\x1a\x04user",
		"\x12\x06\x12\x04uid1",
		"\x1a\x00", "\x2a\x06\x0a\x04uid1", "\x0a\x00", "\x7a\x01a", "\xff\xff\xff", "",
		"\x0a\x03\x0a\x01a\x1a\x00", "\x0a\x05\x0a\x01a\x12\x00", "\x12\x06\x12\x04\xff\xfe\xfd\xfc"} {
		f.Add([]byte(seed), true)
		f.Add([]byte(seed), false)
	}
	f.Fuzz(func(t *testing.T, b []byte, with bool) {
		var fd *os.File
		if with {
			fd = netns
		}
		m, err := decode(b, fd)
		if err != nil {
			if m.netns != nil {
				t.Error("an error that keeps the descriptor")
			}
			ack(err)
			return
		}
		if m.netns != fd || (m.kind == kindAdd) != with || (m.kind != kindSnapshotSent) != (m.workload.UID != "") ||
			len(m.workload.UID) > maxUID {
			t.Errorf("%+v", m)
		}
		if what, err := newSession().take(m, []string{"known"}); err != nil && (what.attach || what.detach != nil) {
			t.Error("a refused request does something")
		}
	})
}

// Failures wait longer and longer, other ends do not; but for an agent that hangs up at once every time.
func TestBackoff(t *testing.T) {
	b := newPauses(func(int64) int64 { return 0 })
	var got []string
	for range 13 {
		got = append(got, b.next(true, false, 0).String())
	}
	if s := strings.Join(got, " "); s != "20ms 40ms 80ms 160ms 320ms 640ms 1.28s 2.56s 5.12s 10.24s 15s 15s 15s" {
		t.Error(s)
	}
	if d := b.next(false, true, backoff.Brief); d != 0 {
		t.Errorf("after a good one: %v", d)
	}
	if d := b.next(true, false, 0); d != 2*backoff.Min {
		t.Errorf("the first failure after it: %v", d)
	}
	got = nil
	for range 6 {
		got = append(got, b.next(false, true, 0).String())
	}
	if s := strings.Join(got, " "); s != "0s 0s 0s 20ms 40ms 80ms" {
		t.Errorf("hung up at once: %s", s)
	}
}
