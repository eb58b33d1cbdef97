package e2e

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"ztun/test/lab"
)

// TestRunJoins: what `ztun control join --workload` has written is all that an ordinary user's `ztun run` takes to be
// that workload, as a directory and as one file; another workload it cannot be; and `control leave` ends it.
func TestRunJoins(t *testing.T) {
	c := newControlled(t, false, nil)
	record := func(name, address string) lab.Workload {
		return lab.Workload{UID: "lab//v1/Pod/default/" + name, Name: name, Namespace: "default", ServiceAccount: name,
			TrustDomain: "cluster.local", WorkloadIPs: []string{address}, Protocol: "TCP",
			Services: map[string]map[uint16]uint16{}, MeshAddresses: []string{lab.HostPort(c.h1.IPs[0], 15018)}}
	}
	c.write("users.yaml", lab.WorldFile{Workloads: []lab.Workload{record("user", "10.91.66.4"), record("guest", "10.91.66.5")}})
	c.write("policy.yaml", policy("users-alone", "Allow", "cluster.local/ns/default/sa/user"))
	c.visible(c.N2, "users-alone", true)
	c.visible(c.N2, "lab//v1/Pod/default/user", true)
	r := newRootless(t, c.mesh)
	bundle := func(name, out string) string {
		out = filepath.Join(r.dir, out)
		_, err := c.Ztun(c.ctx, nil, "control", "join", "--dir", c.dir, "--workload", "default/"+name, "--out", out, "--host",
			c.N1.Addr4.String(), "--renew")
		must(t, err)
		must(t, filepath.WalkDir(out, func(path string, _ os.DirEntry, err error) error {
			if err != nil {
				return err
			}
			return os.Chown(path, 65534, 65534)
		}))
		return out
	}
	question := fmt.Sprintf("exec 3<>/dev/tcp/%s/9000 && echo whoami >&3 && head -n 1 <&3", c.c.IPs[0])
	ask := func(bundle string) (string, error) {
		return r.runWith(c.h1.NS, nil, "", "--join", bundle, "--", "bash", "-c", question)
	}
	var user string
	for _, out := range []string{"user", "user.json"} {
		user = bundle("user", out)
		if got, err := ask(user); err != nil || !strings.Contains(got, c.h1.IPs[0].String()) {
			t.Fatalf("with %s: %q, %v", out, got, err)
		}
	}
	// It only calls, and its record says from where.
	eventually(t, 20*time.Second, func() error {
		if log := c.N2.Daemon.Log(); !strings.Contains(log, `src.workload="user"`) {
			return fmt.Errorf("the peer's log: %s", log)
		}
		return nil
	})
	if log := c.N2.Daemon.Log(); strings.Contains(log, "source address of a mesh connection") {
		t.Errorf("the peer's log: %s", log)
	}
	controlAway(t, c, r, user)
	// Another workload's credentials give another identity, also where the environment claims this one.
	guest := bundle("guest", "guest")
	if got, err := ask(guest); err == nil || !strings.Contains(err.Error(), "Connection refused") {
		t.Errorf("as guest: %q, %v", got, err)
	}
	claim := []string{fmt.Sprintf("XDS_ADDRESS=https://%s:%d", c.N1.Addr4, controlPort), "ZTUN_CONTROL_CREDENTIALS=" + guest,
		fmt.Sprintf("CA_ADDRESS=https://%s:%d", c.N1.Addr4, controlPort)}
	got, err := r.runWith(c.h1.NS, claim, "", "--name", "user", "--service-account", "user", "--ip", "10.91.66.4",
		"--wait", "1s", "--", "bash", "-c", question)
	if err == nil || !strings.Contains(err.Error(), "workload default/guest is spiffe://cluster.local/ns/default/sa/guest") {
		t.Errorf("as guest that claims to be user: %q, %v", got, err)
	}
	out, err := c.Ztun(c.ctx, nil, "control", "leave", "--dir", c.dir, "--workload", "user")
	must(t, err)
	if !strings.Contains(out, "workload default/user has left") {
		t.Error(out)
	}
	eventually(t, 30*time.Second, func() error {
		got, err := r.runWith(c.h1.NS, nil, "", "--join", user, "--wait", "1s", "--", "bash", "-c", "echo it begins; "+question)
		if err == nil || got != "" {
			return fmt.Errorf("who has left still gets %q, %v", got, err)
		}
		return nil
	})
	r.clean()
}

// controlAway: a run that begins while its control plane is away says so once, with the address, and again when it is
// reached; the command begins then, and its first connection stands.
func controlAway(t *testing.T, c *controlled, r *rootless, bundle string) {
	const at = "127.0.0.1:15999"
	log := waitFor("it works")
	cmd := r.cmd([]string{"XDS_ADDRESS=https://" + at, "ALT_XDS_HOSTNAME=" + c.N1.Addr4.String()}, "", "--join", bundle, "--",
		"bash", "-c", fmt.Sprintf("echo it begins; exec 3<>/dev/tcp/%s/9000 && echo it works; sleep 600", c.c.IPs[0]))
	cmd.Stdout, cmd.Stderr = log, log
	p, err := c.Start(c.h1.NS, cmd)
	must(t, err)
	defer p.Kill()
	const away, back = "the control plane is not reached", "the control plane is reached"
	eventually(t, 30*time.Second, func() error {
		if s := log.String(); !strings.Contains(s, away) || !strings.Contains(s, at) ||
			!strings.Contains(s, "nothing listens") || !strings.Contains(s, "waiting for the first state") {
			return fmt.Errorf("it is not said: %s", s)
		}
		return nil
	})
	if strings.Contains(log.String(), "it begins") {
		t.Errorf("the command has not waited: %s", log)
	}
	ln, err := c.h1.NS.Listen("tcp", at)
	must(t, err)
	var work sync.WaitGroup
	defer work.Wait()
	defer p.Kill()
	defer ln.Close()
	work.Go(func() {
		for {
			in, err := ln.Accept()
			if err != nil {
				return
			}
			out, err := c.h1.NS.Dial(c.ctx, "tcp", fmt.Sprintf("%s:%d", c.N1.Addr4, controlPort))
			if err != nil {
				in.Close()
				continue
			}
			for _, way := range [][2]net.Conn{{in, out}, {out, in}} {
				work.Go(func() { io.Copy(way[0], way[1]); way[0].Close(); way[1].Close() })
			}
		}
	})
	select {
	case <-log.seen:
	case <-time.After(60 * time.Second):
		t.Errorf("the command does not work: %s", log)
	}
	if s := log.String(); strings.Count(s, away) != 1 || strings.Count(s, back) != 1 {
		t.Errorf("not one line each: %s", s)
	}
}
