package ambient

import (
	"fmt"
	"strings"
)

// What the tests put into the API server.

const namespaces = `apiVersion: v1
kind: Namespace
metadata: {name: default, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Namespace
metadata: {name: istio-system}
---
`

// podYAML is a running pod that the node's agent has captured; its label app is its name.
func podYAML(namespace, name, account, node string, ips ...string) string {
	return podOf(namespace, name, account, node, "ambient.istio.io/redirection: enabled", ips)
}

// ztunnelPod is the pod that the daemon of a node claims to be.
func ztunnelPod(node, ip string) string {
	return podOf("istio-system", "ztunnel-"+node, "ztunnel", node, "", []string{ip})
}

// plainPod is a pod that nobody has captured.
func plainPod(namespace, name, node string, ips ...string) string {
	return podOf(namespace, name, "default", node, "", ips)
}

func podOf(namespace, name, account, node, annotations string, ips []string) string {
	var list []string
	for _, ip := range ips {
		list = append(list, "{ip: '"+ip+"'}")
	}
	return fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {namespace: %s, name: %s, labels: {app: %s}, annotations: {%s}}
spec: {nodeName: %s, serviceAccountName: %s}
status: {phase: Running, podIP: '%s', podIPs: [%s], conditions: [{type: Ready, status: "True"}]}
---
`, namespace, name, name, annotations, node, account, ips[0], strings.Join(list, ", "))
}

// serviceYAML is a service of the pods whose label app is its name: port 80 to their 9000.
func serviceYAML(namespace, name, vip string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Service
metadata: {namespace: %s, name: %s}
spec: {clusterIP: %s, clusterIPs: [%s], selector: {app: %s}, ports: [{name: tcp, port: 80, targetPort: 9000, protocol: TCP}]}
---
`, namespace, name, vip, vip, name)
}

// allowYAML lets only the given principals (without spiffe://) reach the pods of an app.
func allowYAML(namespace, name, app string, principals ...string) string {
	return policyYAML(namespace, name, app, "ALLOW", principals)
}

// denyYAML refuses them.
func denyYAML(namespace, name, app string, principals ...string) string {
	return policyYAML(namespace, name, app, "DENY", principals)
}

func policyYAML(namespace, name, app, action string, principals []string) string {
	return fmt.Sprintf(`apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {namespace: %s, name: %s}
spec:
  selector: {matchLabels: {app: %s}}
  action: %s
  rules: [{from: [{source: {principals: ["%s"]}}]}]
---
`, namespace, name, app, action, strings.Join(principals, `", "`))
}

// strictYAML asks for mutual TLS towards the pods of an app, or of a whole namespace (of the mesh, in istio-system).
func strictYAML(namespace, app string) string {
	selector, name := "", "default"
	if app != "" {
		selector, name = "selector: {matchLabels: {app: "+app+"}}, ", app
	}
	return fmt.Sprintf(`apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {namespace: %s, name: %s}
spec: {%smtls: {mode: STRICT}}
---
`, namespace, name, selector)
}
