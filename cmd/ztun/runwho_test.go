package main

import (
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"ztun/admin/ca"
	"ztun/admin/control"
	"ztun/proxy/identity"
	"ztun/proxy/state"
)

func bundle() *control.Bundle {
	return &control.Bundle{
		Address: "https://control:15012", UID: "u", Namespace: "shop", Name: "till", ServiceAccount: "tills",
		TrustDomain: "td", IPs: []netip.Addr{netip.MustParseAddr("10.0.0.7")},
		Files: control.Files{Root: []byte("r"), Cert: []byte("c"), Key: []byte("k"), Token: []byte("t")},
	}
}

// A bundle, as a directory and as one file, says all: who the command is, and how the control plane knows it. The
// environment may say where that is, and no flag who else the command is.
func TestRunJoins(t *testing.T) {
	for _, path := range []string{"bundle", "bundle.json"} {
		path = filepath.Join(t.TempDir(), path)
		if err := bundle().Write(path); err != nil {
			t.Fatal(err)
		}
		who, dir := &runWho{join: path}, t.TempDir()
		env := map[string]string{"XDS_ADDRESS": "https://elsewhere:1", "AUTH_TOKEN": "somebody else's",
			"ZTUN_CONTROL_CREDENTIALS": "/a/node's", "PROXY_WORKLOAD_INFO": "x/y/z"}
		lookup := func(name string) (string, bool) { v, ok := env[name]; return v, ok }
		if err := who.resolve(lookup); err != nil {
			t.Fatal(err)
		}
		if s := who.spec; s.Namespace != "shop" || s.Name != "till" || s.ServiceAccount != "tills" || len(s.IPs) != 1 {
			t.Fatalf("%+v", s)
		}
		lookup, err := who.environment(lookup, dir)
		if err != nil {
			t.Fatal(err)
		}
		c, err := loadConfig(lookup, func() []string { return nil })
		if err != nil {
			t.Fatal(err)
		}
		where := path
		if filepath.Ext(path) == ".json" {
			where = filepath.Join(dir, "join")
		}
		if c.Control.Dir != where || c.Control.Token.File != filepath.Join(where, control.TokenFile) ||
			c.Control.Token.Literal != "" ||
			c.XDS.Roots.File != filepath.Join(where, control.RootFile) ||
			c.Control.Key != filepath.Join(where, control.KeyFile) {
			t.Errorf("credentials: %+v", c)
		}
		if !c.Mode.Dedicated ||
			c.Mode.Workload != (state.WorkloadInfo{Namespace: "shop", Name: "till", ServiceAccount: "tills"}) ||
			c.Self.TrustDomain != "td" || c.XDS.Address != "https://elsewhere:1" || c.CA.Address != "https://control:15012" {
			t.Errorf("%+v", c)
		}
	}
	if _, err := run(t, "run", "--join", "x", "--name", "y", "--", "true"); err == nil ||
		!strings.Contains(err.Error(), "if any flags in the group [join name] are set none of the others can be") {
		t.Error(err)
	}
}

// Who the command is without a bundle: by flags, by ztunnel's variables, or not at all.
func TestRunWho(t *testing.T) {
	for _, test := range []struct {
		who  runWho
		env  map[string]string
		want string // the workload, or the error
	}{
		{who: runWho{ips: []string{"10.0.0.1"}}, want: "which workload is the command"},
		{who: runWho{ips: []string{"10.0.0.1"}}, env: map[string]string{"PROXY_WORKLOAD_INFO": "a/b/c"},
			want: "which workload is the command"},
		{who: runWho{ips: []string{"10.0.0.1"}}, want: "a/b",
			env: map[string]string{"PROXY_MODE": "dedicated", "PROXY_WORKLOAD_INFO": "a/b/c"}},
		{who: runWho{ips: []string{"10.0.0.1"}}, want: "PROXY_WORKLOAD_INFO=a/b",
			env: map[string]string{"PROXY_MODE": "dedicated", "PROXY_WORKLOAD_INFO": "a/b"}},
		{want: "a/b needs an address",
			env: map[string]string{"PROXY_MODE": "dedicated", "PROXY_WORKLOAD_INFO": "a/b/c"}},
		{who: runWho{join: "/nowhere"}, want: "--join: stat /nowhere"},
		{who: runWho{ips: []string{"ten"}}, want: "not an IP address"},
	} {
		err := test.who.resolve(func(name string) (string, bool) { v, ok := test.env[name]; return v, ok })
		got := refOf(test.who.spec).String()
		if err != nil {
			got = err.Error()
		}
		if !strings.Contains(got, test.want) {
			t.Errorf("%+v: %s", test, got)
		}
	}
}

// signs signs for anybody, or always for one, or for nobody.
type signs struct {
	local  *ca.Local
	always identity.ID
	asked  int
	away   error
}

func (s *signs) Sign(ctx context.Context, id identity.ID, csr []byte, ttl time.Duration) (chain,
	roots []*x509.Certificate, err error) {
	if s.asked++; s.away != nil {
		return nil, nil, s.away
	}
	if s.always != (identity.ID{}) {
		id = s.always
		if _, csr, err = ca.NewRequest(id); err != nil {
			return nil, nil, err
		}
	}
	return s.local.Sign(ctx, id, csr, ttl)
}

// TestOwnSigner: a process that is one workload asks the CA for no other's certificate, and says when it got one.
func TestOwnSigner(t *testing.T) {
	log := &strings.Builder{}
	ask := func(s *ownSigner, name string) error {
		id, err := identity.Parse(name)
		if err != nil {
			t.Fatal(err)
		}
		_, csr, err := ca.NewRequest(id)
		if err != nil {
			t.Fatal(err)
		}
		_, _, err = s.Sign(t.Context(), id, csr, time.Hour)
		return err
	}
	below := &signs{local: ca.NewFake()}
	s := &ownSigner{Signer: below, of: state.WorkloadInfo{Namespace: "shop", Name: "till", ServiceAccount: "tills"},
		log: slog.New(slog.NewTextHandler(log, nil)), lost: newCALost(nil, "", "", 0)}
	const own = "spiffe://td/ns/shop/sa/tills"
	if err := ask(s, own); err != nil || log.Len() > 0 {
		t.Fatal(err, log)
	}
	for _, other := range []string{"spiffe://td/ns/shop/sa/other", "spiffe://td/ns/bank/sa/tills"} {
		if err := ask(s, other); err == nil || !strings.Contains(err.Error(), "asks for no certificate of "+other) {
			t.Error(err)
		}
	}
	if below.asked != 1 {
		t.Errorf("the CA was asked %d times", below.asked)
	}
	below.always = identity.ID{TrustDomain: "td", Namespace: "bank", ServiceAccount: "boss"}
	for range 2 {
		if err := ask(s, own); err != nil {
			t.Fatal(err)
		}
	}
	if n := strings.Count(log.String(), "given=spiffe://td/ns/bank/sa/boss"); n != 1 {
		t.Errorf("said %d times: %s", n, log)
	}
}

// TestOwnSignerEnds: of a certificate that has ended while the CA was away there is one line, and none of one that is
// valid; another that comes is said to have.
func TestOwnSignerEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &strings.Builder{}
		out := slog.New(slog.NewTextHandler(log, nil))
		below := &signs{local: ca.NewFake()}
		s := &ownSigner{Signer: below, of: state.WorkloadInfo{Namespace: "shop", Name: "till", ServiceAccount: "tills"},
			log: out, lost: newCALost(out, "10.0.0.1:15012", "CA_ADDRESS", 0)}
		id := identity.ID{TrustDomain: "td", Namespace: "shop", ServiceAccount: "tills"}
		ask := func() error {
			_, csr, err := ca.NewRequest(id)
			if err != nil {
				t.Fatal(err)
			}
			_, _, err = s.Sign(t.Context(), id, csr, time.Hour)
			return err
		}
		const ended, back = "certificate has ended", "a certificate has come"
		said := func(when string, ends, backs int) {
			t.Helper()
			if n, m := strings.Count(log.String(), ended), strings.Count(log.String(), back); n != ends || m != backs {
				t.Errorf("%s: %q %d times, %q %d times: %s", when, ended, n, back, m, log)
			}
		}
		for i := range 2 {
			below.away = nil
			if err := ask(); err != nil {
				t.Fatal(err)
			}
			said("with a certificate", i, i)
			below.away = errors.New("connection refused")
			for range 3 {
				if err := ask(); err == nil {
					t.Fatal("a certificate")
				}
			}
			said("without a CA", i, i)
			time.Sleep(time.Hour + time.Second)
			for range 3 {
				ask()
			}
			said("when it has ended", i+1, i)
		}
		below.away = nil
		if err := ask(); err != nil {
			t.Fatal(err)
		}
		said("back", 2, 2)
	})
}

// Dedicated mode is one workload's, which has to be named; elsewhere the name has no effect, as with ztunnel.
func TestDedicatedConfig(t *testing.T) { // checklist 11
	c := load(t, "PROXY_MODE", "dedicated", "PROXY_WORKLOAD_INFO", "shop/till/tills/x")
	if !c.Mode.Dedicated ||
		c.Mode.Workload != (state.WorkloadInfo{Namespace: "shop", Name: "till", ServiceAccount: "tills/x"}) {
		t.Errorf("%+v", c.Mode.Workload)
	}
	d := c.dump()
	if w, ok := d["proxyWorkloadInformation"].(map[string]string); d["proxyMode"] != "Dedicated" || !ok ||
		w["name"] != "till" {
		t.Error(d["proxyMode"], d["proxyWorkloadInformation"])
	}
	c = load(t, "PROXY_WORKLOAD_INFO", "shop/till/tills")
	if c.Mode.Dedicated || c.Mode.Workload != (state.WorkloadInfo{}) ||
		!strings.Contains(strings.Join(c.Warnings, " "), "no effect") {
		t.Errorf("%+v %v", c.Mode.Workload, c.Warnings)
	}
}
