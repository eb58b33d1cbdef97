package proxy

import (
	"bytes"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"ztun/proxy/state"
)

// listing makes b list the policy default/late; with is its text, "" while it is not loaded.
func listing(with string) func(string) string {
	return func(s string) string {
		s = strings.Replace(s, "  workloadIps: [\"10.91.2.2\"]\n",
			"  workloadIps: [\"10.91.2.2\"]\n  authorizationPolicies: [default/late]\n", 1)
		return s + with
	}
}

const (
	lateDeny = "- {name: late, namespace: default, scope: WorkloadSelector, action: Deny, dryRun: false, rules: " +
		"[[[{destinationPorts: [9000]}]]]}\n"
	lateAllow = "- {name: late, namespace: default, scope: WorkloadSelector, action: Allow, dryRun: false, rules: " +
		"[[[{destinationPorts: [9000, 9001]}]]]}\n"
)

var infoB = []state.WorkloadInfo{{Name: "b", Namespace: "default", ServiceAccount: "b"}}

// unknownWorld is a world in which b lists default/late, which is not loaded, with a memory that waits for wait.
func unknownWorld(t *testing.T, deny bool, wait time.Duration) (*world, *UnknownPolicies, *bytes.Buffer) {
	t.Helper()
	var log bytes.Buffer // written to with the memory's lock held
	u := NewUnknownPolicies(deny, slog.New(slog.NewTextHandler(&log, nil)))
	u.wait = wait
	w := newWorldWith(t, func(w *world, i int, o *Options) {
		if i == 1 {
			o.Policies = u
		}
	})
	w.know.publish(loadView(t, listing("")))
	w.listen(appB, echo)
	return w, u, &log
}

// attempt connects to b's application in plaintext and tells how long the verdict took.
func (w *world) attempt() (ok bool, took time.Duration) {
	w.t.Helper()
	began := time.Now()
	app, _, done, err := w.connect(w.proxies[1].ServePassthrough, "192.0.2.9:4000", "10.91.2.2:9000")
	took = time.Since(began)
	if err == nil {
		roundTrip(w.t, app)
		app.Close()
		<-done
	}
	return err == nil, took
}

// TestPolicyUnderWay: a workload arrives before the policy that it lists; a connection in between is decided by the
// policy.
func TestPolicyUnderWay(t *testing.T) {
	for _, tt := range []struct {
		name, policy string
		want         bool
	}{{"denies", lateDeny, false}, {"allows", lateAllow, true}} {
		t.Run(tt.name, func(t *testing.T) {
			w, u, _ := unknownWorld(t, false, 20*time.Second)
			go func() {
				for u.Stats().Held == 0 { // ends when the connection below waits, or the test does
					time.Sleep(time.Millisecond)
				}
				w.know.publish(loadView(w.t, listing(tt.policy)))
			}()
			if ok, took := w.attempt(); ok != tt.want || took > 10*time.Second {
				t.Errorf("connected: %v, after %v", ok, took)
			}
			if ok, _ := w.attempt(); ok != tt.want || u.Stats().Held != 1 {
				t.Errorf("once the policy is there: connected %v, %+v", ok, u.Stats())
			}
		})
	}
}

// TestPolicyNeverComes: a policy that does not come holds connections up for a while, once, and is then left out as
// in ztunnel, or refuses if so configured.
func TestPolicyNeverComes(t *testing.T) {
	const wait = 300 * time.Millisecond
	for _, deny := range []bool{false, true} {
		w, u, log := unknownWorld(t, deny, wait)
		if ok, took := w.attempt(); ok == deny || took < wait/2 {
			t.Errorf("deny %v: connected %v after %v", deny, ok, took)
		}
		for range 5 { // none of them waits in vain again: Held below
			if ok, _ := w.attempt(); ok == deny {
				t.Errorf("deny %v: connected %v", deny, ok)
			}
		}
		u.Follow(w.know.View(), infoB)
		d := u.Dump()
		if want := map[bool]string{false: "skip", true: "deny"}[deny]; len(d) != 1 || d[0].Policy != "default/late" ||
			d[0].Decision != want || d[0].Workload == "" {
			t.Errorf("dump: %+v", d)
		}
		if s := u.Stats(); s.Unknown != 1 || s.Held != 1 || s.Without != 6 {
			t.Errorf("stats: %+v", s)
		}
		if n := strings.Count(log.String(), "level=WARN"); n != 1 || !strings.Contains(log.String(), "policy=default/late") {
			t.Errorf("%d warnings:\n%s", n, log)
		}
		// It comes and is made anew later: that one is waited for again.
		w.know.publish(loadView(t, listing(lateAllow)))
		u.Follow(w.know.View(), infoB)
		if n := len(u.Dump()); n != 0 {
			t.Errorf("%d policies are remembered as missing though all are loaded", n)
		}
		w.know.publish(loadView(t, listing("")))
		if ok, took := w.attempt(); ok == deny || took < wait/2 {
			t.Errorf("deny %v: after it was made anew: connected %v after %v", deny, ok, took)
		}
		if deny && !strings.Contains(strings.Join(w.lines(1), "\n"),
			"explicitly denied by: default/late (policy not loaded)") {
			t.Errorf("refused for another reason:\n%s", strings.Join(w.lines(1), "\n"))
		}
		w.stop()
	}
}

// TestRecheckWaits: a live connection that only a policy which is still missing may allow is cut when nobody waits
// for that any longer, and not before; and a missing policy cuts nobody whom the others allow.
func TestRecheckWaits(t *testing.T) {
	const wait = 500 * time.Millisecond
	w, u, _ := unknownWorld(t, false, wait)
	w.know.publish(loadView(t, nil))
	app, _, done, err := w.connect(w.proxies[1].ServePassthrough, "192.0.2.9:4000", "10.91.2.2:9000")
	if err != nil {
		t.Fatal(err)
	}
	w.know.publish(loadView(t, listing("")))
	w.proxies[1].Recheck()
	roundTrip(t, app)

	w.know.publish(loadView(t, func(s string) string { // allow-all allows something else now
		return listing("")(strings.Replace(s, "notDestinationPorts: [1]", "destinationPorts: [1]", 1))
	}))
	u.since = map[string]*unknownPolicy{}
	began := time.Now()
	w.proxies[1].Recheck()
	app.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := app.Read(make([]byte, 1)); err == nil || isDeadline(err) {
		t.Errorf("the connection was not cut: %v", err)
	} else if d := time.Since(began); d < wait/2 {
		t.Errorf("cut after %v: the policy that may allow it was still to come", d)
	}
	app.Close()
	<-done
}

func isDeadline(err error) bool {
	ne, ok := err.(net.Error)
	return ok && ne.Timeout()
}

// TestHeldConnectionEnds: one that waits for a policy goes with the proxy, at once.
func TestHeldConnectionEnds(t *testing.T) {
	w, u, _ := unknownWorld(t, false, time.Minute)
	over := make(chan bool)
	go func() {
		_, _, _, err := w.connect(w.proxies[1].ServePassthrough, "192.0.2.9:4000", "10.91.2.2:9000")
		over <- err == nil
	}()
	eventually(t, "the connection waits", func() bool { return u.Stats().Held == 1 })
	w.proxies[1].Close()
	select {
	case ok := <-over:
		if ok {
			t.Error("connected by a proxy that is closed")
		}
	case <-time.After(20 * time.Second):
		t.Error("the connection outlives its proxy")
	}
}
