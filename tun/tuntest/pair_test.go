package tuntest_test

import (
	"bytes"
	"fmt"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztun/tun"
	"ztun/tun/tuntest"
)

const patience = 20 * time.Second

// packet is n bytes that begin like IPv4.
func packet(n int, mark byte) []byte {
	p := bytes.Repeat([]byte{mark}, n)
	p[0] = 0x45
	return p
}

func TestPair(t *testing.T) {
	a, b := tuntest.Pair(tuntest.Options{Offload: true, Queue: 4})
	defer a.Close()
	defer b.Close()
	h := tun.VNetHdr{Flags: tun.FlagNeedsCSum, GSOType: tun.GSOTCPv4, HdrLen: 40, GSOSize: 1460, CSumStart: 20,
		CSumOffset: 16}
	p := packet(60000, 7)
	go func() {
		for range 10 {
			if err := a.WritePacket(&h, [][]byte{p[:20], nil, p[20:]}); err != nil {
				t.Error(err)
			}
		}
	}()
	bufs := [][]byte{make([]byte, 128), make([]byte, tun.MaxPacket)}
	for range 10 {
		var got tun.VNetHdr
		n, err := b.ReadPacket(&got, bufs)
		if err != nil || got != h || n != len(p) || !bytes.Equal(append(bytes.Clone(bufs[0]), bufs[1][:n-128]...), p) {
			t.Fatalf("read %d bytes, %v, %v", n, &got, err)
		}
	}
}

func TestPairRules(t *testing.T) {
	plainA, plainB := tuntest.Pair(tuntest.Options{MTU: 1400})
	fastA, fastB := tuntest.Pair(tuntest.Options{Offload: true})
	for _, d := range []*tuntest.Device{plainA, plainB, fastA, fastB} {
		defer d.Close()
	}
	if err := fastB.SetMTU(1300); err != nil || fastB.MTU() != 1300 || fastA.MTU() != tun.DefaultMTU {
		t.Error(err, fastB.MTU(), fastA.MTU())
	}
	if fastB.SetMTU(1) == nil || plainA.Offload().VNetHdr || plainA.Offload().Why == "" || !fastA.Offload().TSO6 {
		t.Error("SetMTU or Offload is wrong")
	}
	gso := tun.VNetHdr{Flags: tun.FlagNeedsCSum, GSOType: tun.GSOTCPv4, HdrLen: 40, GSOSize: 1260, CSumStart: 20,
		CSumOffset: 16}
	long := gso
	long.GSOSize = 1261
	for _, c := range []struct {
		name string
		d    *tuntest.Device
		h    tun.VNetHdr
		p    []byte
		want error
	}{
		{"empty", plainA, tun.VNetHdr{}, nil, unix.EINVAL},
		{"not IP", plainA, tun.VNetHdr{}, []byte{0}, unix.EINVAL},
		{"MTU", plainA, tun.VNetHdr{}, packet(1400, 1), nil},
		{"above MTU", plainA, tun.VNetHdr{}, packet(1401, 1), unix.EMSGSIZE},
		{"header without offload", plainA, tun.VNetHdr{Flags: tun.FlagNeedsCSum}, packet(100, 1), tun.ErrNoOffload},
		{"peer's MTU", fastA, tun.VNetHdr{}, packet(1301, 1), unix.EMSGSIZE},
		{"segments of the MTU", fastA, gso, packet(5000, 1), nil},
		{"segments above the MTU", fastA, long, packet(5000, 1), unix.EMSGSIZE},
		{"header that does not fit", fastA, gso, packet(30, 1), unix.EINVAL},
		{"too long", fastA, gso, packet(65536, 1), unix.EMSGSIZE},
	} {
		if err := c.d.WritePacket(&c.h, [][]byte{c.p}); err != c.want {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
	var h tun.VNetHdr
	if _, err := plainB.ReadPacket(&h, [][]byte{make([]byte, 100)}); err != tun.ErrShortBuffer ||
		plainB.Stats().ShortBuffers != 1 {
		t.Error(err, plainB.Stats())
	}
}

func TestPairClose(t *testing.T) {
	a, b := tuntest.Pair(tuntest.Options{Queue: 1})
	done := make(chan error, 2)
	go func() {
		var h tun.VNetHdr
		_, err := b.ReadPacket(&h, [][]byte{make([]byte, 2000)})
		done <- err
	}()
	time.Sleep(time.Millisecond)
	b.Close()
	go func() {
		for {
			if err := a.WritePacket(&tun.VNetHdr{}, [][]byte{packet(10, 1)}); err != nil {
				done <- err
				return
			}
		}
	}()
	for range 2 {
		select {
		case err := <-done:
			if err != os.ErrClosed && err != unix.EIO {
				t.Error(err)
			}
		case <-time.After(patience):
			t.Fatal("Close unblocked nobody")
		}
	}
	a.Close()
	a.Close()
	if err := a.WritePacket(&tun.VNetHdr{}, [][]byte{packet(10, 1)}); err != os.ErrClosed {
		t.Error(err)
	}
	if _, err := a.ReadPacket(&tun.VNetHdr{}, nil); err != os.ErrClosed {
		t.Error(err)
	}

	// A writer that waits for room is unblocked by either end.
	for _, own := range []bool{false, true} {
		t.Run(fmt.Sprintf("own=%v", own), func(t *testing.T) {
			a, b := tuntest.Pair(tuntest.Options{Queue: 1})
			defer a.Close()
			defer b.Close()
			full := make(chan error, 1)
			go func() {
				for {
					if err := a.WritePacket(&tun.VNetHdr{}, [][]byte{packet(10, 1)}); err != nil {
						full <- err
						return
					}
				}
			}()
			time.Sleep(time.Millisecond)
			want := error(unix.EIO)
			if own {
				want = os.ErrClosed
				a.Close()
			} else {
				b.Close()
			}
			select {
			case err := <-full:
				if err != want {
					t.Errorf("%v, want %v", err, want)
				}
			case <-time.After(patience):
				t.Fatal("the writer still waits")
			}
		})
	}
}

func TestPairDrop(t *testing.T) {
	a, b := tuntest.Pair(tuntest.Options{Queue: 3, Drop: true})
	defer a.Close()
	defer b.Close()
	for i := range 10 {
		if err := a.WritePacket(&tun.VNetHdr{}, [][]byte{packet(10, byte(i))}); err != nil {
			t.Fatal(err)
		}
	}
	if a.Dropped() != 7 {
		t.Errorf("%d dropped", a.Dropped())
	}
	buf := make([]byte, 100)
	for i := range 3 {
		var h tun.VNetHdr
		if _, err := b.ReadPacket(&h, [][]byte{buf}); err != nil || buf[1] != byte(i) {
			t.Errorf("packet %d: %d, %v", i, buf[1], err)
		}
	}
}
