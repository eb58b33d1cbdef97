package e2e

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"ztun/test/lab"
)

// bins are the two programs under test, built once by TestMain.
var bins struct{ ztun, ztload string }

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == filtered {
		fmt.Fprintln(os.Stderr, "e2e:", execFiltered(os.Args[2:])) // it has not come back otherwise
		os.Exit(1)
	}
	os.Exit(func() int {
		if err := lab.CanRun(); err != nil {
			if os.Getenv("ZTUN_TEST_NOROOT") == "1" {
				fmt.Fprintln(os.Stderr, "e2e: NOTHING WAS TESTED HERE: ZTUN_TEST_NOROOT=1 and", err)
				return 0
			}
			fmt.Fprintln(os.Stderr, "e2e:", err)
			return 1
		}
		dir, err := os.MkdirTemp("", "ztun-e2e-")
		if err != nil {
			fmt.Fprintln(os.Stderr, "e2e:", err)
			return 1
		}
		defer os.RemoveAll(dir)
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
		defer cancel()
		if bins.ztun, err = lab.Build(ctx, dir, "./cmd/ztun"); err == nil {
			bins.ztload, err = lab.Build(ctx, dir, "./test/load/cmd/ztload")
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "e2e:", err)
			return 1
		}
		return m.Run()
	}())
}
