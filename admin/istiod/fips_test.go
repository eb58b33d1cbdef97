package istiod

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestFIPS makes the connections of TestConnection in processes where Go's FIPS 140-3 module is in charge: the mode can
// only be chosen when a process starts.
func TestFIPS(t *testing.T) {
	for _, mode := range []string{"on", "only"} {
		t.Run(mode, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^(TestConnection|TestMetadata)$", "-test.v",
				"-test.timeout=60s")
			cmd.Env = append(os.Environ(), "GODEBUG=fips140="+mode)
			out, err := cmd.CombinedOutput()
			for _, want := range []string{"--- PASS: TestConnection/post-quantum", "--- PASS: TestMetadata"} {
				if err != nil || !strings.Contains(string(out), want) {
					t.Fatalf("%v, want %q in:\n%s", err, want, out)
				}
			}
		})
	}
}
