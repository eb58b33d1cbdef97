package doctor

import (
	"strings"
	"testing"
)

// A pod that a node agent has handed over by a descriptor has no name that could be opened, however it is captured:
// that is no fault. Seen on a cluster with ztun's agent, where each pod was "gone without a word to ztun".
func TestPodOfAgent(t *testing.T) {
	for name, o := range map[string]Options{"steered": {Steered: t.TempDir()}, "redirected": {Redirected: true}} {
		o.Pods = []PodOptions{{Pod: Pod{Name: "amb/client", State: "Up"}}}
		p, err := pod(t.Context(), o, 0, nil)
		if err != nil || p.NetNS != "" {
			t.Errorf("%s: %+v, %v", name, p, err)
		}
	}
	p, err := pod(t.Context(), Options{Pods: []PodOptions{{Pod: Pod{State: "Up", Ref: "/nowhere"}}}}, 0, nil)
	if err != nil || !strings.Contains(p.NetNS, "/nowhere") {
		t.Errorf("one whose namespace is gone: %+v, %v", p, err)
	}
}
