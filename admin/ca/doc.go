// Package ca gets certificates for the node's identities and keeps them fresh.
//
// What flows through it: an identity.ID comes in (Manager.Certificate when a connection needs it, Prefetch when a pod
// is known); the Manager makes a fresh key and a request of ztunnel's shape (NewRequest), a Signer answers with a
// chain and roots, and an immutable *identity.Certificate goes out, renewed at half of its life for as long as the
// identity is not forgotten. Remote is the Signer that asks istiod, over a channel of admin/istiod's. Local is the
// Signer of machines without istiod: a directory made by `ztun ca init` (InitDir, LoadDir) or the built-in fake CA
// (NewFake). Besides, CRLFile keeps the identity.Revocation in force at what the file of CRL_PATH says. Who calls it:
// cmd/ztun builds Signer and Manager, proxy asks for certificates, the admin port dumps them (Dump, CertState
// marshals to config_dump's form). What it never does: touch a connection. A renewed certificate is a new value that
// new handshakes take; live tunnels keep the one they were made with, also beyond its end. It writes files in InitDir
// only, and never logs a key.
//
// # Rules (spec/dataplane.md 8.3), pure in rotate.go and queue.go
//
//   - One fetch per identity at a time, shared by all callers; at most 8 at once; order RealTime, Warmup, Background,
//     then due time. A failure is remembered and given to callers at once while retries go on in the background
//     (1 s doubling to 150 s, each +-20 %). While the old certificate is valid it is served.
//   - Improvements on ztunnel (section 14 and our own): renewal is jittered (up to 10 % early, never late); a fetch has
//     a time limit; queue and table are bounded and count what they turn away; forgetting an identity cancels its
//     fetch; a retry for an identity without a usable certificate goes before renewals of healthy ones; prefetches run
//     as concurrently as anything else; backoff keeps its jitter for good; while the old certificate is valid, retries
//     are never further apart than a third of what is left of it, so that an outage cannot outlast a short life.
//
// # Decisions
//
//   - 2026-11-23: half-life is measured as in the spec, (notBefore+notAfter)/2, but never earlier than a third of what
//     is left and never less than a second away: with notBefore backdated by two minutes, a one-minute certificate
//     would otherwise be past its half-life when issued and be renewed in a hot loop.
//   - 2026-11-23: no injected clock. Tests run in testing/synctest bubbles. Due times of renewals are wall times (so a
//     corrected clock is obeyed within a minute), those of retries monotonic (so a corrected clock cannot stall them).
//   - 2026-11-23: a local CA for one trust domain (InitDir records it in the root) refuses to sign for another: the
//     mistake is found at the first fetch and not as failing handshakes. The fake CA signs for any.
//   - 2026-11-23: Remote's channel is made anew for the next call when a file it was made from has changed (watched by
//     directory, 2 s debounce, and by looking every 10 s), as in ztunnel, and also when it failed to connect: so each
//     fetch makes an attempt of its own with the roots of that moment, where gRPC would repeat its last error until its
//     own backoff is over. If there is no new one to be had the old one is kept. Calls under way keep theirs.
//   - 2026-11-23: without Impersonate (dedicated mode) the Manager takes whatever identity the CA chose.
//   - 2026-11-23: a CRL file that is missing or broken at the start revokes nothing, with a warning (checklist 137),
//     but unlike ztunnel's it is read as soon as it is mended; later failures keep what is in force.
//   - 2026-11-23: LoadDir also takes Istio's plug-in layout (ca-cert.pem, cert-chain.pem beside ca-key.pem and
//     root-cert.pem) and several roots in root-cert.pem, so that a root can be rotated.
//   - 2026-11-28: pauses between attempts end early when somebody wants the certificate (but not within a second of
//     the last attempt, nor a tenth of the pause that is due, at most 5 s), when any identity gets one after a
//     failure, and when the control plane is connected again: an outage was felt up to 150 s after its end. The
//     caller waits up to 2 s.
//   - 2026-11-28: a certificate that comes with other roots than the newest before has all others renewed, spread
//     over 5 s, as has a file of the way to the CA, or of LOCAL_CA_DIR, that changed. Until half-life, half a day,
//     part of the mesh did not believe the other part. At most one such round per minute: of two CAs behind one name
//     each brings others. With every new stream of the control plane one certificate is renewed, to see.
//   - 2026-11-28: LOCAL_CA_DIR is read again when it changes. A key that others may read is warned about, not refused:
//     test roots that two implementations share come out of version control so.
//   - 2026-11-28: what `ztun control` has revoked arrives by a stream and is kept in a file (Revocations), which
//     CRLFile reads beside the operator's: the list is in force after a restart before the control plane answers, and
//     a fault of one file leaves the other in force. Own renews the client certificate that `ztun control join` made,
//     in place and for the same key, by which the control plane knows the node.
package ca
