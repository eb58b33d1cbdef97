package cni

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ztun/admin/watch"
	"ztun/tun/replace"
)

// node is a node's directories, and an Installer for them.
type node struct {
	t         *testing.T
	conf, bin string
	program   string
	in        *Installer
}

func newNode(t *testing.T) node {
	t.Helper()
	root := t.TempDir()
	n := node{t, filepath.Join(root, "net.d"), filepath.Join(root, "bin"), filepath.Join(root, "ztun"), nil}
	for _, d := range []string{n.conf, n.bin} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(n.program, bytes.Repeat([]byte("program"), 30000), 0o600); err != nil {
		t.Fatal(err)
	}
	in, err := NewInstaller(Options{ConfDir: n.conf, BinDir: n.bin, Socket: "/run/s", Program: n.program,
		Own: []string{"istio-system/ztun-agent-"}, Log: slog.New(slog.DiscardHandler),
		Settle: time.Millisecond, Poll: 20 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	n.in = in
	return n
}

// start runs the Installer; the function ends it.
func (n node) start(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() { defer close(done); n.in.Run(ctx) }()
	stop = func() { cancel(); <-done }
	n.t.Cleanup(stop)
	return stop
}

func (n node) write(name, text string) {
	n.t.Helper()
	if err := os.WriteFile(filepath.Join(n.conf, name), []byte(text), 0o640); err != nil {
		n.t.Fatal(err)
	}
}

func (n node) read(name string) string {
	b, err := os.ReadFile(filepath.Join(n.conf, name))
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// eventually waits until a file has the text that want gives.
func (n node) eventually(name, want string) {
	n.t.Helper()
	for end := time.Now().Add(60 * time.Second); n.read(name) != want; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			n.t.Fatalf("%s:\n%s\nwant\n%s", name, n.read(name), want)
		}
	}
}

// inserted is a configuration with the node's entry.
func (n node) inserted(conf string) string {
	n.t.Helper()
	out, _, err := Insert([]byte(conf), n.in.entry)
	if err != nil {
		n.t.Fatal(err)
	}
	return string(out)
}

func (n node) know() {
	n.t.Helper()
	if err := n.in.Know(Enrolled{Namespaces: []string{"shop"}}); err != nil {
		n.t.Fatal(err)
	}
}

// TestInstaller: from the first knowledge on the plugin stands in the configuration that the runtime takes, whatever
// other CNIs do, and goes without a trace.
func TestInstaller(t *testing.T) {
	n := newNode(t)
	n.write("10-bridge.conflist", bridge)
	n.write("20-other.conflist", bridge)
	n.write("05-notes.txt", "not JSON")
	stop := n.start(t.Context())
	n.know()
	n.eventually("10-bridge.conflist", n.inserted(bridge))
	if n.read("20-other.conflist") != bridge {
		t.Error("a configuration that the runtime does not take was changed")
	}
	info, err := os.Stat(filepath.Join(n.conf, "10-bridge.conflist"))
	if err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	want, _ := os.ReadFile(n.program)
	plugin := filepath.Join(n.bin, PluginType)
	if got, err := os.ReadFile(plugin); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the program: %d bytes, %v; want %d", len(got), err, len(want))
	}
	if info, err := os.Stat(plugin); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("the program's mode %v, %v", info.Mode(), err)
	}
	if e, err := readEnrolled(n.in.entry.Enrolled); err != nil || !e.Waits("shop", "cart-0") || e.Waits("infra", "dns") {
		t.Errorf("%v, %v", e, err)
	}

	// Another CNI writes its own anew; a new one comes before it; somebody deletes the program.
	changed := strings.Replace(bridge, "1450.0", "1400", 1)
	n.write("10-bridge.conflist", changed)
	n.eventually("10-bridge.conflist", n.inserted(changed))
	first := strings.Replace(bridge, "bridge", "ptp", 1)
	n.write("00-first.conflist", first)
	n.eventually("00-first.conflist", n.inserted(first))
	if err := os.Remove(plugin); err != nil {
		t.Fatal(err)
	}
	n.eventually(filepath.Join("..", "bin", PluginType), string(want))

	stop()
	n.eventually("00-first.conflist", n.inserted(first)) // the end of the agent leaves it
	if err := n.in.Uninstall(); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"00-first.conflist": first, "10-bridge.conflist": changed,
		"20-other.conflist": bridge, "05-notes.txt": "not JSON"} {
		if got := n.read(name); got != want {
			t.Errorf("%s:\n%s\nwant\n%s", name, got, want)
		}
	}
	for _, p := range []string{plugin, filepath.Dir(n.in.entry.Enrolled)} {
		if _, err := os.Lstat(p); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", p, err)
		}
	}
	n.know() // too late
	if n.in.Installed() || n.read("00-first.conflist") != first {
		t.Error("put in place again after it was taken away")
	}
	if err := Uninstall(n.conf, n.bin); err != nil {
		t.Errorf("where there is nothing: %v", err)
	}
}

// TestInstallerWaits: nothing is written before something is known, and a node whose CNI comes later is no error that
// stays. Without events it is found as well.
func TestInstallerWaits(t *testing.T) {
	n := newNode(t)
	n.in.o.Poll = 5 * time.Millisecond
	n.write("10-bridge.conflist", bridge)
	n.start(watch.WithoutEvents(t.Context()))
	n.in.mend() // as Run would, had it begun
	if n.read("10-bridge.conflist") != bridge || n.in.Installed() {
		t.Error("written before anything is known")
	}
	if err := os.Remove(filepath.Join(n.conf, "10-bridge.conflist")); err != nil {
		t.Fatal(err)
	}
	n.know()
	for end := time.Now().Add(60 * time.Second); n.in.Stats().Failures < 3; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%+v", n.in.Stats())
		}
	}
	n.write("10-bridge.conflist", bridge)
	n.eventually("10-bridge.conflist", n.inserted(bridge))
	for end := time.Now().Add(60 * time.Second); !n.in.Installed(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not in place")
		}
	}
	if w := n.in.Stats().Writes; w != 1 {
		t.Errorf("written %d times", w)
	}
}

// TestSinglePlugin: the configuration of one plugin becomes a list, each time that its CNI writes it, and never over
// one that is somebody else's.
func TestSinglePlugin(t *testing.T) {
	one := `{"cniVersion":"0.3.1","name":"n","type":"ptp"}`
	n := newNode(t)
	n.write("10-ptp.conf", one)
	n.start(t.Context())
	n.know()
	n.eventually("10-ptp.conflist", n.inserted(one))
	gone := func() {
		t.Helper()
		end := time.Now().Add(60 * time.Second)
		for ; !strings.Contains(n.read("10-ptp.conf"), "no such file"); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("the runtime would take 10-ptp.conf still")
			}
		}
	}
	gone()
	changed := strings.Replace(one, "0.3.1", "0.4.0", 1)
	n.write("10-ptp.conf", changed)
	n.eventually("10-ptp.conflist", n.inserted(changed))
	gone()

	m := newNode(t)
	m.know()
	m.write("10-ptp.conf", one)
	m.write("10-ptp.conflist", bridge)
	if err := m.in.place(); err == nil || !strings.Contains(err.Error(), "is there already") {
		t.Errorf("somebody else's list: %v", err)
	}
	if m.read("10-ptp.conf") != one || m.read("10-ptp.conflist") != bridge {
		t.Error("something was written all the same")
	}
}

// TestOthersWrite: what another CNI writes between our reading and our writing is not lost.
func TestOthersWrite(t *testing.T) {
	n := newNode(t)
	for name, listed := range map[string]bool{"10-bridge.conflist": false, "20-ptp.conf": true} {
		n.write(name, "theirs, and new")
		err := writeConf(filepath.Join(n.conf, name), []byte("what was read"), []byte(bridge), listed)
		if !errors.Is(err, replace.ErrChanged) || n.read(name) != "theirs, and new" {
			t.Errorf("%s: %v, %s", name, err, n.read(name))
		}
	}
}

// TestBroken: what is no configuration is passed over, and named where there is no other.
func TestBroken(t *testing.T) {
	n := newNode(t)
	n.know()
	n.write("00-half.conflist", `{"name":"n","plu`)
	if err := n.in.place(); err == nil || !strings.Contains(err.Error(), "00-half.conflist: no network configuration") {
		t.Errorf("%v", err)
	}
	n.write("10-bridge.conflist", bridge)
	if err := os.Symlink("10-bridge.conflist", filepath.Join(n.conf, "05-link.conflist")); err != nil {
		t.Fatal(err)
	}
	if err := n.in.place(); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Lstat(filepath.Join(n.conf, "05-link.conflist")); err != nil || info.Mode()&os.ModeSymlink == 0 {
		t.Errorf("the link is none any more: %v, %v", info, err)
	}
	if n.read("10-bridge.conflist") != n.inserted(bridge) {
		t.Errorf("%s", n.read("10-bridge.conflist"))
	}
	if left, _ := filepath.Glob(filepath.Join(n.conf, ".new-*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestUninstallKeepsProgram: a configuration that cannot be looked at may need the program.
func TestUninstallKeepsProgram(t *testing.T) {
	n := newNode(t)
	n.know()
	n.write("10-bridge.conflist", bridge)
	if err := n.in.place(); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(n.conf, "nowhere"), filepath.Join(n.conf, "20-dangling.conflist")); err != nil {
		t.Fatal(err)
	}
	if err := n.in.Uninstall(); err == nil || !strings.Contains(err.Error(), "20-dangling.conflist") {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(filepath.Join(n.bin, PluginType)); err != nil {
		t.Errorf("the program: %v", err)
	}
}

// TestNewInstaller: paths have to mean the same on the node.
func TestNewInstaller(t *testing.T) {
	for _, o := range []Options{
		{BinDir: "/b", Socket: "/s", Program: "/p"},
		{ConfDir: "etc", BinDir: "/b", Socket: "/s", Program: "/p"},
		{ConfDir: "/c", BinDir: "/b", Socket: "s", Program: "/p"},
	} {
		if _, err := NewInstaller(o); err == nil || !strings.Contains(err.Error(), "no absolute path") {
			t.Errorf("%+v: %v", o, err)
		}
	}
}
