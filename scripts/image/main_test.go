package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

// unpack extracts a tar file of files and directories.
func unpack(t *testing.T, path string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return dir
		}
		if err != nil {
			t.Fatal(err)
		}
		to := filepath.Join(dir, h.Name)
		if h.Typeflag == tar.TypeDir {
			err = os.MkdirAll(to, 0o755)
		} else {
			var b []byte
			if b, err = io.ReadAll(r); err == nil {
				err = os.WriteFile(to, b, 0o644)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestImage: what is written is a valid layout with one image for each architecture, in which the program is, and is
// started with ztunnel's arguments; the same input gives the same bytes.
func TestImage(t *testing.T) {
	d := t.TempDir()
	amd, arm, agents := filepath.Join(d, "amd"), filepath.Join(d, "arm"), filepath.Join(d, "agent")
	want := map[string]string{"amd64": "one program", "arm64": "another program"}
	for path, text := range map[string]string{amd: want["amd64"], arm: want["arm64"], agents: "an agent"} {
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var outs [2][]byte
	for i := range outs {
		out := filepath.Join(d, "out.tar")
		if err := run([]string{out, "localhost/ztun", "1.2.3", "abc", "amd64=" + amd + "," + agents,
			"arm64=" + arm + "," + agents}); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		outs[i] = b
	}
	if !bytes.Equal(outs[0], outs[1]) {
		t.Error("the same input gave other bytes")
	}
	top, err := layout.ImageIndexFromPath(unpack(t, filepath.Join(d, "out.tar")))
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(top); err != nil {
		t.Fatal(err)
	}
	tm, err := top.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(tm.Manifests) != 1 || tm.Manifests[0].Annotations["io.containerd.image.name"] != "localhost/ztun:1.2.3" {
		t.Fatalf("manifest %+v", tm)
	}
	index, err := top.ImageIndex(tm.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	m, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Manifests) != len(want) {
		t.Fatalf("%d images", len(m.Manifests))
	}
	for _, e := range m.Manifests {
		img, err := index.Image(e.Digest)
		if err != nil {
			t.Fatal(err)
		}
		c, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		arch := e.Platform.Architecture
		if !slices.Equal(c.Config.Entrypoint, []string{"/usr/local/bin/ztun"}) || c.Architecture != arch ||
			c.Config.Labels["org.opencontainers.image.revision"] != "abc" {
			t.Errorf("%s: config %+v", arch, c)
		}
		files := map[string]string{}
		rc := mutate.Extract(img)
		for r := tar.NewReader(rc); ; {
			h, err := r.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			b, _ := io.ReadAll(r)
			files[strings.TrimSuffix(h.Name, "/")] = h.Linkname + string(b)
		}
		rc.Close()
		if files["usr/local/bin/ztun"] != want[arch] || files["usr/local/bin/ztunnel"] != "ztun" ||
			files["usr/local/bin/ztun-agent"] != "an agent" {
			t.Errorf("%s: files %q", arch, files)
		}
	}
}

func TestArguments(t *testing.T) {
	for _, args := range [][]string{{}, {"o", "n", "v", "r", "amd64"}, {"o", "n", "v", "r", "amd64=/bin/sh"},
		{"o", "n", "v", "r", "amd64=/no/such/file,/bin/sh"}, {"o", "n", "v", "r", "amd64=/bin/sh,/no/such/file"}} {
		if err := run(args); err == nil {
			t.Errorf("%q: no error", args)
		}
	}
}

// TestDockerfile: who builds with Docker gets the same names and the same entry point.
func TestDockerfile(t *testing.T) {
	b, err := os.ReadFile("Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	_, last, ok := strings.Cut(string(b), "\nFROM scratch\n")
	if !ok || !strings.HasSuffix(last, "\nENTRYPOINT [\"/"+program+"\"]\n") {
		t.Errorf("the last stage is not scratch, or does not start /%s:\n%s", program, last)
	}
	for _, want := range []string{"-o /root-of-image/usr/local/bin/ ./cmd/ztun ./cmd/ztun-agent", "ln -s ztun /root-of-image/" + alias,
		"CGO_ENABLED=0", "-trimpath", "-s -w -buildid= -X main.linkedRevision=", "chmod 1777 /root-of-image/tmp"} {
		if !strings.Contains(string(b), want) {
			t.Errorf("nothing of %q", want)
		}
	}
}
