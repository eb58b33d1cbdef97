// Package identity knows who a workload is and how it proves that: SPIFFE ids, the certificate that carries one,
// the TLS configurations of both ends of a tunnel, and the two checks that ztunnel makes of a peer (a client's trust
// domain, a server's SAN).
//
// What flows through it: a key, a chain and roots come in from admin/ca (New) and leave as an immutable Certificate;
// a Certificate becomes a *tls.Config (ServerTLS, ClientTLS, with the process's Params); a finished handshake becomes
// an ID (PeerID). A file's revocation lists become an immutable CRL (ParseCRL); Revocation holds the one in force,
// which handshakes ask by way of Params, and the open tunnels that a new one may cut (Track, Replace). Who calls it:
// admin/ca (New, SANExtension, ParseCRL, Replace), admin/istiod (Params.Base), proxy and proxy/hbone (the rest),
// proxy/rbac and proxy/state (ID). What it never does: no I/O, no goroutines, no clock but the one that crypto/tls
// hands to verification (time.Now), no package-level mutable state, no logging. It does not decide when a certificate
// is renewed or a list is read: that is admin/ca. It does not close a tunnel: that is the function that Track was
// given.
//
// # TLS as ztunnel speaks it (spec/dataplane.md 4.1 and 8.5), and where crypto/tls cannot follow
//
//   - TLS 1.3 only, unless Params.TLS12; no tickets and no resumption; ALPN h2; no SNI; groups X25519MLKEM768, X25519,
//     P-256, P-384. crypto/tls cannot turn TLS_CHACHA20_POLY1305_SHA256 off and prefers AES-128 to AES-256.
//   - A client that offers ALPN without h2 is refused with no_application_protocol (120). crypto/tls alone would let
//     "http/1.1" through (go.dev/issue/46310), so GetConfigForClient swaps in a configuration that refuses.
//   - Alerts equal to the samples: certificate_required (116), protocol_version (70), no_application_protocol (120);
//     equal to rustls': unknown_ca (48) and certificate_expired (45) of a client's certificate.
//   - Alerts that differ: a client certificate of another trust domain or without a SPIFFE id gets bad_certificate
//     (42), ztunnel sends certificate_unknown (46); every refusal of a server's certificate by our client is 42 as well
//     (ztunnel: 46 for a SAN, 48 for an unknown root, 45 for an expired one). crypto/tls hard-codes 42 behind
//     VerifyConnection, and in TLS 1.3 the alert is already encrypted when it leaves the package.
//
// # FIPS 140-3 and post-quantum (issue 4, point 3)
//
// Params.PQC leaves one group, X25519MLKEM768, and with it TLS 1.3 alone. FIPS mode is not ours to switch: it is
// Go's, GODEBUG=fips140=on at the start of the process (the default of binaries built with GOFIPS140=v1.0.0, which
// have the certified module), and crypto/tls then offers and accepts less: no X25519 by itself (left: X25519MLKEM768,
// P-256, P-384), no ChaCha20 (left: AES-128-GCM, AES-256-GCM), no peers with RSA keys below 2048 bits. It goes
// together with PQC. proxy/hbone leaves the record layer to crypto/tls then, which costs about a third more processor
// time per byte, and nothing else changes: keys are P-256, signatures and hashes approved. fips140=only works as
// well. TestFIPS and admin/istiod's TestFIPS run handshakes in both modes.
//
// # Decisions
//
//   - 2026-11-23: a certificate is revoked if a list of its issuer's name says so and the list's signature verifies
//     with the key of its issuer in the verified chain. The signature is looked at only for what is listed, so that
//     all other handshakes pay two map lookups; a list by a stranger of the same name (a rotated CA) changes nothing,
//     where rustls refuses every peer of that name. Other chains of the peer may still be good. A list's nextUpdate,
//     thisUpdate and scope are not asked; delta and indirect lists are refused when read.
//   - 2026-11-23: open tunnels are judged by the presented chain as of when they were opened, as in ztunnel; a new CRL
//     finds the suspects by issuer and serial number, and only they cost signatures.
//   - 2026-11-23: URI SANs are read from the raw extension, not from x509.Certificate.URIs: net/url lower-cases the
//     scheme and re-escapes paths, so two different SANs could become one identity. ztunnel compares the bytes.
//   - 2026-11-23: our client remembers which peer chains it has verified (see verifier): the second handshake with a
//     peer costs no signature check of the chain and allocates no pools. The server leaves chain verification to
//     crypto/tls, because only then an unknown root and an expired certificate get alerts that tell them apart;
//     BenchmarkHandshake measures what that costs.
//   - 2026-11-23: a peer whose leaf is a CA certificate is refused (X.509-SVID section 5.2; rustls-webpki does too,
//     crypto/x509 does not).
//   - 2026-11-29: two pods of one process meet without a handshake (Meet). What TLS adds to its checks is the proof
//     that each side holds its key: both keys are this process's own (Certificate), so that there is nobody to prove
//     it to.
package identity
