package main

import (
	"strings"
	"testing"
)

// Where only ztun was copied to, it says what is missing.
func TestAgentIsBeside(t *testing.T) {
	_, err := run(t, "agent", "--node", "n1")
	if err == nil || !strings.Contains(err.Error(), "/ztun-agent: it comes with the container image") {
		t.Error(err)
	}
	if _, err := run(t, "agent", "x"); err == nil || !strings.Contains(err.Error(), "takes no argument") {
		t.Error(err)
	}
}
