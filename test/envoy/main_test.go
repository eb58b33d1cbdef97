package envoy

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"ztun/admin/ca"
	"ztun/proxy/identity"
	"ztun/test/lab"
)

var bins struct{ ztun, envoy string }

func TestMain(m *testing.M) {
	os.Exit(func() int {
		if err := lab.CanRun(); err != nil {
			if os.Getenv("ZTUN_TEST_NOROOT") == "1" {
				fmt.Fprintln(os.Stderr, "envoy: NOTHING WAS TESTED HERE: ZTUN_TEST_NOROOT=1 and", err)
				return 0
			}
			fmt.Fprintln(os.Stderr, "envoy:", err)
			return 1
		}
		dir, err := os.MkdirTemp("", "ztun-envoy-")
		if err != nil {
			fmt.Fprintln(os.Stderr, "envoy:", err)
			return 1
		}
		defer os.RemoveAll(dir)
		root, err := lab.Root()
		if err == nil {
			bins.envoy = filepath.Join(root, "bin/envoy/bin/envoy")
			if v := os.Getenv("ZTUN_ENVOY"); v != "" {
				bins.envoy = v
			}
			_, err = os.Stat(bins.envoy)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "envoy:", err, "(run test/envoy/get-envoy bin/envoy, or set ZTUN_ENVOY)")
			return 1
		}
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
		defer cancel()
		if bins.ztun, err = lab.Build(ctx, dir, "./cmd/ztun"); err != nil {
			fmt.Fprintln(os.Stderr, "envoy:", err)
			return 1
		}
		return m.Run()
	}())
}

// mesh is pod a on n1, pod c on n2, and a machine on n2 for Envoy.
type mesh struct {
	*lab.World
	t    *testing.T
	ctx  context.Context
	a, c *lab.Pod
	gw   *lab.Host

	envoy *lab.Envoy
}

func newMesh(t *testing.T) *mesh {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	t.Cleanup(cancel)
	m := &mesh{t: t, ctx: ctx, World: lab.ForTest(t, lab.Options{Bin: bins.ztun})}
	var err error
	m.a, err = m.AddPod(m.N1, lab.Pod{Name: "a"})
	must(t, err)
	m.c, err = m.AddPod(m.N2, lab.Pod{Name: "c"})
	must(t, err)
	m.gw, err = m.AddHost(m.N2, "gw")
	must(t, err)
	return m
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// start writes the world and starts both nodes with their pods.
func (m *mesh) start(world string, env map[*lab.Node]map[string]string) {
	m.t.Helper()
	must(m.t, m.WriteWorldBytes([]byte(world)))
	for _, n := range m.Nodes() {
		_, err := m.StartDaemon(m.ctx, n, lab.DaemonOptions{Env: env[n]})
		must(m.t, err)
	}
	for _, p := range m.Pods() {
		must(m.t, m.Attach(m.ctx, p))
	}
}

// pki writes what Envoy presents: a certificate of the world's CA for a service account.
func (m *mesh) pki(account string) (cert, key, root string) {
	m.t.Helper()
	dir, err := m.CADir(m.ctx)
	must(m.t, err)
	signer, err := ca.LoadDir(dir)
	must(m.t, err)
	id := identity.ID{TrustDomain: "cluster.local", Namespace: "default", ServiceAccount: account}
	k, csr, err := ca.NewRequest(id)
	must(m.t, err)
	chain, _, err := signer.Sign(m.ctx, id, csr, time.Hour)
	must(m.t, err)
	der, err := x509.MarshalPKCS8PrivateKey(k)
	must(m.t, err)
	var b bytes.Buffer
	for _, c := range chain {
		pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	}
	cert, key = m.Path("envoy-cert.pem"), m.Path("envoy-key.pem")
	must(m.t, os.WriteFile(cert, b.Bytes(), 0o644))
	must(m.t, os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600))
	return cert, key, filepath.Join(dir, "root-cert.pem")
}

// envoyConfig is what the template is filled with.
type envoyConfig struct {
	Gateway               bool   // pass the tunnel's bytes on, instead of making a tunnel of its own
	Listen, Target, Peer  string // own address; CONNECT target; the workload's HBONE address
	Client, Server        string // who may call, and who must answer, as URIs
	Cert, Key, Root, acnt string
}

func (m *mesh) startEnvoy(c envoyConfig) {
	m.t.Helper()
	c.Cert, c.Key, c.Root = m.pki(c.acnt)
	m.envoy = m.EnvoyForTest(m.t, m.gw.NS, bins.envoy, "testdata/waypoint.yaml.tmpl", c, func() error {
		conn, err := m.gw.NS.Dial(m.ctx, "tcp", net.JoinHostPort(c.Listen, "15008"))
		if err == nil {
			conn.Close()
		}
		return err
	})
}

func eventually(t testing.TB, limit time.Duration, f func() error) {
	t.Helper()
	for end := time.Now().Add(limit); ; time.Sleep(100 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("after %v: %v", limit, err)
		}
	}
}

// echo serves every connection with its own bytes, and tells where each came from.
func (m *mesh) echo(ns *lab.NS, address string) <-chan netip.AddrPort {
	m.t.Helper()
	l, err := ns.Listen("tcp", address)
	must(m.t, err)
	from := make(chan netip.AddrPort, 100)
	var work sync.WaitGroup
	work.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			from <- c.RemoteAddr().(*net.TCPAddr).AddrPort()
			work.Go(func() {
				defer c.Close()
				io.Copy(c, c)
				c.(*net.TCPConn).CloseWrite()
			})
		}
	})
	m.t.Cleanup(func() { l.Close(); work.Wait() })
	return from
}

// exchange sends n random bytes through a connection and wants them back, then the end.
func (m *mesh) exchange(ns *lab.NS, target string, n int) error {
	ctx, cancel := context.WithTimeout(m.ctx, 20*time.Second)
	defer cancel()
	c, err := ns.Dial(ctx, "tcp", target)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	want := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	r.Read(want)
	wrote := make(chan error, 1)
	go func() {
		_, err := c.Write(want)
		wrote <- errors.Join(err, c.(*net.TCPConn).CloseWrite())
	}()
	got, err := io.ReadAll(c)
	if err := errors.Join(err, <-wrote); err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("sent %d bytes, got %d back, not the same", n, len(got))
	}
	return nil
}
