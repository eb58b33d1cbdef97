// Command image writes ztun's container image without Docker: an OCI image layout in one tar file, one image for each
// architecture under one index, nothing in it but the program and its agent, which most nodes do not read.
//
//	image OUT.tar NAME VERSION REVISION ARCH=ZTUN,ZTUN-AGENT...
//
// `ctr -n k8s.io images import OUT.tar`, `podman load -i OUT.tar` and `skopeo copy oci-archive:OUT.tar docker://...`
// take it. The same arguments and binaries give the same bytes: no time is in it but the epoch.
//
// It is a module of its own, so that ztun's own go.mod stays lean.
package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// program is where the binary is in the image; the second name is the one that ztunnel's own manifests may spell out.
// The agent is what `ztun agent` executes.
const (
	program = "usr/local/bin/ztun"
	alias   = "usr/local/bin/ztunnel"
	agent   = "usr/local/bin/ztun-agent"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 5 {
		return errors.New("want OUT.tar NAME VERSION REVISION ARCH=ZTUN,ZTUN-AGENT...")
	}
	out, name, version, revision := args[0], args[1], args[2], args[3]
	labels := map[string]string{
		"org.opencontainers.image.title":    "ztun",
		"org.opencontainers.image.version":  version,
		"org.opencontainers.image.revision": revision,
	}
	// The index of all architectures is itself one entry of the layout's index: that is what importers name.
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, a := range args[4:] {
		arch, paths, _ := strings.Cut(a, "=")
		path, agentPath, ok := strings.Cut(paths, ",")
		if !ok || arch == "" {
			return fmt.Errorf("%q: want ARCH=ZTUN,ZTUN-AGENT", a)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		agentB, err := os.ReadFile(agentPath)
		if err != nil {
			return err
		}
		img, err := image(b, agentB, arch, labels)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{
			Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
	}
	top := mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: index, Descriptor: v1.Descriptor{
		MediaType: types.OCIImageIndex,
		Annotations: map[string]string{
			"org.opencontainers.image.ref.name": version,
			"io.containerd.image.name":          name + ":" + version,
		}}})
	dir, err := os.MkdirTemp("", "ztun-image-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if _, err := layout.Write(dir, top); err != nil {
		return err
	}
	return pack(out, dir)
}

// image is one architecture's: the program, which is the entry point, so that ztunnel's arguments ("proxy ztunnel")
// fit, and its agent.
func image(binary, agent []byte, arch string, labels map[string]string) (v1.Image, error) {
	files, err := layer(binary, agent)
	if err != nil {
		return nil, err
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(files)), nil },
		tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	if img, err = mutate.AppendLayers(img, l); err != nil {
		return nil, err
	}
	c, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	c = c.DeepCopy()
	c.OS, c.Architecture, c.Created = "linux", arch, v1.Time{Time: time.Unix(0, 0).UTC()}
	c.Config.Entrypoint, c.Config.Labels = []string{"/" + program}, labels
	for i := range c.History {
		c.History[i] = v1.History{Created: c.Created, CreatedBy: "scripts/release"}
	}
	return mutate.ConfigFile(img, c)
}

// layer is the file system: the program under both names, the agent, and directories for what is mounted.
func layer(binary, agentBinary []byte) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	epoch := time.Unix(0, 0)
	for _, d := range []string{"usr/", "usr/local/", "usr/local/bin/", "tmp/", "etc/", "var/", "var/run/"} {
		mode := int64(0o755)
		if d == "tmp/" {
			mode = 0o1777
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: d, Mode: mode, ModTime: epoch}); err != nil {
			return nil, err
		}
	}
	for _, f := range []struct {
		name    string
		content []byte
	}{{program, binary}, {agent, agentBinary}} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: f.name, Mode: 0o755, ModTime: epoch,
			Size: int64(len(f.content))}); err != nil {
			return nil, err
		}
		if _, err := w.Write(f.content); err != nil {
			return nil, err
		}
	}
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: alias, Linkname: "ztun", Mode: 0o777,
		ModTime: epoch}); err != nil {
		return nil, err
	}
	err := w.Close()
	return b.Bytes(), err
}

// pack writes dir's files as one tar file, in the order of their names.
func pack(out, dir string) error {
	f, err := os.Create(out)
	if err != nil {
		return err
	}
	w := tar.NewWriter(f)
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		h := &tar.Header{Typeflag: tar.TypeDir, Name: rel + "/", Mode: 0o755, ModTime: time.Unix(0, 0)}
		if d.IsDir() {
			return w.WriteHeader(h)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		h.Typeflag, h.Name, h.Mode, h.Size = tar.TypeReg, rel, 0o644, int64(len(b))
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		_, err = w.Write(b)
		return err
	})
	return errors.Join(err, w.Close(), f.Close())
}
