package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// maxMeshConfig bounds what is read of a mesh configuration, bytes.
const maxMeshConfig = 4 << 20

// proxyConfig is the part of Istio's ProxyConfig that a node proxy reads; the rest is ignored (spec
// controlplane 1.1). nil is what is absent.
type proxyConfig struct {
	DiscoveryAddress *string     `yaml:"discoveryAddress"`
	ProxyAdminPort   *uint16     `yaml:"proxyAdminPort"`
	StatsPort        *uint16     `yaml:"statsPort"`
	Concurrency      *uint16     `yaml:"concurrency"`
	ProxyMetadata    metadataMap `yaml:"proxyMetadata"`
}

// metadataMap takes strings only. An unquoted true or 1 is an error, as in ztunnel and in istiod: what it
// would turn into is anybody's guess. (2026-11-23: that proxyMetadata is absent is none, unlike in ztunnel,
// where such a ProxyConfig is refused.)
type metadataMap map[string]string

// UnmarshalYAML reads the map of a ProxyConfig.
func (m *metadataMap) UnmarshalYAML(n *yaml.Node) error {
	if n.Kind != yaml.MappingNode {
		return fmt.Errorf("line %d: proxyMetadata: want a map of strings", n.Line)
	}
	*m = metadataMap{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := plainNode(n.Content[i]), plainNode(n.Content[i+1])
		// The parser takes an unquoted date for more than text.
		if tag := value.ShortTag(); key.Kind != yaml.ScalarNode || value.Kind != yaml.ScalarNode || tag != "!!str" &&
			tag != "!!timestamp" {
			return fmt.Errorf("line %d: proxyMetadata.%s: want a string; put it in quotes", value.Line, key.Value)
		}
		(*m)[key.Value] = value.Value
	}
	return nil
}

func plainNode(n *yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode && n.Alias != nil {
		return n.Alias
	}
	return n
}

// parseProxyConfig reads PROXY_CONFIG: YAML, of which JSON is a part. "" is none.
func parseProxyConfig(text string) (proxyConfig, error) {
	var p proxyConfig
	err := decodeYAML(strings.NewReader(text), &p)
	return p, err
}

// parseMeshConfig reads the defaultConfig of Istio's MeshConfig.
func parseMeshConfig(text []byte) (proxyConfig, error) {
	var m struct {
		DefaultConfig proxyConfig `yaml:"defaultConfig"`
	}
	err := decodeYAML(bytes.NewReader(text), &m)
	return m.DefaultConfig, err
}

// decodeYAML reads one document or none. What follows one is an error and not ignored: it was meant to be read.
func decodeYAML(r io.Reader, into any) error {
	d := yaml.NewDecoder(r)
	if err := d.Decode(into); err != nil {
		if errors.Is(err, io.EOF) {
			return nil
		}
		return err
	}
	var more yaml.Node
	if err := d.Decode(&more); !errors.Is(err, io.EOF) {
		return errors.New("yaml: more than one document")
	}
	return nil
}

// over puts p over base: its values win, its metadata key by key.
func (p proxyConfig) over(base proxyConfig) proxyConfig {
	if p.DiscoveryAddress == nil {
		p.DiscoveryAddress = base.DiscoveryAddress
	}
	if p.ProxyAdminPort == nil {
		p.ProxyAdminPort = base.ProxyAdminPort
	}
	if p.StatsPort == nil {
		p.StatsPort = base.StatsPort
	}
	if p.Concurrency == nil {
		p.Concurrency = base.Concurrency
	}
	meta := metadataMap{}
	maps.Copy(meta, base.ProxyMetadata)
	maps.Copy(meta, p.ProxyMetadata)
	p.ProxyMetadata = meta
	return p
}

// readMeshConfig reads the mesh configuration. Only a file that somebody named must exist.
func readMeshConfig(path string, must bool) (proxyConfig, error) {
	if path == "" {
		return proxyConfig{}, nil
	}
	f, err := os.Open(path)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) && !must {
			return proxyConfig{}, nil
		}
		// The default is below the working directory, which may be one that we cannot look into.
		if _, here := os.Stat("./."); errors.Is(here, fs.ErrPermission) && !must {
			return proxyConfig{}, nil
		}
		return proxyConfig{}, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxMeshConfig+1))
	if err != nil {
		return proxyConfig{}, err
	}
	if len(text) > maxMeshConfig {
		return proxyConfig{}, fmt.Errorf("larger than %d MiB", maxMeshConfig>>20)
	}
	return parseMeshConfig(text)
}

// proxyMetadata is what the control plane learns about this proxy: the metadata of ProxyConfig, whose keys
// may carry ISTIO_META_ as the variables do, under those variables. Where ProxyConfig has a key with the
// prefix and without, the one with it wins.
func proxyMetadata(config, env map[string]string) map[string]string {
	out := map[string]string{}
	for _, prefixed := range []bool{false, true} {
		for _, k := range slices.Sorted(maps.Keys(config)) {
			if key, ok := strings.CutPrefix(k, "ISTIO_META_"); ok == prefixed {
				out[key] = config[k]
			}
		}
	}
	maps.Copy(out, env)
	return out
}
