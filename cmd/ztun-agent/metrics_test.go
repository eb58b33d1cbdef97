package main

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// Names of metrics are an interface: docs/agent.md has them, and no others.
func TestMetrics(t *testing.T) {
	page, err := os.ReadFile("../../docs/agent.md")
	if err != nil {
		t.Fatal(err)
	}
	var want strings.Builder
	for _, m := range metrics() {
		if !strings.HasPrefix(m.name, "ztun_agent_") || m.help == "" {
			t.Errorf("%+v", m)
		}
		m.get(&figures{})
		fmt.Fprintf(&want, "| `%s` | %s |\n", m.name, m.help)
	}
	var got strings.Builder
	for line := range strings.Lines(string(page)) {
		if strings.HasPrefix(line, "| `ztun_agent_") {
			got.WriteString(line)
		}
	}
	if got.String() != want.String() {
		t.Errorf("docs/agent.md has\n%s\nwant\n%s", &got, &want)
	}
}
