package tun

import (
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ztun/tun/tuntest/nslab"
)

// TestAdopt: a descriptor of somebody else's TUN becomes a device, by the path that its flags allow; of any other it is
// said what is wrong with it. The descriptor stays the caller's, and none is left.
func TestAdopt(t *testing.T) {
	ns := nslab.New(t)
	attached := func(flags uint16) *os.File {
		t.Helper()
		var f *os.File
		err := ns.NS.Do(func() error {
			h, err := attachFlags(clonePath, "zt0", flags)
			if err != nil {
				return err
			}
			f = os.NewFile(uintptr(h.fd), "tun")
			h.fd = -1
			h.close()
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	open := func(path string) *os.File {
		t.Helper()
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	count := func() int {
		e, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(e)
	}
	const flags = unix.IFF_TUN | unix.IFF_NO_PI
	refuses := func(int) (probeResult, error) { return probeResult{}, errors.New("no super-packets here") }
	before := 0
	for i, test := range []struct {
		file  func() *os.File
		probe func(int) (probeResult, error)
		mtu   int
		vnet  bool
		want  string // in the error, or in the reason of the plain path
	}{
		{file: func() *os.File { return attached(flags) }, want: "without IFF_VNET_HDR"}, // also: the poller's descriptors
		{file: func() *os.File { return attached(flags | unix.IFF_VNET_HDR) }, vnet: true},
		{file: func() *os.File { return attached(flags | unix.IFF_VNET_HDR) }, probe: refuses, want: "no super-packets here"},
		{file: func() *os.File { return attached(unix.IFF_TAP | unix.IFF_NO_PI) }, want: "zt0 is a TAP device"},
		{file: func() *os.File { return attached(unix.IFF_TUN) }, want: "make it with IFF_NO_PI"},
		{file: func() *os.File { return attached(unix.IFF_TUN | unix.IFF_VNET_HDR) }, want: "make it with IFF_NO_PI"},
		{file: func() *os.File { return open(clonePath) }, want: "attached to no interface"},
		{file: func() *os.File { return open("/dev/null") }, want: "none of a TUN interface"},
		{file: func() *os.File { return attached(flags) }, mtu: 1, want: "MTU 1 is not between"},
	} {
		f := test.file()
		if test.probe == nil {
			test.probe = probe
		}
		dev, err := adopt(f, test.mtu, test.probe)
		why := ""
		switch {
		case err != nil:
			why = err.Error()
		default:
			if dev.Name() != "zt0" || dev.MTU() != DefaultMTU || dev.Offload().VNetHdr != test.vnet {
				t.Errorf("%d: %s, MTU %d, %+v", i, dev.Name(), dev.MTU(), dev.Offload())
			}
			if err := dev.SetMTU(1400); !errors.Is(err, ErrForeign) {
				t.Errorf("%d: SetMTU of a foreign device: %v", i, err)
			}
			if why = dev.Offload().Why; test.vnet {
				why = ""
			}
			dev.Close()
		}
		if !strings.Contains(why, test.want) || (why == "") != (test.want == "") {
			t.Errorf("%d: %q, want %q", i, why, test.want)
		}
		if _, err := f.Stat(); err != nil {
			t.Errorf("%d: the caller's descriptor: %v", i, err)
		}
		f.Close()
		if n := count(); i == 0 {
			before = n
		} else if n > before {
			t.Errorf("%d: %d descriptors before, %d after", i, before, n)
		}
	}
}
