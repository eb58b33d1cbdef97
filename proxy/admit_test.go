package proxy

import (
	"context"
	"net"
	"strings"
	"testing"
)

// TestPolicyAttachedMeanwhile: a policy that the workload gets while a connection to it is on its way in counts for
// that connection, which a re-check of live connections does not know yet.
func TestPolicyAttachedMeanwhile(t *testing.T) {
	deny := func(s string) string {
		s = strings.Replace(s, "  workloadIps: [\"10.91.2.2\"]\n",
			"  workloadIps: [\"10.91.2.2\"]\n  authorizationPolicies: [default/now]\n", 1)
		return s + "- {name: now, namespace: default, scope: WorkloadSelector, action: Deny, dryRun: false, rules: " +
			"[[[{destinationPorts: [9000]}]]]}\n"
	}
	asked := 0
	w := newWorldWith(t, func(w *world, i int, o *Options) {
		if i == 1 {
			// The view changes while b asks who the caller is: after its own record was looked up, before the policies are.
			o.Demand = func(context.Context, string) error {
				asked++
				w.know.publish(loadView(t, deny))
				w.proxies[1].Recheck()
				return nil
			}
		}
	})
	reached := false
	w.listen(appB, func(net.Conn) { reached = true })
	if _, _, _, err := w.connect(w.proxies[1].ServePassthrough, "192.0.2.9:4000", "10.91.2.2:9000"); err != errRefused {
		t.Errorf("the connection was admitted: %v", err)
	}
	if asked == 0 || reached {
		t.Errorf("asked %d times, application reached: %v", asked, reached)
	}
}
