package ambient

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	istiolog "istio.io/istio/pkg/log"

	"ztun/test/istio/fakeistiod"
	"ztun/test/lab"
)

// ztun is the program under test, built once by TestMain.
var ztun string

func TestMain(m *testing.M) {
	if err := fakeistiod.Exec(); err != nil {
		fmt.Fprintln(os.Stderr, "ambient:", err)
		os.Exit(1)
	}
	os.Exit(func() int {
		level := istiolog.NoneLevel // istiod tells a page per push
		if os.Getenv("ZTUN_TEST_ISTIO_LOG") != "" {
			level = istiolog.DebugLevel
		}
		for _, s := range istiolog.Scopes() {
			s.SetOutputLevel(level)
		}
		dir, err := os.MkdirTemp("", "ztun-istio-")
		if err == nil {
			defer os.RemoveAll(dir)
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
			defer cancel()
			ztun, err = lab.Build(ctx, dir, "./cmd/ztun")
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "ambient:", err)
			return 1
		}
		return m.Run()
	}())
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func stderrOf(err error) string {
	var e *exec.ExitError
	if errors.As(err, &e) {
		return string(e.Stderr)
	}
	return ""
}

// eventually polls until f is content; what it said last is the failure.
func eventually(t testing.TB, limit time.Duration, f func() error) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v: %v", limit, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
