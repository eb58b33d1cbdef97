package main

import (
	"os"
	"path/filepath"
	"testing"

	"ztun/cmd/cni"
)

// TestIsPlugin: the name that the installed copy has makes the program the plugin, and no other does.
func TestIsPlugin(t *testing.T) {
	for name, want := range map[string]bool{"/opt/cni/bin/ztun-cni": true, "ztun-cni": true, "ztun": false,
		"/usr/local/bin/ztunnel": false, "/opt/ztun-cni/ztun": false} {
		if got := isPlugin([]string{name}); got != want {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
	if isPlugin(nil) {
		t.Error("a program without a name")
	}
}

// TestCNIUninstall: the command takes out what an agent has installed, and nothing else.
func TestCNIUninstall(t *testing.T) {
	conf, bin := t.TempDir(), t.TempDir()
	list := filepath.Join(conf, "10-x.conflist")
	text := `{"cniVersion":"1.0.0","name":"n","plugins":[ {"type":"ptp"} ]}`
	with, _, err := cni.Insert([]byte(text), cni.Entry{Socket: "/s", Enrolled: "/e"})
	if err != nil {
		t.Fatal(err)
	}
	for path, b := range map[string][]byte{list: with, filepath.Join(bin, cni.PluginType): []byte("x"),
		filepath.Join(bin, "ptp"): []byte("y")} {
		if err := os.WriteFile(path, b, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := run(t, "cni", "uninstall", "--cni-conf-dir", conf, "--cni-bin-dir", bin); err != nil || out != "" {
		t.Fatalf("%v, %s", err, out)
	}
	if got, err := os.ReadFile(list); err != nil || string(got) != text {
		t.Errorf("%s, %v; want %s", got, err, text)
	}
	if left, err := os.ReadDir(bin); err != nil || len(left) != 1 || left[0].Name() != "ptp" {
		t.Errorf("%v, %v", left, err)
	}
}
