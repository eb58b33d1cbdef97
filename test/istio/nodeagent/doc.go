// Package nodeagent holds the tests in which Istio's own Go code stands on both sides of ztun's node: istio-cni's agent
// (its HTTP server for plugins, its ZDS server, its rules) drives `ztun proxy`, asked by istio-cni's plugin and by
// ztun's, over an API server that is a map.
//
// The agent and Istio's plugin are this program again, in a namespace of the lab: the agent writes iptables rules and
// an ipset into what it takes for the node.
package nodeagent
