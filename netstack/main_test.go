package netstack

import (
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"
	"gvisor.dev/gvisor/pkg/refs"
)

// TestMain looks for what the tests have left behind: goroutines, and gVisor's
// reference counted objects (packet buffers, chunks, segments, routes).
func TestMain(m *testing.M) {
	refs.SetLeakMode(refs.LeaksPanic)
	code := m.Run()
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, "goroutines left:", err)
			code = 1
		}
		refs.DoLeakCheck() // panics
	}
	os.Exit(code)
}
