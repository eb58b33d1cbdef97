package e2e

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"ztun/test/lab"
)

// ownCertificate is the serial number of the certificate of a run that has its page at a port, and when it ends; "": it
// has none.
func (r *rootless) ownCertificate(ns *lab.NS, port string) (serial string, ends time.Time) {
	r.t.Helper()
	out, err := r.Run(r.ctx, ns, "curl", "-sS", "-m", "20", "http://localhost:"+port+"/config_dump")
	must(r.t, err)
	var dump struct {
		Certificates []struct {
			CertChain []struct {
				ExpirationTime time.Time `json:"expirationTime"`
				SerialNumber   string    `json:"serialNumber"`
			} `json:"certChain"`
		} `json:"certificates"`
	}
	must(r.t, json.Unmarshal([]byte(out), &dump))
	for _, c := range dump.Certificates {
		if len(c.CertChain) > 0 {
			return c.CertChain[0].SerialNumber, c.CertChain[0].ExpirationTime
		}
	}
	return "", time.Time{}
}

// TestRunRenews: a run renews its certificate, from a control plane that has been restarted too; while there is none it
// serves with the one at hand past half of its life; it says when that has ended, and its calls are refused then; and
// all is well, with the same command, when the control plane is back.
func TestRunRenews(t *testing.T) {
	c := newControlled(t, false, nil)
	r := newRootless(t, c.mesh)
	w := user()
	w.Protocol, w.MeshAddresses = "TCP", []string{lab.HostPort(c.h1.V4(), 15018)}
	c.write("user.yaml", lab.WorldFile{Workloads: []lab.Workload{w}})
	c.write("policy.yaml", policy("users-alone", "Allow", "cluster.local/ns/default/sa/user"))
	c.visible(c.N2, "lab//v1/Pod/default/user", true)
	c.visible(c.N2, "users-alone", true)
	const port, life = "15900", 40 * time.Second
	s := r.shell(c.h1.NS, []string{"SECRET_TTL=" + life.String()}, "--join", c.bundle(r, "user"), "--admin", port)
	first, ends := r.ownCertificate(c.h1.NS, port)
	if left := time.Until(ends); first == "" || left > life {
		t.Fatalf("certificate %q, which ends in %v", first, left)
	}
	renewed := func(old string) (serial string) {
		t.Helper()
		eventually(t, 2*life, func() error {
			if serial, ends = r.ownCertificate(c.h1.NS, port); serial == old || serial == "" {
				return fmt.Errorf("the certificate is %q, which ends at %v: %s", serial, ends, s.out)
			}
			return nil
		})
		return serial
	}
	// called is a call to a peer that has no tunnel of ours yet, so that it is the certificate that counts.
	called := func(when string, to netip.Addr) {
		t.Helper()
		if got, err := s.whoami(to, 9000); err != nil || !strings.Contains(got, c.h1.V4().String()) {
			t.Errorf("%s: %q, %v", when, got, err)
		}
	}
	says := func(text string) {
		t.Helper()
		eventually(t, 2*life, func() error {
			if out := s.out.String(); !strings.Contains(out, text) {
				return fmt.Errorf("%q is not said: %s", text, out)
			}
			return nil
		})
	}
	const lost, ended = "the one at hand serves until it ends", "this workload's certificate has ended"

	c.process.Kill()
	c.startControl()
	second := renewed(first)

	c.process.Kill()
	says(lost) // it has been asked for another, at half of the life of the one at hand
	called("past half of the certificate's life, without a control plane", c.a.V4())
	if serial, _ := r.ownCertificate(c.h1.NS, port); serial != second && serial != "" || time.Now().After(ends) {
		t.Fatalf("certificate %q, which was to end at %v: this test was held up", serial, ends)
	}
	if out := s.out.String(); strings.Contains(out, ended) {
		t.Errorf("it is said to have ended: %s", out)
	}
	says(ended)
	if serial, _ := r.ownCertificate(c.h1.NS, port); serial != "" || time.Now().Before(ends) {
		t.Errorf("it has certificate %q, which ends at %v", serial, ends)
	}
	if got, err := s.whoami(c.c.V4(), 9000); err == nil || !strings.Contains(got, "Connection refused") {
		t.Errorf("with a certificate that has ended: %q, %v", got, err)
	}
	if got, err := s.whoami(c.h2.V4(), 9000); err != nil {
		t.Errorf("in plaintext, for which there is no need of one: %q, %v", got, err)
	}

	c.startControl()
	says("a certificate has come from the CA")
	renewed("")
	called("with a new certificate", c.c.V4())
	if n := strings.Count(s.out.String(), ended); n != 1 {
		t.Errorf("said %d times: %s", n, s.out)
	}
	if out := s.out.String(); strings.Contains(out, "revocation list") {
		t.Errorf("a control plane that is away is said once, and not once more for its revocation list: %s", out)
	}
}
