// Package xds is where the admin loop learns what the mesh looks like.
//
// From a control plane: a Client keeps a delta xDS stream to istiod, or to
// `ztun control`, and publishes a new View after each response that changed
// something, or after several that come at once. From a local file: ParseLocal reads ztunnel's LOCAL_XDS schema (YAML
// or JSON) into state and rbac values; File loads, watches and reloads it. The
// Write functions render state as /config_dump does. cmd/ztun runs a Client or a
// File; nothing here touches what the data plane reads.
//
// Reading order, the client: client.go (from above), session.go (one stream),
// batch.go (when a View is made),
// store.go (a response becomes state; pure), wire.go (the response as bytes),
// decode.go and decodepolicy.go (resources; pure), demand.go (on-demand mode),
// pauses.go, retained.go, nodeid.go, clientstats.go.
//
// Reading order, the file: local.go (the schema, from above), policy.go (its
// policies), node.go (strict reading of YAML nodes: lines, keys, duplicates),
// file.go (the watching), dump.go (config_dump).
//
// # The client's guarantees
//
// Whatever the control plane does, the data plane keeps the last View. A stream
// that stalls, breaks, sends garbage or more than the bound is dropped, counted
// and replaced after a wait. What is not taken is not read: a flood waits in the
// server. One goroutine (Run's) owns the Builder and all state, a second one only
// receives; both end with Run. Resources are read one by one from the bytes of a
// response, so that it takes no more memory than these, and 100,000 workloads with
// 10,000 services cost 830 B each at rest, all told (BenchmarkColdStart).
//
// # Decisions
//
// 2026-11-23: the file is read strictly and all at once: an unknown or repeated
// key, a wrong type, a repeated uid, service or policy is an error that names the
// line and the key, and nothing of the file is used. ztunnel lets entries with
// the same uid overwrite each other.
//
// 2026-11-23: an unknown key within a policy's match or serviceAccounts is an
// error too (ztunnel ignores it there): a misspelt constraint must not vanish
// from a policy. Unknown keys are ignored only within locality and cidrVips.
//
// 2026-11-29: no field of WDS says at which port a workload that is no gateway takes HBONE: hbone_mtls_port is a
// waypoint's or a network's, and networkGateway cannot be borrowed, since istiod gives it to the workloads of one's own
// network as well. So meshAddresses is ours: in the file a key, in xDS an Extension of the workload (MeshExtension),
// which ztunnel passes over and then calls port 15008 of the workload's own addresses.
//
// 2026-11-23: an empty file is an error: that is what a reader sees between an
// editor's truncate and write, and it must not empty the mesh. "{}" is the way
// to say nothing.
//
// 2026-11-23: string matches are read both as tags (!Exact x), the only form
// that ztunnel reads, and as maps ({Exact: x}), the form that it dumps; port
// numbers as keys may be quoted. So a dump's staticConfig can be read back.
//
// 2026-11-23: policies never widen by what cannot be understood (spec
// controlplane 12.26; ztunnel drops such entries). An address with a bad length, a
// string match that is unset or empty, a port beyond 65535 marks its list in
// rbac.Match.Invalid and is decided against the connection. The policy is applied
// and ACKed all the same: refusing it would leave the mesh without it, which is
// wider still. It is logged and counted (Damaged).
//
// 2026-11-23: refused and NACKed beyond ztunnel's list: numbers of ports that do
// not fit (ztunnel truncates), a workload without uid, a service without hostname,
// a gateway with an empty hostname, a NAMESPACE policy without namespace, a range
// of mapped IPv4 addresses shorter than /96, a resource without name, and one
// whose decoding panics. Unknown visibility is PUBLIC and unknown workload types
// are deployments, as in ztunnel.
//
// 2026-11-23: a response of an unknown type is ACKed, as ztunnel does (checklist
// 26): nothing was asked, so nothing is refused. It is logged and counted.
//
// 2026-11-23: a name that a response both brings and removes is gone (ztunnel
// drops the resource and keeps echoing its name). A resource that is not named by
// its key (uid, namespace/hostname) is removed by its name all the same.
//
// 2026-11-23: a policy that arrives unchanged is no change, since istiod sends all
// of them at every reconnect and a change has connections checked again.
//
// 2026-11-28: an answer to every type resets the waits between streams; it was a
// minute of life, and after an outage a control plane that restarted once more was
// waited for as if it had never been back. A Demand, or a pod that is not known yet
// (Retry), ends a wait after a second.
//
// 2026-11-23: waits between streams are ztunnel's plus up to a quarter at random
// (minus, at the maximum); an unreadable root
// file waits like a failure (12.21, 12.22). Streams that end well within a second
// are followed by such waits from the fourth on.
//
// 2026-11-23: a stream is given up if a type has never been answered and nothing
// comes for two minutes, if a request is not taken for a minute, and after an hour
// of silence (istiod itself ends streams after half an hour). Dead peers are found
// by the connector's HTTP/2 keepalive.
//
// 2026-11-23: after a panic the Builder is thrown away, all names are asked for
// again without versions, and nothing is published before every type has been
// answered: workloads without their policies would be open.
//
// 2026-11-23: a gRPC server takes requests of 4 MiB by default, which the list of
// names exceeds at some 50,000. If it refuses (ResourceExhausted, with gRPC's own
// text: the code alone may mean too many streams), the next stream is opened
// without the list, and the first response of each type is taken for everything
// there is: what it does not name is removed. In on-demand mode this cannot
// happen, since names are subscriptions there.
//
// 2026-11-23: `ztun control` divides a large state into several responses, and
// says so in the system_version_info of all but the last (ours; ztunnel ignores
// the field). A type has arrived, and is complete in the sense of the last
// paragraph, with the last: with a part of the workloads the node would be called
// ready, and would send to the others in plaintext.
//
// 2026-11-23: on-demand waits end by name, alias, removal or refusal, after 5 s, or
// with the caller's context; aliases that were answered are remembered as long as
// their resource lives, because istiod does not answer for them twice; a name that
// was asked for on the same stream is let go before it is asked for again.
//
// 2026-11-28: no request lets names go without subscribing to one. istiod answers
// a request that subscribes to nothing with the removal of all that it watches for
// the node, and the node was empty. A name that nothing can have is subscribed to
// where there is no better one. Names that wait go in one request: istiod looks
// through its whole mesh for each.
//
// 2026-11-28: "there is no such thing" is believed for 10 s, of some 4,000 to 8,000
// names, and asked for anew then, since istiod does not tell when a pod gets an
// address that was asked for in vain (it looks at names only). A push of such a
// thing ends the belief at once, and so does a new stream; while there is none the
// belief holds, as all that the control plane said. What was never answered is
// unknown, not absent: Demand's error has the connection refused.
//
// 2026-11-28: a resource that is refused while nothing older is held ends a Demand
// with an error: it is in the mesh, in a way that we do not understand.
//
// 2026-11-29: responses that come within 10 ms of a View are shown together
// (batch.go), so that a thousand updates per second are a hundred Views. One alone
// is shown at once; the first state, a refusal and what on-demand mode waits for do
// not wait. A reply comes after its View all the same.
//
// 2026-11-28: the maps of a workload file are tables (schema.go) that the reader
// itself goes by: what is unknown, what is missing, what was meant, and
// docs/mesh-files.md come from one place.
package xds
