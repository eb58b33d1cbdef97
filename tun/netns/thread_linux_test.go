package netns

import (
	"os"
	"runtime"
	"testing"
)

// Making namespaces leaves the process's first thread where it was, by which others find the process's namespace. Seen
// on a cluster: kubectl exec into the daemon's container came into a namespace without a way out.
func TestNewLeavesTheProcess(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // the first thread works, too
	where := func() string {
		t.Helper()
		at, err := os.Readlink("/proc/self/ns/net")
		if err != nil {
			t.Fatal(err)
		}
		return at
	}
	before := where()
	for range 64 {
		f, err := New()
		if os.IsPermission(err) && os.Getenv("ZTUN_TEST_NOROOT") == "1" {
			t.Skip(err)
		}
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	if now := where(); now != before {
		t.Errorf("the process was in %s and is in %s", before, now)
	}
}
