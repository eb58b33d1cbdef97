package main

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"
)

// TestControlLost: of a control plane or a CA that is away there is one line, with the likely cause, and one when it is
// back; none of a stream that ends and begins again.
func TestControlLost(t *testing.T) {
	var out bytes.Buffer
	c := newControlLost(slog.New(slog.NewTextHandler(&out, nil)), "https://10.0.0.1:15012", time.Minute)
	said := func(what string, want ...string) {
		t.Helper()
		lines := strings.Count(out.String(), "\n")
		if len(want) == 0 && lines != 0 || len(want) > 0 && lines != 1 {
			t.Errorf("%s: %d lines: %s", what, lines, out.String())
		}
		for _, w := range want {
			if !strings.Contains(out.String(), w) {
				t.Errorf("%s: no %q in %s", what, w, out.String())
			}
		}
		out.Reset()
	}
	refused := errors.New("rpc error: code = Unavailable desc = dial tcp 10.0.0.1:15012: connect: connection refused")
	for range 5 {
		c.trouble(refused)
	}
	said("at start", "level=WARN", "it is waited for", "https://10.0.0.1:15012", "is XDS_ADDRESS right?")
	c.connected()
	said("the first answer", "level=INFO", "is reached")
	c.trouble(errors.New("EOF"))
	c.connected()
	said("a stream that ends")
	for range 3 {
		c.trouble(errors.New("tls: failed to verify certificate: x509: certificate signed by unknown authority"))
	}
	said("away again", "what is known stays in force", "not one to be trusted here")
	c.connected()
	said("back again", "is reached")

	ca := newCALost(slog.New(slog.NewTextHandler(&out, nil)), "https://10.0.0.2:15012", "CA_ADDRESS", 0)
	for range 5 {
		ca.trouble(refused)
	}
	said("no CA", "level=WARN", "no certificate comes from the CA", "https://10.0.0.2:15012", "is CA_ADDRESS right?",
		"in the mesh is refused")
	ca.connected()
	said("a certificate", "level=INFO", "a certificate has come")
	for range 5 {
		ca.trouble(errors.New("signing gRPC error (Unauthenticated): who is that"))
	}
	said("no other", "the one at hand serves until it ends", "it does not take these credentials")

	silent := newControlLost(nil, "", 0)
	for range 3 {
		silent.trouble(refused)
	}
	silent.connected()
	if got, _ := likelyCause("rpc error: something new", "XDS_ADDRESS"); got != "see the error" {
		t.Error(got)
	}
}
