package ca

import (
	"bytes"
	"encoding/pem"
	"testing"
)

// FuzzRoots reads root bundles of a CA's directory: all of it or nothing, nothing that is not in it, and one
// certificate more if one is put before it.
func FuzzRoots(f *testing.F) {
	f.Add([]byte(nil))
	f.Add(fakeCert)
	f.Add(fakeKey)
	f.Fuzz(func(t *testing.T, text []byte) {
		certs, err := parseCerts(text)
		if (err == nil) != (len(certs) > 0) {
			t.Fatal(certs, err)
		}
		var again []byte
		for _, c := range certs {
			again = append(again, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
			if bytes.Count(text, []byte("-----BEGIN CERTIFICATE-----")) < len(certs) {
				t.Fatal("more certificates than are in the text")
			}
		}
		if err == nil {
			if same, err := parseCerts(again); err != nil || sumOf(same) != sumOf(certs) || len(same) != len(certs) {
				t.Fatal("not read back:", err)
			}
		}
		more, moreErr := parseCerts(append(bytes.Clone(fakeCert), text...))
		switch {
		case err == errNoCert:
			if moreErr != nil || len(more) != 1 {
				t.Fatal(len(more), moreErr)
			}
		case (err == nil) != (moreErr == nil) || err == nil && len(more) != len(certs)+1:
			t.Fatal(len(certs), err, len(more), moreErr)
		}
	})
}
