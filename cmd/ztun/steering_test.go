package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What ztunnel's DaemonSet says (its chart, with nothing but the image changed) chooses ztunnel's way; whoever names
// pods by hand has ours; and what is said counts.
func TestSteering(t *testing.T) {
	type want struct {
		steering steering
		agent    bool
		mark     uint32
	}
	chart := []string{"INPOD_ENABLED", "true", "POD_NAME", "ztunnel-x", "NODE_NAME", "n1", "RUST_LOG", "info",
		"TERMINATION_GRACE_PERIOD_SECONDS", "30", "KUBERNETES_SERVICE_HOST", "10.96.0.1"}
	for _, c := range []struct {
		env  []string
		want want
	}{
		{nil, want{isolatedPods, false, 0}},
		{chart, want{redirectedPods, true, 1337}},
		{[]string{"INPOD_UDS", "/x.sock"}, want{redirectedPods, true, 1337}},
		{[]string{"INPOD_UDS", ""}, want{isolatedPods, false, 0}},
		{[]string{"INPOD_ENABLED", "false", "INPOD_UDS", "/x.sock"}, want{isolatedPods, false, 0}},
		{[]string{"ZTUN_STEERING", "redirected"}, want{redirectedPods, true, 1337}},
		{[]string{"ZTUN_STEERING", "redirected", "INPOD_ENABLED", "false"}, want{redirectedPods, false, 1337}},
		{[]string{"ZTUN_STEERING", "steered"}, want{steeredPods, false, 0}},
		{append([]string{"ZTUN_STEERING", "steered"}, chart...), want{steeredPods, true, 0}},
		{[]string{"ZTUN_STEERING", "sandwich"}, want{steeredPods, false, 0}},
		{append([]string{"ZTUN_STEERING", "rules"}, chart...), want{rulesPods, true, 0}},
		{append([]string{"ZTUN_STEERING", "isolated"}, chart...), want{isolatedPods, true, 0}},
		{append([]string{"PACKET_MARK", "7"}, chart...), want{redirectedPods, true, 7}},
		{append([]string{"PROXY_MODE", "dedicated", "PROXY_WORKLOAD_INFO", "a/b/c"}, chart...), want{isolatedPods, false, 0}},
	} {
		l := load(t, c.env...)
		if got := (want{l.Attach.Steering, l.Attach.NodeAgent, l.Net.PacketMark}); got != c.want {
			t.Errorf("%q: %v, want %v", c.env, got, c.want)
		}
	}
	// What pods without a device need of the node is there where such pods may come.
	for _, c := range []struct {
		env  []string
		want bool
	}{
		{nil, true},
		{chart, false},
		{[]string{"ZTUN_STEERING", "steered"}, true},
		{[]string{"ZTUN_STEERING", "rules"}, true},
		{append([]string{"ZTUN_STEERING", "steered"}, chart...), false},
		{append([]string{"ZTUN_STEERING", "rules"}, chart...), false},
		{append([]string{"ZTUN_STEERING", "isolated"}, chart...), true},
	} {
		if l := load(t, c.env...); l.isolates() != c.want {
			t.Errorf("%q: isolated pods may be attached: %v", c.env, l.isolates())
		}
	}
	for _, v := range []string{"rule", "iptables"} {
		if _, err := loadConfig(env("ZTUN_STEERING", v)); err == nil || !strings.Contains(err.Error(), "steered") {
			t.Errorf("ZTUN_STEERING=%s: %v", v, err)
		}
	}
	// With sockets in the pods ztunnel's two other switches mean something.
	l := load(t, append([]string{"ENABLE_ORIG_SRC", "false", "INPOD_PORT_REUSE", "false"}, chart...)...)
	if l.Proxy.OriginalSource == nil || *l.Proxy.OriginalSource || l.Attach.PortReuse || l.meshSocket().ReusePort {
		t.Errorf("%+v", l)
	}
	if l := load(t, chart...); !l.meshSocket().ReusePort || l.meshSocket().Mark != 1337 {
		t.Errorf("%+v", l.meshSocket())
	}
	// Beside a CNI, whose NetworkPolicies are heard on the wire alone, the relay in memory has to be asked for.
	for _, c := range []struct {
		env  []string
		want bool
	}{
		{nil, true},
		{[]string{"ZTUN_LOCAL_RELAY", "false"}, false},
		{[]string{"ZTUN_STEERING", "steered"}, false},
		{[]string{"ZTUN_STEERING", "rules"}, false},
		{chart, false},
		{append([]string{"ZTUN_LOCAL_RELAY", "true"}, chart...), true},
	} {
		if l := load(t, c.env...); l.Proxy.LocalRelay != c.want {
			t.Errorf("%q: the relay in memory is %v", c.env, l.Proxy.LocalRelay)
		}
	}
	for _, bad := range [][]string{
		append([]string{"PACKET_MARK", "0"}, chart...), append([]string{"INPOD_UDS", ""}, chart...),
	} {
		var err *configError
		if _, e := loadConfig(env(bad...)); !errors.As(e, &err) || err.name != bad[0] {
			t.Errorf("%q: %v", bad, e)
		}
	}
}

// A directory in /tmp that another user has made, or can look into, is not taken.
func TestStateDirIsOurs(t *testing.T) {
	dir := t.TempDir()
	mine := filepath.Join(dir, "mine")
	if err := os.Mkdir(mine, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := ours(mine); err != nil {
		t.Error(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(mine, link); err != nil {
		t.Fatal(err)
	}
	open := filepath.Join(dir, "open")
	if err := errors.Join(os.Mkdir(open, 0o700), os.Chmod(open, 0o755)); err != nil {
		t.Fatal(err)
	}
	bad := []string{link, open}
	if os.Geteuid() == 0 {
		theirs := filepath.Join(dir, "theirs")
		if err := errors.Join(os.Mkdir(theirs, 0o700), os.Chown(theirs, 12345, 0)); err != nil {
			t.Fatal(err)
		}
		bad = append(bad, theirs)
	}
	for _, d := range bad {
		if err := ours(d); !errors.Is(err, os.ErrPermission) {
			t.Errorf("%s: %v", d, err)
		}
	}
	// Where it can be written, or the reason is another, the usual one is it: the error is told then.
	for _, usual := range []string{filepath.Join(mine, "a/b"), "/dev/null/x"} {
		if got := stateDirIn(usual, "other"); got != usual {
			t.Errorf("%s: %s", usual, got)
		}
	}
}
