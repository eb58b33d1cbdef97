package lab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// Root is the top of the repository: the nearest folder above the working directory whose go.mod is of module ztun.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		b, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && len(b) > 12 && string(b[:12]) == "module ztun\n" {
			return dir, nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", fmt.Errorf("no go.mod of module ztun above the working directory")
		}
		dir = up
	}
}

// Build builds a command of this repository ("./cmd/ztun", "./test/load/cmd/ztload") into dir and returns the
// binary's path. The environment may name a ready binary: ZTUN_BIN for ./cmd/ztun.
func Build(ctx context.Context, dir, pkg string, flags ...string) (string, error) {
	if bin := os.Getenv("ZTUN_BIN"); bin != "" && pkg == "./cmd/ztun" {
		return filepath.Abs(bin)
	}
	root, err := Root()
	if err != nil {
		return "", err
	}
	out := filepath.Join(dir, filepath.Base(pkg))
	args := append([]string{"build", "-buildvcs=false", "-o", out}, flags...)
	cmd := exec.CommandContext(ctx, "go", append(args, pkg)...)
	cmd.Dir = root
	if b, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build %s: %w\n%s", pkg, err, b)
	}
	return out, nil
}
