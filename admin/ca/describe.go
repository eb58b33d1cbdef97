package ca

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"strings"
	"time"
)

// Describe names a certificate so that two nodes' logs can be compared: subject, SHA-256 fingerprint of the DER (as
// `openssl x509 -fingerprint -sha256` without colons), end.
func Describe(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return fmt.Sprintf("%q sha256 %s until %s", clip(c.Subject.String()), hex.EncodeToString(sum[:]),
		c.NotAfter.UTC().Format(time.RFC3339))
}

// describeAll names at most five.
func describeAll(certs []*x509.Certificate) string {
	const most = 5
	var names []string
	for i, c := range certs {
		if i == most {
			names = append(names, fmt.Sprintf("and %d more", len(certs)-most))
			break
		}
		names = append(names, Describe(c))
	}
	return strings.Join(names, ", ")
}
