// Package attachtest is a way of attaching pods in memory, without devices, namespaces and root: the fifth kind, which
// shows that nothing above the seam needs the other four's means, and by which the daemon's own pod manager runs in
// tests.
//
// What flows through it: a Host is what a namespace and its kernel are elsewhere: applications that connect and
// listen (netstack, in the part of the kernel), joined by a tuntest.Pair to the stack of the pod that is attached
// there. Mesh connections are in-memory pipes; plaintext goes by an uplink whose far end gives every packet back, as a
// node's routes do. Who calls it: tests. What it never does: pretend that a namespace of the machine is a pod's.
package attachtest
