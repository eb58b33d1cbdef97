package tun_test

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"ztun/tun"
	"ztun/tun/tuntest"
)

// TestTap: whoever looks sees every packet of both directions, until he stops; and no more than a few look.
func TestTap(t *testing.T) {
	near, far := tuntest.Pair(tuntest.Options{MTU: 1500})
	tap := tun.NewTap(near)
	defer far.Close()
	var seen []string
	stop, err := tap.Look(func(sent bool, bufs [][]byte, n int) {
		seen = append(seen, map[bool]string{true: "<", false: ">"}[sent]+string(bytes.Join(bufs, nil)[:n]))
	})
	if err != nil {
		t.Fatal(err)
	}
	exchange := func() {
		t.Helper()
		buf := make([]byte, 1500)
		if err := far.WritePacket(&tun.VNetHdr{}, [][]byte{[]byte("Eping")}); err != nil {
			t.Fatal(err)
		}
		if n, err := tap.ReadPacket(&tun.VNetHdr{}, [][]byte{buf}); err != nil || string(buf[:n]) != "Eping" {
			t.Fatalf("%q, %v", buf[:n], err)
		}
		if err := tap.WritePacket(&tun.VNetHdr{}, [][]byte{[]byte("Ep"), []byte("ong")}); err != nil {
			t.Fatal(err)
		}
		if n, err := far.ReadPacket(&tun.VNetHdr{}, [][]byte{buf}); err != nil || string(buf[:n]) != "Epong" {
			t.Fatalf("%q, %v", buf[:n], err)
		}
	}
	exchange()
	buf := make([]byte, 1500)
	if n, err := tap.TryReadPacket(&tun.VNetHdr{}, [][]byte{buf}); err != tun.ErrNothing {
		t.Errorf("nothing is there: %q, %v", buf[:n], err)
	}
	if err := far.WritePacket(&tun.VNetHdr{}, [][]byte{[]byte("Etry")}); err != nil {
		t.Fatal(err)
	}
	if n, err := tap.TryReadPacket(&tun.VNetHdr{}, [][]byte{buf}); err != nil || string(buf[:n]) != "Etry" {
		t.Errorf("%q, %v", buf[:n], err)
	}
	waits := tun.NewTap(struct{ tun.Device }{near})
	if _, err := waits.TryReadPacket(&tun.VNetHdr{}, [][]byte{buf}); err != tun.ErrNothing {
		t.Errorf("a device that has to be waited for: %v", err)
	}
	stop()
	exchange()
	if len(seen) != 3 || seen[0] != "<Eping" || seen[1] != ">Epong" || seen[2] != "<Etry" {
		t.Errorf("seen: %q", seen)
	}
	for range 4 {
		if _, err := tap.Look(func(bool, [][]byte, int) {}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := tap.Look(func(bool, [][]byte, int) {}); !errors.Is(err, tun.ErrTapBusy) {
		t.Errorf("a fifth looks: %v", err)
	}
	select {
	case <-tap.Done():
		t.Error("done before it is closed")
	default:
	}
	tap.Close()
	<-tap.Done()
	if _, err := tap.ReadPacket(&tun.VNetHdr{}, [][]byte{make([]byte, 9)}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("reading from a closed one: %v", err)
	}
}
