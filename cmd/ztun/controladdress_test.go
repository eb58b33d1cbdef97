package main

import "testing"

// TestControlAddress: what join writes for others to call is a host with a port, its own or 15012.
func TestControlAddress(t *testing.T) {
	for host, want := range map[string]string{
		"control.example":      "https://control.example:15012",
		"control.example:7443": "https://control.example:7443",
		"192.0.2.1":            "https://192.0.2.1:15012",
		"192.0.2.1:7443":       "https://192.0.2.1:7443",
		"2001:db8::1":          "https://[2001:db8::1]:15012",
		"[2001:db8::1]":        "https://[2001:db8::1]:15012",
		"[2001:db8::1]:7443":   "https://[2001:db8::1]:7443",
		"control.example:x":    "",
		"control.example:0":    "",
		"a b":                  "",
		"a/b":                  "",
	} {
		if got, err := controlAddress(host); got != want || (err == nil) != (want != "") {
			t.Errorf("%s: %q, %v; want %q", host, got, err, want)
		}
	}
}
