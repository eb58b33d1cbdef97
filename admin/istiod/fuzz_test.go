package istiod

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"os"
	"testing"
)

// FuzzRoots reads the roots that prove a control plane: a certificate that does not parse is not the others' fault, and
// nothing is trusted that is not in the text.
func FuzzRoots(f *testing.F) {
	sound, err := os.ReadFile("testdata/root.pem")
	if err != nil {
		f.Fatal(err)
	}
	block, _ := pem.Decode(sound)
	root, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(nil))
	f.Add(sound)
	f.Fuzz(func(t *testing.T, text []byte) {
		pool, n, bad := parseRoots(text)
		if most := bytes.Count(text, []byte("-----BEGIN CERTIFICATE-----")); n > most ||
			n == 0 && !pool.Equal(x509.NewCertPool()) {
			t.Fatalf("%d roots of at most %d", n, most)
		}
		more, m, worse := parseRoots(append(bytes.Clone(sound), text...))
		if m != n+1 || (bad == nil) != (worse == nil) {
			t.Fatalf("%d roots (%v), with one more %d (%v)", n, bad, m, worse)
		}
		if _, err := root.Verify(x509.VerifyOptions{Roots: more, CurrentTime: root.NotBefore}); err != nil {
			t.Fatal(err)
		}
	})
}
