// Package agent is the centre of `ztun agent`: which pods of a node are the mesh's, where their network namespaces are,
// and what is done about each when something changes.
//
// What flows through it: facts about pods and namespaces as the API server has them (Pod, Decide), pods that a CNI
// plugin asks for (plugin.go), the proxies' answers. choose.go decides who belongs (pure), enrol.go what is to be done
// next (next, pure) and does it, proc.go finds the namespaces of running pods, plugin.go answers the CNI plugin. Who
// calls it: cmd/ztun-agent, which knows Kubernetes, and whose queue calls Reconcile. What it never does: speak to the
// API server or to a proxy itself (Cluster, Proxies), enter a pod's namespace, change anything in it.
//
// Decisions:
//   - 2026-11-29: the agent enters no namespace: it hands over descriptors, and the proxy does what is to be done
//     there. So it needs no NET_ADMIN.
//   - 2026-11-29: a pod that the plugin asks for and that the watch does not call the mesh's is looked up at the API
//     server before it starts without ztun: a label that is a moment old must not start a pod in the clear. Where the
//     API server does not answer, what the watch has seen decides, and a pod that it has never seen does not start.
//   - 2026-11-29: kube-system is left alone unless told otherwise, as istio-cni's chart has it; pods of the network of
//     the host, with a sidecar, or with the label app=ztunnel in the mesh's own namespace always.
//   - 2026-11-29: the annotation goes before the pod is let go of, so that peers stop to call port 15008 rather before
//     than after nobody listens there; plaintext is served meanwhile as the pod's mTLS mode has it.
//   - 2026-11-29: ambient.istio.io/bypass-inbound-capture and dns-capture are not honoured: they are switches of
//     istio-cni's rules, and ZDS has no field for them. An event on the pod says so.
package agent
