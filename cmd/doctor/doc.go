// Package doctor finds out why a node's part of the mesh does not work as it should.
//
// What flows through it: Collect looks at the host, the control plane, certificates, peers and pods and writes down
// Facts; Judge, which is pure, makes Findings of them: what is wrong, why it matters, the command that mends it. A
// healthy node has none. Facts that could not be had are Blind spots, which are told beside the findings and are no
// findings themselves.
//
// Who calls it: `ztun doctor` in cmd/ztun, which says what is configured and asks the daemon.
//
// What it never does: it changes nothing, on the host or in the daemon; it sends no payload (a TCP handshake with a
// peer's port, TLS without a request to the control plane, one DNS query in each pod); it runs no command but
// iptables-save and nft, if they are there, to read rules.
//
// Decisions:
//   - 2026-11-29: a steered pod is judged by what was written down of it before it was captured, from which its plan
//     follows; that of isolated pods had named 20 faults of it. The daemon itself puts back what is changed, so that
//     only what it cannot mend is found.
//   - 2026-11-29: where istio-cni's rules capture the pods (ZTUN_STEERING=redirected) nothing of the host's that only
//     TUN devices need is looked at: on a real cluster the doctor had named 13 faults of a healthy node, and mends that
//     would have let go of its pods. A pod whose namespace came as a descriptor is judged by its state alone.
//   - 2026-11-29: a workload whose record announces where its HBONE arrives (meshAddresses) is called there, 16 of them
//     at most: no node stands for it.
//   - 2026-11-28: strict reverse path filtering, foreign rules and packet filters are findings only where they hit
//     what ztun does (its device, its ports, its rules' place): a doctor that complains of a healthy node is not
//     asked twice.
//   - 2026-11-28: without the daemon the host is still looked at, against the plan that the daemon would apply, and
//     that the daemon does not answer is a finding of its own.
//   - 2026-11-28: a skew of clocks is told from certificates that are not valid yet: no protocol here carries the
//     other side's time.
package doctor
