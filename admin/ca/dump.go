package ca

import (
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"slices"
	"strings"
	"time"

	"ztun/proxy/identity"
)

// CertState is one identity in a dump: State is "Available", "Initializing" or "Unavailable: " and the error. Chain is
// leaf, then intermediates; it and Roots are empty unless State is "Available". It marshals to an element of
// config_dump's "certificates" (spec/controlplane.md 6.3).
type CertState struct {
	Identity identity.ID
	State    string
	Chain    []*x509.Certificate
	Roots    []*x509.Certificate
}

// Dump lists the known identities, sorted by their URIs. It never contains keys.
func (m *Manager) Dump() []CertState {
	m.mu.Lock()
	now := time.Now()
	states := make([]CertState, 0, len(m.entries))
	for _, e := range m.entries {
		s := CertState{Identity: e.id, State: "Initializing"}
		if cert := e.valid(now); cert != nil {
			s.State = "Available"
			s.Chain = append([]*x509.Certificate{cert.Leaf}, cert.Intermediates...)
			s.Roots = cert.Roots
		} else if e.err != nil {
			s.State = "Unavailable: " + e.err.Error()
		}
		states = append(states, s)
	}
	m.mu.Unlock()
	slices.SortFunc(states, func(a, b CertState) int { return strings.Compare(a.Identity.String(), b.Identity.String()) })
	return states
}

// certJSON and stateJSON have their keys in config_dump's order, the alphabet's.
type certJSON struct {
	ExpirationTime string `json:"expirationTime"`
	PEM            string `json:"pem"`          // base64 of the PEM text
	SerialNumber   string `json:"serialNumber"` // decimal
	ValidFrom      string `json:"validFrom"`
}

type stateJSON struct {
	CertChain []certJSON  `json:"certChain"`
	Identity  identity.ID `json:"identity"`
	RootCerts []certJSON  `json:"rootCerts"`
	State     string      `json:"state"`
}

// MarshalJSON writes config_dump's form.
func (s CertState) MarshalJSON() ([]byte, error) {
	return json.Marshal(stateJSON{certsJSON(s.Chain), s.Identity, certsJSON(s.Roots), s.State})
}

func certsJSON(certs []*x509.Certificate) []certJSON {
	out := make([]certJSON, 0, len(certs)) // [], not null
	for _, c := range certs {
		out = append(out, certJSON{
			ExpirationTime: c.NotAfter.UTC().Format(time.RFC3339),
			PEM:            base64.StdEncoding.EncodeToString(pemText(c)),
			SerialNumber:   c.SerialNumber.String(),
			ValidFrom:      c.NotBefore.UTC().Format(time.RFC3339),
		})
	}
	return out
}

// pemText is the certificate in PEM as ztunnel's dump has it: lines of 60 columns, where encoding/pem writes 64.
func pemText(c *x509.Certificate) []byte {
	const columns = 60
	body := base64.StdEncoding.EncodeToString(c.Raw)
	text := make([]byte, 0, len(body)*61/60+64)
	text = append(text, "-----BEGIN CERTIFICATE-----\n"...)
	for len(body) > columns {
		text = append(text, body[:columns]...)
		text = append(text, '\n')
		body = body[columns:]
	}
	text = append(text, body...)
	return append(text, "\n-----END CERTIFICATE-----\n"...)
}
