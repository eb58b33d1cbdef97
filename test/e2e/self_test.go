package e2e

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"ztun/test/lab"
)

// TestOwnPod: a daemon that is told which pod is its own (POD_NAME, POD_NAMESPACE, SERVICE_ACCOUNT) serves its
// metrics to the mesh, over HBONE at the pod's address and with the pod's identity, to pods of its own node and of
// others; and nothing else of its node.
func TestOwnPod(t *testing.T) {
	m := newMesh(t, meshOptions{noStart: true})
	f := m.DefaultWorld()
	for _, n := range m.Nodes() {
		f.Workloads = append(f.Workloads, lab.Workload{
			UID: "lab//v1/Pod/istio-system/ztunnel-" + n.Name, Name: "ztunnel-" + n.Name, Namespace: "istio-system",
			ServiceAccount: "ztunnel",
			WorkloadIPs:    []string{n.Addr4.String()}, Protocol: "HBONE", Node: n.Name,
			Services: map[string]map[uint16]uint16{},
		})
	}
	must(t, m.WriteWorld(f))
	for _, n := range m.Nodes() {
		m.start(n, map[string]string{"POD_NAME": "ztunnel-" + n.Name, "POD_NAMESPACE": "istio-system",
			"SERVICE_ACCOUNT": "ztunnel", "INSTANCE_IP": n.Addr4.String()})
	}
	for _, p := range m.Pods() {
		must(t, m.Attach(m.ctx, p))
	}
	serveHTTP(m.N2.NS, t, "8099")
	get := func(p *lab.Pod, port string) (int, string, error) {
		c := p.NS.HTTP(5 * time.Second)
		defer c.CloseIdleConnections()
		resp, err := c.Get("http://" + m.N2.Addr4.String() + ":" + port + "/metrics")
		if err != nil {
			return 0, "", err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		return resp.StatusCode, string(b), err
	}
	for _, p := range []*lab.Pod{m.a, m.c} {
		eventually(t, 10*time.Second, func() error {
			status, body, err := get(p, "15020")
			if err == nil && (status != 200 || !strings.Contains(body, "istio_build")) {
				err = fmt.Errorf("%d, %.200s", status, body)
			}
			return err
		})
		for _, port := range []string{"8099", "15000", "15008", "15021"} {
			if status, _, err := get(p, port); err == nil {
				t.Errorf("pod %s reaches port %s of the node through the daemon's own door: %d", p.Name, port, status)
			}
		}
	}
	eventually(t, 5*time.Second, func() error {
		for _, want := range []string{`src.identity="spiffe://cluster.local/ns/default/sa/a"`,
			`dst.identity="spiffe://cluster.local/ns/istio-system/sa/ztunnel"`, `dst.hbone_addr=` + m.N2.Addr4.String() +
				":15020"} {
			if !strings.Contains(m.N2.Daemon.Log(), want) {
				return fmt.Errorf("no access line with %s", want)
			}
		}
		return nil
	})
}

// serveHTTP serves something that is not the daemon's in a namespace.
func serveHTTP(ns *lab.NS, t *testing.T, port string) {
	t.Helper()
	ln, err := ns.Listen("tcp", ":"+port)
	must(t, err)
	s := &http.Server{Handler: http.NotFoundHandler()}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(ln) }()
	t.Cleanup(func() { s.Close(); <-done })
}
