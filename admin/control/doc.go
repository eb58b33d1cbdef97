// Package control is the embedded control plane, `ztun control`: what istiod is to an Istio mesh, for machines without
// one.
//
// What flows through it: a directory of YAML files (the LOCAL_XDS schema, split as its author likes) is read, checked
// and encoded (files.go, build.go, encode.go) into an immutable snapshot of named, versioned resources (table.go).
// Every stream of a node compares what the node has with the newest snapshot and sends the difference (delta.go, pure;
// stream.go is its rim). CreateCertificate signs for the workloads of the caller's node (sign.go, with admin/ca). Who
// a caller is comes from credentials that Join writes (nodes.go). Who calls it: cmd/ztun/control.go, and tests that
// want a real control plane. What it never does: touch the data plane, or keep anything per node that grows with time
// or with how slowly the node reads.
//
// Directory: ca/ (admin/ca.InitDir), mesh/ (the YAML files), nodes/ (one file per node, and per workload that has
// joined by itself: hashes of its credentials), issued/ (which certificates each has), crl.pem (what is revoked),
// control.sock (status) and control.lock.
//
// # Istiod's behaviour that is kept (docs/istio-peers.md, spec/controlplane.md 2.4)
//
//   - Names are uid, namespace/hostname, namespace/name; versions the unpadded hex of the payload's 64-bit xxhash.
//   - The first answer to a type is sent even if empty. Names of initial_resource_versions that are gone are removed,
//     resources of the same version are not sent again.
//   - A reply with error_detail is recorded and never answered; a stale nonce counts as neither ACK nor NACK.
//   - No names is the wildcard. Subscribing to and unsubscribing from "*" at once is "on demand": the first answer
//     holds the node's own workloads, "network/ip" is answered with that as alias, a service brings its workloads
//     along, an unknown name is answered in removed_resources.
//   - Codes and texts of refused calls, the default life of a certificate (24 h), and that more than 90 days are
//     refused.
//
// # Where it differs
//
//   - Policies have versions as well, so that a reconnecting node is not sent them all again.
//   - A name subscribed to is always answered, also if an earlier answer implied it (istiod: silence).
//   - A node's credential is bound to its name, and identities to nodes by the workloads' "node", trust domain included
//     (istiod signs for any trust domain).
//   - Subscriptions carried by a request with a stale nonce are honoured, as the protocol asks.
//
// # Decisions
//
//   - 2026-11-23: nodes get these files by xDS, so xDS's defaults apply: an omitted serviceAccount is "default",
//     clusterId "Kubernetes", workloadType "deployment", and trustDomain that of the CA (xDS: cluster.local). With
//     LOCAL_XDS the same omissions stay empty.
//   - 2026-11-23: a service's "endpoints" have no place in xDS; they are added to the services of the workloads they
//     name. A workload's own entry wins, as in state.Builder. An endpoint without a workload, or unhealthy where its
//     workload is healthy and only healthy ones count, is left out with a warning.
//   - 2026-11-23: problems are errors (nothing of the directory is published and the last good snapshot stays) if
//     publishing would guess at what was meant: bad syntax, repeated keys, nameless things, no file at all. A reference
//     to something that is not there is a warning: it may be about to come, and nodes fail closed on it.
//   - 2026-11-23: before the first good snapshot streams are accepted and not answered: nodes keep what they have. An
//     empty answer would make them forget it.
//   - 2026-11-23: one message per type is under way at a time, of at most 3 MiB (below the 4 MiB that gRPC clients
//     accept unless told otherwise). The next is made from the newest snapshot after the reply, so a slow node skips
//     what was replaced meanwhile. Removals follow when all additions have been sent, so that a workload that changes
//     its uid is never missing.
//   - 2026-11-23: a snapshot is built anew from all files (some 200 ms for 100,000 workloads; unchanged files are not
//     read or parsed again) and takes over every unchanged part of the last one, which makes comparing cheap.
//   - 2026-11-23: policies are sent before addresses when both are due: a workload that refers to a policy that has not
//     come yet rejects everything.
//   - 2026-11-23: all responses but the last of a state end their system_version_info in "(more follows)", which
//     admin/xds heeds and others ignore: a node with a part of the workloads is not ready.
//   - 2026-11-23: anybody can connect. A connection without a call that is admitted ends after 30 s, a node has at most
//     32 connections, 4 streams and 16 certificate requests under way (counted before they are read): no stranger and
//     no node takes the places of others.
//   - 2026-11-28: strangers (until a call is admitted) have places of their own, shared among sources; at the bound the
//     greediest loses its oldest connection. A deadline alone was not enough: 3,600 silent connections a second had all
//     4,096 places, with 30 s each. TLS has 5 s. The bounds fit themselves to the process's open files.
//   - 2026-11-23: a client certificate counts by the hash of its key in nodes/, not by its name: certificates of
//     workloads come from the same CA and must not open the control plane.
//   - 2026-11-28: a node that leaves loses all that it has. Each certificate is noted in issued/ before the node gets
//     it; leaving turns the notes into entries of a CRL, which nodes follow by a stream of their own (revocations.go)
//     rather than as an xDS type: ADS is istiod's protocol, and a client that asks istiod for an unknown type is on
//     its own. Whoever joins anew (--renew) loses the client certificate alone: its workloads must go on. crl.pem is
//     for whoever reads files (CRL_PATH of a real ztunnel).
//   - 2026-11-28: a node may ask for what life it likes and gets 24 h at most (--max-life): what no list reaches ends
//     by itself in a day. Shortened and not refused: a node with SECRET_TTL=72h goes on to work.
//   - 2026-11-28: client certificates are judged with the call and not in the handshake, so that a node whose
//     certificate has expired goes on by its token, visibly. A daemon renews its own at two thirds of its life, for
//     the same key (the key is what nodes/ knows), by the call that signs for the node's proxy.
//   - 2026-11-28: a workload can be a member by itself (`control join --workload`), for processes without a node's
//     daemon. Its credentials are bound to the uid of one record, and its identity is what that record says when a
//     certificate is signed: who asks in its name for another gets nothing, and without a record it is nobody. It may
//     say any NODE_NAME, as nothing depends on it, and learns as much of the mesh as a node does: names need the
//     services, and what may be sent in plaintext depends on the policies of the destination. Its client certificate
//     bears the workload's own identity and lives a day; the token, which brings a laptop back after a holiday, ends
//     with `leave` alone.
//   - 2026-11-29: who is a member changes together with what members have, under a lock of issued/ that all
//     processes take (membership.go): a control plane that had read who is joined, just before a node joined again,
//     revoked what that one had got.
package control
