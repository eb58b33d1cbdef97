// Command ztun-agent is what `ztun agent` executes: a Kubernetes node's agent, which tells the node's proxies which
// pods are the mesh's (ZDS), and answers the CNI plugin.
//
// What flows through it: pods of this node and namespaces from the API server (kube.go, client-go's informers) into a
// queue of pods to look at; admin/agent decides and acts; its answers go back as annotations and events. agent.go joins
// the parts and serves the sockets, metrics.go is what can be seen of it. What it never does: enter a pod's namespace,
// write anything to the API server but the one annotation and events.
//
// Decisions:
//   - 2026-11-29: a program of its own: package agentcmd says what client-go would cost the others.
//   - 2026-11-29: no sockets before the watch has shown what there is and each pod has been looked at: an early
//     snapshot would have the proxies let go of pods that it does not name yet. Until then a proxy keeps what it has.
//   - 2026-11-29: client-go's REST client with core/v1 alone, not its Clientset, which knows all of Kubernetes' API.
package main
