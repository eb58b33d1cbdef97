// Package cni is ztun's CNI plugin and what puts it on a node: without an istio-cni, a pod that is the mesh's starts
// only when `ztun agent` has had it captured.
//
// What flows through it: a container runtime runs the plugin (plugin.go, on containernetworking's skel) last in the
// node's chain when a pod's network is made; it asks the agent (ask.go) and hands on the network as it found it, or
// ends the pod's start with an error, which kubelet reports as an event of the pod. conflist.go writes the plugin into
// a node's network configuration and takes it out (pure: bytes to bytes); install.go does so with files, and mends
// them. enrolled.go is what the agent leaves on the disk for the time in which it does not answer. Who calls it:
// cmd/ztun, by the program's name or as a command, and the agent, which runs the Installer. What it never does: ask the
// API server, or touch a network.
//
// Decisions:
//   - 2026-11-29: the plugin is the ztun program, under the name ztun-cni. Skel adds 140 KB to it and 50 KiB to the
//     proxy's memory (text that is not run); a run takes 12 ms. A program of its own would have to be built,
//     released, put into the image and kept in step with the agent.
//   - 2026-11-29: the plugin asks the agent about every pod, and has no credentials: istio-cni's reads pod and
//     namespace from the API server with a token that lies on the node's disk.
//   - 2026-11-29: while no agent answers, the plugin goes by Enrolled, a file that the agent keeps beside the
//     network configuration, as persistent as that: after a reboot the plugin is there before the agent is. A pod's
//     labels are not among what a runtime tells a plugin, so that the file is about namespaces: all new pods of a
//     namespace that has the label, or has enrolled pods of their own label on this node, wait for the agent, but
//     for those known as excluded. What can slip through: the first pod with a label of its own in a namespace
//     without, started while the agent is away; it is captured as a running pod when the agent is back. Without the
//     file all pods wait: nobody has it removed but with the plugin.
//   - 2026-11-29: an agent that answers 504 cannot tell whether the pod is the mesh's (the API server is away), and
//     counts as one that is away. Any other refusal is final for this try; kubelet tries again by itself.
//   - 2026-11-29: STATUS succeeds whether or not the agent is there: a plugin that says it is not ready makes the
//     node NotReady, with all pods that are none of ours. DEL asks nobody: the agent sees pods go, and an attachment
//     sees its namespace go; a DEL that fails would keep pods terminating as long as the agent is away. GC and CHECK
//     have nothing to look at, as the plugin keeps nothing.
//   - 2026-11-29: the network configuration is changed by inserting and cutting bytes, so that whatever another CNI
//     wrote there stays as it is, and removing undoes inserting to the byte. The result is handed on as the bytes
//     that came.
//   - 2026-11-29: the end of the agent leaves the plugin in place, or every update would let pods start uncaptured;
//     Uninstall is called by whoever knows that ztun is to go.
package cni
