package lab

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"testing"
	"text/template"
	"time"
)

// Envoy runs in a namespace of a world.
type Envoy struct {
	*Process
	out syncBuffer
}

// EnvoyTunnel is a line of Envoy's access log, written when a stream has ended. The configuration says, by names in
// lower case, which of these it has.
type EnvoyTunnel struct{ Authority, Peer, Source, Baggage, Forwarded, Traceparent, Flags string }

// EnvoyForTest starts Envoy (its program) with the configuration that a template's file makes of data, and returns when
// ready says so. The log of a test that fails has Envoy's.
func (w *World) EnvoyForTest(t testing.TB, ns *NS, program, file string, data any, ready func() error) *Envoy {
	t.Helper()
	tmpl, err := template.ParseFiles(file)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := tmpl.Execute(&b, data); err != nil {
		t.Fatal(err)
	}
	path := w.Path("envoy.yaml")
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	e := &Envoy{}
	e.Process, err = w.Start(ns, Cmd{Args: []string{program, "-c", path, "--concurrency", "1", "--log-level", "warning",
		"--disable-hot-restart", "--file-flush-interval-msec", "100"}, Stdout: &e.out, Stderr: &e.out})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log("Envoy:\n", e.out.String())
		}
	})
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		select {
		case <-e.Done():
			t.Fatalf("Envoy ended: %v", e.Err())
		default:
		}
		err := ready()
		if err == nil {
			return e
		}
		if time.Now().After(end) {
			t.Fatalf("Envoy is not ready: %v", err)
		}
	}
}

// Tunnels are what its access log has so far.
func (e *Envoy) Tunnels() (all []EnvoyTunnel) {
	for line := range strings.Lines(e.out.String()) {
		var t EnvoyTunnel
		if json.Unmarshal([]byte(line), &t) == nil && t.Authority != "" {
			all = append(all, t)
		}
	}
	return all
}
