package main

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
)

// TestControlLost: of a control plane that is away there is one line, with the likely cause, and one when it is back;
// none of a stream that ends and begins again.
func TestControlLost(t *testing.T) {
	var out bytes.Buffer
	c := controlLost{log: slog.New(slog.NewTextHandler(&out, nil)), address: "https://10.0.0.1:15012", setting: "XDS_ADDRESS"}
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
	said("at start", "level=WARN", "the command calls is refused", "https://10.0.0.1:15012", "is XDS_ADDRESS right?")
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

	silent := controlLost{}
	for range 3 {
		silent.trouble(refused)
	}
	silent.connected()
	if got := likelyCause("rpc error: something new", "XDS_ADDRESS"); got != "see the error" {
		t.Error(got)
	}
}
