package main

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// What a configuration needs, and no more.
func TestNeeds(t *testing.T) {
	base := capsOf(unix.CAP_NET_ADMIN, unix.CAP_SYS_ADMIN, unix.CAP_SYS_PTRACE)
	for _, c := range []struct {
		env  []string
		want capSet
	}{
		{nil, base},
		{[]string{"ISTIO_META_DNS_PROXY_ADDR", "127.0.0.1:53"}, base | capsOf(unix.CAP_NET_BIND_SERVICE)},
		{[]string{"ISTIO_META_DNS_PROXY_ADDR", "127.0.0.1:53", "ISTIO_META_DNS_CAPTURE", "false"}, base},
		{[]string{"ZTUN_READINESS_PORT", "81"}, base | capsOf(unix.CAP_NET_BIND_SERVICE)},
	} {
		var got capSet
		for _, n := range needs(load(t, c.env...)) {
			got |= capsOf(n.cap)
		}
		if got != c.want {
			t.Errorf("%v: %s, want %s", c.env, got, c.want)
		}
	}
	if s := (base | capsOf(unix.CAP_CHOWN)).String(); s != "0 CAP_NET_ADMIN CAP_SYS_PTRACE CAP_SYS_ADMIN" {
		t.Errorf("printed: %q", s)
	}
}

// A path of the configuration that only CAP_DAC_OVERRIDE opens is found, whether it is read, written, within a
// directory, or still to be made.
func TestShutOut(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test gives files to another user and needs root")
	}
	mine, others := t.TempDir(), filepath.Join(t.TempDir(), "others")
	file := func(dir, name string, mode os.FileMode, uid int) string {
		t.Helper()
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, nil, mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(path, uid, uid); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good, bad := file(mine, "good.pem", 0o600, 0), file(mine, "bad.yaml", 0o600, 65534)
	ca := filepath.Join(mine, "ca")
	key := file(ca, "ca-key.pem", 0o600, 65534)
	hidden := file(others, "world.yaml", 0o644, 65534)
	if err := os.Chmod(others, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(others, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	ok := Config{State: stateConfig{Dir: filepath.Join(mine, "a/b"), Socket: filepath.Join(mine, "a/b/s")},
		XDS: xdsConfig{LocalPath: good}, CA: caConfig{CRLPath: filepath.Join(mine, "none")}}
	for name, c := range map[string]struct {
		change func(c *Config)
		want   string
	}{
		"all is ours":               {func(*Config) {}, ""},
		"another's file":            {func(c *Config) { c.Control.Token.File = bad }, bad},
		"a file behind a directory": {func(c *Config) { c.XDS.LocalPath = hidden }, hidden},
		"a key in a directory":      {func(c *Config) { c.CA.LocalDir = ca }, key},
		"a state directory to be": {func(c *Config) {
			c.State.Dir = filepath.Join(others, "x/y")
		}, filepath.Join(others, "x/y")},
		"a socket in another's place": {func(c *Config) { c.State.Socket = filepath.Join(others, "sock") }, others},
	} {
		conf := ok
		c.change(&conf)
		got := make(chan string)
		go func() {
			runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
			have, err := permitted()
			if err == nil {
				err = setCaps(have&^capsOf(unix.CAP_DAC_OVERRIDE, unix.CAP_DAC_READ_SEARCH), have, 0)
			}
			if err != nil {
				t.Error(err)
			}
			got <- conf.shutOut()
		}()
		if g := <-got; g != c.want {
			t.Errorf("%s: %q, want %q", name, g, c.want)
		}
	}
}
