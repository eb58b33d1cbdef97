package control

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"ztun/proxy/identity"
	"ztun/proxy/state"
	"ztun/tun/replace"
)

// A member of the mesh is a node, or a workload that has joined by itself (`ztun run`, a VM): the one is called by its
// NODE_NAME, the other NAMESPACE/NAME, which in names of files is NAMESPACE~NAME. A node's name has neither / nor ~.

func memberBase(member string) string { return strings.ReplaceAll(member, "/", "~") }

func memberFile(member string) string { return memberBase(member) + ".json" }

// memberOf is whose file of that name it is.
func memberOf(file string) string {
	return strings.ReplaceAll(strings.TrimSuffix(file, ".json"), "~", "/")
}

func memberTitle(member string) string {
	if strings.Contains(member, "/") {
		return "workload " + member
	}
	return "node " + member
}

func workloadMember(w *state.Workload) string { return w.Namespace + "/" + w.Name }

// checkMember takes what can be both a Kubernetes name and a file: one part for a node, two for a workload.
func checkMember(name string, workload bool) error {
	if !workload {
		if !isName(name) {
			return fmt.Errorf("node name %q: want up to 200 letters, digits, dots, dashes and underscores", name)
		}
		return nil
	}
	namespace, short, _ := strings.Cut(name, "/")
	if !isName(namespace) || !isName(short) || len(name) > 200 {
		return fmt.Errorf("workload %q: want its record's namespace and name to be letters, digits, dots, dashes and "+
			"underscores, up to 200 of them", name)
	}
	return nil
}

func isName(name string) bool {
	ok := len(name) > 0 && len(name) <= 200 && name[0] != '.' && name[0] != '-'
	for _, c := range []byte(name) {
		ok = ok && (c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '-' || c == '_')
	}
	return ok
}

// findRecord finds the one workload of the mesh that name means: its uid, NAMESPACE/NAME, or its name.
func findRecord(dir, mesh, trustDomain, name string) (*state.Workload, error) {
	if mesh == "" {
		mesh = filepath.Join(dir, meshDir)
	}
	s := newSource(mesh, trustDomain, defaultLimits().message, slog.New(slog.DiscardHandler), newFeed())
	s.load()
	if s.snap == nil {
		return nil, fmt.Errorf("the mesh of %s cannot be read: ztun control check says why", mesh)
	}
	if r := s.snap.addresses.get(name); r != nil && r.workload != nil {
		return r.workload, nil
	}
	var found []*state.Workload
	for _, shard := range s.snap.addresses.shards {
		if shard == nil {
			continue
		}
		for _, r := range *shard {
			if w := r.workload; w != nil && (workloadMember(w) == name || w.Name == name) {
				found = append(found, w)
			}
		}
	}
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("no workload of %s has %q as uid, NAMESPACE/NAME or name: write its record first", mesh, name)
	case 1:
		return found[0], nil
	}
	var all []string
	for _, w := range found {
		all = append(all, fmt.Sprintf("%s (uid %s)", workloadMember(w), w.UID))
	}
	slices.Sort(all)
	return nil, fmt.Errorf("%q may be any of %s: say which by its uid", name, strings.Join(all[:min(len(all), 10)], ", "))
}

// identityOf is whom the snapshot says a workload that has joined to be; false: its record is not there any more.
func (s *snapshot) identityOf(uid string) (identity.ID, bool) {
	if r := s.addresses.get(uid); r != nil && r.workload != nil {
		return r.workload.Identity(), true
	}
	return identity.ID{}, false
}

// own is what runs where a member is: on a node, or the one workload.
func (s *snapshot) own(node, workload string) []*resource {
	if workload == "" {
		if n := s.nodes[node]; n != nil {
			return n.workloads
		}
		return nil
	}
	if r := s.addresses.get(workload); r != nil && r.workload != nil {
		return []*resource{r}
	}
	return nil
}

// Files are the credentials themselves, in PEM but for the token.
type Files struct {
	Root  []byte
	Cert  []byte
	Key   []byte
	Token []byte
}

// write makes the files in dir by put, which is given a path, a mode and the content.
func (f Files) write(dir string, put func(string, fs.FileMode, []byte) error) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for _, x := range []struct {
		name string
		mode fs.FileMode
		data []byte
	}{{RootFile, 0o644, f.Root}, {CertFile, 0o644, f.Cert}, {KeyFile, 0o600, f.Key}, {TokenFile, 0o600, f.Token}} {
		if err := put(filepath.Join(dir, x.name), x.mode, x.data); err != nil {
			return err
		}
	}
	return nil
}

// Bundle is all that a process needs to be one workload of the mesh. It is a directory of the files that a node's
// credentials are, and workload.json beside them; or one file, workload.json with the others in it.
type Bundle struct {
	Address        string       `json:"controlPlane"` // https://host:port
	UID            string       `json:"uid"`
	Namespace      string       `json:"namespace"`
	Name           string       `json:"name"`
	ServiceAccount string       `json:"serviceAccount"`
	TrustDomain    string       `json:"trustDomain"`
	Network        string       `json:"network,omitempty"`
	IPs            []netip.Addr `json:"ips"` // of the record when the workload joined
	Files          Files        `json:"-"`   // of the one file alone
	Dir            string       `json:"-"`   // of the others
}

// bundleFile is workload.json.
type bundleFile struct {
	Bundle
	Root  string `json:"rootCert,omitempty"`
	Cert  string `json:"certChain,omitempty"`
	Key   string `json:"key,omitempty"`
	Token string `json:"token,omitempty"`
}

// Write makes the bundle at path: one file (0600) if that ends in .json, a directory (0700) otherwise.
func (b *Bundle) Write(path string) error {
	f := bundleFile{Bundle: *b}
	one := filepath.Ext(path) == ".json"
	if one {
		f.Root, f.Cert = string(b.Files.Root), string(b.Files.Cert)
		f.Key, f.Token = string(b.Files.Key), string(b.Files.Token)
	} else if err := b.Files.write(path, replace.File); err != nil {
		return err
	}
	text, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		return err
	}
	if one {
		return replace.File(path, 0o600, append(text, '\n'))
	}
	return replace.File(filepath.Join(path, BundleFile), 0o644, append(text, '\n'))
}

// ReadBundle reads what Join has written for a workload. Of a directory Dir is set, of one file Files.
func ReadBundle(path string) (*Bundle, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	dir, file := "", path
	if info.IsDir() {
		dir, file = path, filepath.Join(path, BundleFile)
	}
	text, err := readFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s has no %s: `ztun control join --workload` makes such a directory", path, BundleFile)
	}
	if err != nil {
		return nil, err
	}
	var f bundleFile
	if err := json.Unmarshal(text, &f); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	b := f.Bundle
	if b.Namespace == "" || b.Name == "" || b.ServiceAccount == "" {
		return nil, fmt.Errorf("%s names no workload: `ztun control join --workload` makes such a file", file)
	}
	b.Dir = dir
	if dir == "" {
		b.Files = Files{Root: []byte(f.Root), Cert: []byte(f.Cert), Key: []byte(f.Key), Token: []byte(f.Token)}
		if f.Root == "" || f.Token == "" && (f.Cert == "" || f.Key == "") {
			return nil, fmt.Errorf("%s has no credentials: name the directory that it is from, or have ztun control join "+
				"write to a file that ends in .json", file)
		}
	}
	return &b, nil
}

// Unpack writes the credentials of a bundle that is one file to a directory, from which they can be used and where they
// are renewed.
func (b *Bundle) Unpack(dir string) error {
	return b.Files.write(dir, func(path string, mode fs.FileMode, data []byte) error {
		return os.WriteFile(path, data, mode)
	})
}
