package cni

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fsnotify/fsnotify"

	"ztun/admin/watch"
	"ztun/tun/replace"
)

// Options is what an Installer is made of.
type Options struct {
	// ConfDir is where the runtime reads network configurations, BinDir where it finds plugins. They are written as
	// they are called here, so that they must have the same names on the node.
	ConfDir, BinDir string
	Socket          string   // of the agent, as the node sees it
	Program         string   // the ztun program, which is copied
	Own             []string // see Entry.Own
	Log             *slog.Logger

	// Settle is how long a directory has to be left alone before it is looked at; 0: 200 ms.
	Settle time.Duration
	// Poll is how often it is looked at anyway; 0: 30 s.
	Poll time.Duration
}

// Stats are an Installer's figures.
type Stats struct {
	Writes   uint64 // how often the network configuration was written: once, and each time that another CNI took ztun out
	Failures uint64 // looks after which the plugin was not in place
}

// Installer puts the plugin into a node's network configuration and keeps it there.
type Installer struct {
	o     Options
	entry Entry

	said string        // the last failure that was logged; Run's
	look chan struct{} // full when Run may begin

	mu      sync.Mutex // orders what is written
	known   []byte     // Enrolled as it is to be on the disk; nil: nothing yet
	removed bool

	installed        atomic.Bool
	writes, failures atomic.Uint64
}

// NewInstaller checks the options and makes an Installer; nothing is written before Know.
func NewInstaller(o Options) (*Installer, error) {
	for _, p := range []struct{ name, path string }{
		{"directory of network configurations", o.ConfDir}, {"directory of CNI plugins", o.BinDir},
		{"agent's socket", o.Socket}, {"ztun program", o.Program},
	} {
		if !filepath.IsAbs(p.path) {
			return nil, fmt.Errorf("%s: %q is no absolute path", p.name, p.path)
		}
	}
	o.Settle, o.Poll = cmp.Or(o.Settle, 200*time.Millisecond), cmp.Or(o.Poll, 30*time.Second)
	return &Installer{o: o, look: make(chan struct{}, 1), entry: Entry{
		Type: PluginType, Socket: o.Socket, Enrolled: filepath.Join(o.ConfDir, "ztun.d", "enrolled.json"), Own: o.Own,
	}}, nil
}

// Know writes down what is known of the mesh on this node; it costs nothing where nothing has changed. From the first
// call on Run puts the plugin in place: without the file no pod would start while there is no agent.
func (in *Installer) Know(e Enrolled) error {
	b := e.encode()
	if len(b) > MaxEnrolled {
		return fmt.Errorf("what is known of the mesh takes %d bytes, more than the %d that the plugin reads", len(b), MaxEnrolled)
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.removed || bytes.Equal(in.known, b) {
		return nil
	}
	if err := in.writeKnown(b); err != nil {
		return err
	}
	first := in.known == nil
	in.known = b
	if first {
		select {
		case in.look <- struct{}{}:
		default:
		}
	}
	return nil
}

func (in *Installer) writeKnown(b []byte) error {
	if err := os.MkdirAll(filepath.Dir(in.entry.Enrolled), 0o755); err != nil {
		return err
	}
	return replace.File(in.entry.Enrolled, 0o644, b)
}

// Run puts the plugin in place and mends it until ctx ends. It stays in place then.
func (in *Installer) Run(ctx context.Context) {
	select {
	case <-in.look:
	case <-ctx.Done():
		return
	}
	watch.Run(ctx, watch.Options{
		Dirs: func() []string { return []string{in.o.ConfDir, in.o.BinDir} },
		Concerns: func(e fsnotify.Event) bool {
			return configuration(e.Name) || filepath.Base(e.Name) == PluginType
		},
		Settle: in.o.Settle, Poll: in.o.Poll, Log: in.o.Log,
	}, func(watch.Cause) { in.mend() })
}

// mend looks once, and says what has failed, once for each reason.
func (in *Installer) mend() {
	err := in.place()
	in.installed.Store(err == nil)
	text := ""
	if err != nil {
		in.failures.Add(1)
		text = err.Error()
	}
	if text == in.said {
		return
	}
	in.said = text
	if err != nil {
		in.o.Log.Warn("the CNI plugin is not in place: pods of the mesh would start uncaptured", "error", text)
	} else {
		in.o.Log.Info("the CNI plugin is in place again")
	}
}

// place has program, file and configuration as they are to be, in the order in which one needs the other.
func (in *Installer) place() error {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.removed {
		return nil
	}
	if in.known == nil {
		return errors.New("nothing is known of the mesh yet")
	}
	if now, err := os.ReadFile(in.entry.Enrolled); err != nil || !bytes.Equal(now, in.known) {
		if err := in.writeKnown(in.known); err != nil {
			return err
		}
	}
	if err := in.placeProgram(); err != nil {
		return err
	}
	path, conf, err := in.first()
	if err != nil {
		return err
	}
	out, listed, err := Insert(conf, in.entry)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if !listed && bytes.Equal(out, conf) {
		return nil
	}
	if err := writeConf(path, conf, out, listed); err != nil {
		return err
	}
	in.writes.Add(1)
	in.o.Log.Info("the CNI plugin was put into the node's network configuration", "file", path)
	return nil
}

// Installed reports whether the last look has found or put everything in place.
func (in *Installer) Installed() bool { return in.installed.Load() }

// Stats are the figures so far.
func (in *Installer) Stats() Stats { return Stats{in.writes.Load(), in.failures.Load()} }

// placeProgram copies the program where the plugin is not the same, by size and content.
func (in *Installer) placeProgram() error {
	src, err := os.Open(in.o.Program)
	if err != nil {
		return err
	}
	defer src.Close()
	target := filepath.Join(in.o.BinDir, PluginType)
	if same(src, target) {
		return nil
	}
	if _, err := src.Seek(0, io.SeekStart); err != nil {
		return err
	}
	return replace.Copy(target, 0o755, src)
}

// same reports whether the file at path has the content of src, and can be run.
func same(src *os.File, path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	a, aerr := src.Stat()
	b, berr := f.Stat()
	if aerr != nil || berr != nil || a.Size() != b.Size() || b.Mode().Perm()&0o111 != 0o111 {
		return false
	}
	x, y := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		n, xerr := io.ReadFull(src, x)
		m, yerr := io.ReadFull(f, y)
		if n != m || !bytes.Equal(x[:n], y[:m]) {
			return false
		}
		if xerr != nil || yerr != nil {
			return xerr == yerr // both at the end
		}
	}
}

// configuration reports whether a runtime takes a file of this name for a network configuration.
func configuration(name string) bool {
	return slices.Contains([]string{".conf", ".conflist", ".json"}, filepath.Ext(name))
}

// configurations are the paths of a directory's network configurations, in the order in which runtimes take them.
func configurations(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir) // sorted
	if err != nil {
		return nil, err
	}
	var paths []string
	for _, e := range entries {
		if configuration(e.Name()) && !e.IsDir() {
			paths = append(paths, filepath.Join(dir, e.Name()))
		}
	}
	return paths, nil
}

// first is the network configuration that the runtime takes: the first that is one. CRI-O takes it; containerd takes
// none at all where an earlier file is broken, and then starts no pods either.
func (in *Installer) first() (path string, conf []byte, _ error) {
	paths, err := configurations(in.o.ConfDir)
	if err != nil {
		return "", nil, err
	}
	var broken []error
	for _, p := range paths {
		b, err := readConf(p)
		if err == nil {
			_, _, err = Insert(b, in.entry)
		}
		if err == nil {
			return p, b, nil
		}
		broken = append(broken, fmt.Errorf("%s: %w", p, err))
	}
	if len(broken) > 0 {
		return "", nil, errors.Join(broken...)
	}
	return "", nil, fmt.Errorf("no network configuration in %s: has the cluster's CNI written its own yet?", in.o.ConfDir)
}

func readConf(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, MaxConf+1)) // Insert refuses what is larger
}

// writeConf replaces a configuration that is still old, and keeps its mode. One that has become a list gets a list's
// name, and the former file goes when the new one stands.
func writeConf(path string, old, conf []byte, listed bool) error {
	// Where the name is a link the file behind it is what there is one of.
	target, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	info, err := os.Stat(target)
	if err != nil {
		return err
	}
	if !listed {
		return replace.Swap(target, info.Mode().Perm(), old, conf)
	}
	list := strings.TrimSuffix(path, filepath.Ext(path)) + ".conflist"
	if there, err := readConf(list); err == nil {
		// One that we have made earlier may be replaced: another CNI has written its own anew.
		if l, perr := parse(there); perr != nil || l.kept == len(l.plugins) {
			return fmt.Errorf("%s is no list of plugins, and %s, which it would become, is there already", path, list)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := replace.File(list, info.Mode().Perm(), conf); err != nil {
		return err
	}
	if now, err := readConf(path); err != nil || !bytes.Equal(now, old) {
		return errors.Join(fmt.Errorf("%s: %w", path, replace.ErrChanged), err)
	}
	return os.Remove(path)
}

// Uninstall takes the plugin away again: out of every network configuration, then the program and what was known.
// Nothing is put in place after that. What a single plugin's configuration has become stays a list.
func (in *Installer) Uninstall() error {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.removed = true
	in.installed.Store(false)
	return Uninstall(in.o.ConfDir, in.o.BinDir)
}

// Uninstall takes the plugin away from a node on which no agent runs. Where a file cannot be read or written the
// program stays, since it may be named there, and no pod would start without it.
func Uninstall(confDir, binDir string) error {
	paths, err := configurations(confDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var failed []error
	for _, path := range paths {
		conf, err := readConf(path)
		if err != nil {
			failed = append(failed, err)
			continue
		}
		out, err := Remove(conf)
		if err != nil || bytes.Equal(out, conf) {
			continue // no configuration, or not one of ours
		}
		if err := writeConf(path, conf, out, false); err != nil {
			failed = append(failed, err)
		}
	}
	if len(failed) > 0 {
		return errors.Join(failed...)
	}
	return errors.Join(os.RemoveAll(filepath.Join(confDir, "ztun.d")), remove(filepath.Join(binDir, PluginType)))
}

func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
