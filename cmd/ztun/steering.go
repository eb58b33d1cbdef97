package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// steering is how pods are captured where there is more than one way: in shared mode (ZTUN_STEERING).
type steering uint8

const (
	isolatedPods steering = iota
	steeredPods
	rulesPods
	redirectedPods
)

var steerings = [...]string{isolatedPods: "isolated", steeredPods: "steered", rulesPods: "rules",
	redirectedPods: "redirected"}

func (s steering) String() string { return steerings[s] }

func (l *loader) setSteering(v string) error {
	for i, name := range steerings {
		if v == name || v == "sandwich" && steering(i) == steeredPods {
			s := steering(i)
			l.steering = &s
			return nil
		}
	}
	return errors.New("must be isolated, steered (or sandwich, as it is called, too), rules or redirected")
}

// isolates says that pods that have no device can be attached, so that the node has what these need: a TUN, rules and
// port 15008. A node agent's pods have their CNI's eth0.
func (c *Config) isolates() bool {
	return c.Attach.Steering == isolatedPods || c.Attach.Steering != redirectedPods && !c.Attach.NodeAgent
}

func (l *loader) setMark(v string) error {
	l.mark = new(uint32)
	return uint32v(l.mark, 0, 1<<32-1)(v)
}

// markOfRules is the mark by which istio-cni's rules in a pod know the proxy's own connections, PACKET_MARK's default
// in ztunnel.
const markOfRules = 1337

// chooseSteering decides who says which pods there are and how they are captured. ztunnel's DaemonSet, in which nothing
// but the image is ours, says INPOD_ENABLED=true and nothing of INPOD_UDS or of a mode: it runs under an istio-cni that
// has put its rules into the pods already.
func (c *Config) chooseSteering(l *loader) error {
	wants := l.steering != nil && *l.steering == redirectedPods
	switch {
	case c.Mode.Dedicated: // as in ztunnel: there is one workload, and nobody to ask
	case l.inpod != nil:
		c.Attach.NodeAgent = *l.inpod
	default:
		c.Attach.NodeAgent = wants || l.given("INPOD_UDS") && c.Attach.InpodUDS != ""
	}
	switch {
	case c.Mode.Dedicated:
	case l.steering != nil:
		c.Attach.Steering = *l.steering
	case c.Attach.NodeAgent:
		c.Attach.Steering = redirectedPods
	}
	if c.Attach.NodeAgent && c.Attach.InpodUDS == "" {
		return &configError{"INPOD_UDS", "", errors.New("INPOD_ENABLED=true wants the path of the node agent's socket here")}
	}
	redirected := c.Attach.Steering == redirectedPods
	if redirected {
		c.Net.PacketMark = markOfRules
	}
	if l.mark != nil {
		c.Net.PacketMark = *l.mark
	}
	// What a CNI's NetworkPolicy says of port 15008 between two pods of a node is heard on the wire alone, and a drop-in
	// for ztunnel must not undo it unasked. Pods that are all ours have no CNI.
	c.Proxy.LocalRelay = c.Attach.Steering == isolatedPods
	if l.localRelay != nil {
		c.Proxy.LocalRelay = *l.localRelay
	}
	switch {
	case redirected && c.Net.PacketMark == 0:
		return &configError{"PACKET_MARK", "0", errors.New("the rules in the pods know our own connections by a mark " +
			"(istio-cni's: 1337): without one they would come back to us without end")}
	case !redirected && c.Proxy.OriginalSource != nil && !*c.Proxy.OriginalSource:
		return &configError{"ENABLE_ORIG_SRC", "false", errors.New("here applications always see the client's own address: " +
			"it takes no privilege that could be missing, and there is nothing to switch off")}
	case !redirected && !c.Attach.PortReuse:
		return &configError{"INPOD_PORT_REUSE", "false", errors.New("no port of the pods is bound: they are served by a " +
			"userspace stack behind the TUN, and there is nothing to keep others from")}
	}
	return nil
}

// The directories of ZTUN_STATE_DIR where nobody names one.
const (
	usualStateDir    = "/var/run/ztun"
	readOnlyStateDir = "/tmp/ztun"
)

// defaultStateDir is usualStateDir, or, where nothing can be written there because the file system is read-only, as in
// ztunnel's DaemonSet, a directory in /tmp, which is a volume of the pod's own there. The daemon and the commands that
// talk to it find the same.
func defaultStateDir() string { return stateDirIn(usualStateDir, readOnlyStateDir) }

func stateDirIn(usual, otherwise string) string {
	p := usual
	for errors.Is(unix.Faccessat(unix.AT_FDCWD, p, unix.F_OK, 0), unix.ENOENT) && filepath.Dir(p) != p {
		p = filepath.Dir(p) // it may have to be made first
	}
	if errors.Is(unix.Faccessat(unix.AT_FDCWD, p, unix.W_OK, 0), unix.EROFS) {
		return otherwise
	}
	return usual
}

// makeStateDir makes the directory. In /tmp anybody may have made one of its name: it has to be ours alone, no link,
// and closed to others.
func makeStateDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil || dir != readOnlyStateDir {
		return err
	}
	return ours(dir)
}

func ours(dir string) error {
	st, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); !st.IsDir() || !ok || int(sys.Uid) != os.Geteuid() ||
		st.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%w: somebody else has made it; name another directory", fs.ErrPermission)
	}
	return nil
}
