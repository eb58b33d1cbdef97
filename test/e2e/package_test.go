package e2e

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"ztun/test/lab"
)

// TestDebianPackage makes a package of the program, twice the same, installs it into a root of the test's own, looks
// at what is there, and removes and purges it again: nothing is left. The machine's own packages are not touched.
func TestDebianPackage(t *testing.T) {
	needTool(t, "dpkg-deb")
	needTool(t, "dpkg")
	root, err := lab.Root()
	must(t, err)
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	run := func(name string, args ...string) string {
		t.Helper()
		out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	var packages [2][]byte
	var deb string
	for i := range packages {
		dir := t.TempDir()
		run(filepath.Join(root, "scripts/deb"), bins.ztun, runtime.GOARCH, dir)
		found, err := filepath.Glob(filepath.Join(dir, "ztun_*_"+runtime.GOARCH+".deb"))
		if err != nil || len(found) != 1 {
			t.Fatalf("%q, %v", found, err)
		}
		deb = found[0]
		packages[i], err = os.ReadFile(deb)
		must(t, err)
	}
	if string(packages[0]) != string(packages[1]) {
		t.Error("two packages of one program differ")
	}

	inst := t.TempDir()
	for _, d := range []string{"info", "updates", "triggers"} {
		must(t, os.MkdirAll(filepath.Join(inst, "var/lib/dpkg", d), 0o755))
	}
	must(t, os.WriteFile(filepath.Join(inst, "var/lib/dpkg/status"), nil, 0o644))
	dpkg := func(args ...string) string {
		t.Helper()
		return run("dpkg", append([]string{"--root=" + inst, "--force-script-chrootless", "--log=/dev/null"}, args...)...)
	}
	dpkg("--install", deb)
	if out := run(filepath.Join(inst, "usr/bin/ztun"), "version"); !strings.HasPrefix(out, "ztun ") {
		t.Errorf("the installed program says %q", out)
	}
	unit, err := os.ReadFile(filepath.Join(inst, "usr/lib/systemd/system/ztun.service"))
	must(t, err)
	for _, want := range []string{"ExecStart=/usr/bin/ztun proxy\n", "EnvironmentFile=-/etc/ztun/ztun.env\n"} {
		if !strings.Contains(string(unit), want) {
			t.Errorf("the unit has no %q:\n%s", want, unit)
		}
	}
	if strings.Contains(string(unit), "/usr/local") {
		t.Errorf("the unit is of another place:\n%s", unit)
	}
	for _, page := range []string{"ztun.1.gz", "ztun-proxy.1.gz", "ztun-pod-exec.1.gz"} {
		if out := run("gzip", "-dc", filepath.Join(inst, "usr/share/man/man1", page)); !strings.Contains(out,
			".SH SYNOPSIS") {
			t.Errorf("%s:\n%.300s", page, out)
		}
	}
	// The completion is bash's own business, so bash has to read it.
	if out := run("bash", "-c", ". "+filepath.Join(inst, "usr/share/bash-completion/completions/ztun")+
		"; complete -p ztun"); !strings.Contains(out, "__start_ztun") {
		t.Errorf("completion: %s", out)
	}
	enabled, _ := filepath.Glob(filepath.Join(inst, "etc/systemd/system/*"))
	if len(enabled) > 0 {
		t.Errorf("a daemon without settings is enabled: %q", enabled)
	}

	files := func() (left []string) {
		must(t, filepath.WalkDir(inst, func(path string, d os.DirEntry, err error) error {
			if err == nil && !d.IsDir() && !strings.HasPrefix(path, filepath.Join(inst, "var/lib/dpkg")) {
				left = append(left, strings.TrimPrefix(path, inst))
			}
			return err
		}))
		return left
	}
	// What an operator has written stays at a removal, and goes at a purge.
	must(t, os.WriteFile(filepath.Join(inst, "etc/ztun/ztun.env"), []byte("NODE_NAME=n1\n"), 0o644))
	dpkg("--install", deb)
	if b, err := os.ReadFile(filepath.Join(inst, "etc/ztun/ztun.env")); err != nil || string(b) != "NODE_NAME=n1\n" {
		t.Errorf("settings after a second installation: %q, %v", b, err)
	}
	dpkg("--remove", "ztun")
	if left := files(); len(left) != 1 || left[0] != "/etc/ztun/ztun.env" {
		t.Errorf("after the removal: %q", left)
	}
	dpkg("--purge", "ztun")
	if left := files(); len(left) != 0 {
		t.Errorf("after the purge: %q", left)
	}
}
