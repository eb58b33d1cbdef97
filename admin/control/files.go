package control

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"ztun/admin/xds"
)

// Bounds of a directory. The YAML library needs some twenty times the size of the file that it is parsing.
const (
	maxFiles     = 10_000
	maxDirs      = 1_000
	maxFileSize  = 64 << 20 // bytes
	maxTotalSize = 512 << 20
)

// Problem is one thing that is wrong with the directory.
type Problem struct {
	File string `json:"file,omitempty"` // relative to the directory
	Line int    `json:"line,omitempty"` // from 1; 0 if unknown
	Key  string `json:"key,omitempty"`  // where in the file: workloads[3].protocol
	Text string `json:"text"`
}

// String prints "file:12: workloads[3].protocol: text".
func (p Problem) String() string {
	s := p.Text
	if p.Key != "" {
		s = p.Key + ": " + s
	}
	switch {
	case p.File != "" && p.Line > 0:
		return p.File + ":" + strconv.Itoa(p.Line) + ": " + s
	case p.File != "":
		return p.File + ": " + s
	}
	return s
}

// stamp is what tells that a file has not changed, together with an age that its clock can resolve.
type stamp struct {
	size  int64
	mtime time.Time
}

// file is one file as it was read last. Immutable, but for lines.
type file struct {
	path     string // relative
	full     string
	stamp    stamp
	settled  bool // the stamp was old enough when the file was read to be relied on
	sum      [sha256.Size]byte
	local    *xds.Local // nil if there are problems
	problems []Problem
	encoded  []*resource // of workloads, services, policies, in this order
	lines    map[string][]int
}

// reader reads a directory again and again and keeps what has not changed. It belongs to one goroutine.
type reader struct {
	root        string
	trustDomain string // of workloads that name none
	files       map[string]*file
	dirs        []string // all directories, for the watcher
}

// read returns the directory's files in order of their names, those that could not be read or parsed among them, and
// what is wrong with the directory itself.
func (r *reader) read() (files []*file, problems []Problem) {
	seen := make(map[string]*file, len(r.files))
	r.dirs = r.dirs[:0]
	total := int64(0)
	complain := func(path, format string, args ...any) {
		if path == "." {
			path = ""
		}
		problems = append(problems, Problem{File: path, Text: fmt.Sprintf(format, args...)})
	}
	// A link may lead somewhere else the next time.
	root, err := filepath.EvalSymlinks(r.root)
	if err != nil {
		complain("", "%v", err)
		return nil, problems
	}
	walk := func(full string, d fs.DirEntry, err error) error {
		rel, relErr := filepath.Rel(root, full)
		if relErr != nil {
			rel = full
		}
		if err != nil {
			complain(rel, "%v", plain(err))
			return nil
		}
		// Hidden names are editors' and Kubernetes' own: the volume behind ..data is seen through its links.
		if rel != "." && strings.HasPrefix(d.Name(), ".") {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if d.IsDir() {
			if len(r.dirs) == maxDirs {
				complain(rel, "more than %d directories", maxDirs)
				return fs.SkipAll
			}
			r.dirs = append(r.dirs, full)
			return nil
		}
		if !isSource(d.Name()) {
			return nil
		}
		info, err := os.Stat(full) // follows links
		switch {
		case errors.Is(err, fs.ErrNotExist) && d.Type()&fs.ModeSymlink == 0:
			return nil // gone since it was listed
		case err != nil:
			complain(rel, "%v", plain(err))
			return nil
		case !info.Mode().IsRegular():
			complain(rel, "not a regular file")
			return nil
		case len(files) == maxFiles:
			complain(rel, "more than %d files", maxFiles)
			return fs.SkipAll
		}
		if total += info.Size(); total > maxTotalSize {
			complain(rel, "the files are larger than %d MiB together", maxTotalSize>>20)
			return fs.SkipAll
		}
		f := r.load(rel, full, info)
		seen[rel] = f
		files = append(files, f)
		return nil
	}
	if err := filepath.WalkDir(root, walk); err != nil {
		complain("", "%v", err)
	}
	if len(files) == 0 && len(problems) == 0 {
		complain("", `no *.yaml, *.yml or *.json file in %s (a file with "{}" in it says that nothing exists)`, r.root)
	}
	r.files = seen
	return files, problems
}

func isSource(name string) bool {
	switch filepath.Ext(name) {
	case ".yaml", ".yml", ".json":
		return true
	}
	return false
}

// plain drops the path from an error: it is said already.
func plain(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// load returns what is in a file: what it was if it has not changed.
func (r *reader) load(rel, full string, info fs.FileInfo) *file {
	old := r.files[rel]
	now := stamp{info.Size(), info.ModTime()}
	if old != nil && old.settled && old.stamp == now {
		return old
	}
	f := &file{path: rel, full: full, stamp: now, settled: time.Since(now.mtime) > 2*time.Second}
	data, err := readFile(full)
	if err != nil {
		f.settled = false // look again
		f.problems = []Problem{{File: rel, Text: plain(err).Error()}}
		if old != nil && len(old.problems) == 1 && old.problems[0] == f.problems[0] {
			return old
		}
		return f
	}
	f.sum = sha256.Sum256(data)
	if old != nil && old.sum == f.sum {
		old.stamp, old.settled = f.stamp, f.settled
		return old
	}
	if f.local, err = xds.ParseLocal(data); err == nil {
		err = f.encode(r.trustDomain)
	}
	if err != nil {
		f.local = nil
		f.problems = fileProblems(rel, err)
	}
	return f
}

func readFile(path string) ([]byte, error) {
	r, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	data, err := io.ReadAll(io.LimitReader(r, maxFileSize+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxFileSize {
		return nil, fmt.Errorf("larger than %d MiB: split it", maxFileSize>>20)
	}
	return data, nil
}

func fileProblems(path string, err error) []Problem {
	var fe *xds.FileError
	if !errors.As(err, &fe) {
		return []Problem{{File: path, Text: err.Error()}}
	}
	out := make([]Problem, len(fe.Problems))
	for i, p := range fe.Problems {
		out[i] = Problem{File: path, Line: p.Line, Key: p.Key, Text: p.Text}
	}
	return out
}

// encode applies xDS's defaults and makes the file's resources.
func (f *file) encode(trustDomain string) error {
	for i, w := range f.local.Workloads {
		w.TrustDomain = cmp.Or(w.TrustDomain, trustDomain)
		w.ServiceAccount = cmp.Or(w.ServiceAccount, defaultServiceAccount)
		w.ClusterID = cmp.Or(w.ClusterID, defaultCluster)
		w.Unlisted = false // xDS knows no such thing
		r, err := newResource(w.UID, EncodeWorkload(w))
		if err != nil {
			return fmt.Errorf("workloads[%d]: %w", i, err)
		}
		r.workload = w
		f.encoded = append(f.encoded, r)
	}
	for i, s := range f.local.Services {
		r, err := newResource(s.Key().String(), EncodeService(s))
		if err != nil {
			return fmt.Errorf("services[%d]: %w", i, err)
		}
		r.service = s
		f.encoded = append(f.encoded, r)
	}
	for i, p := range f.local.Policies {
		r, err := newResource(p.Key, EncodePolicy(p))
		if err != nil {
			return fmt.Errorf("policies[%d]: %w", i, err)
		}
		r.policy = p
		f.encoded = append(f.encoded, r)
	}
	return nil
}

// line finds where an entry of a list ("workloads", 3) begins; 0 if the file has changed. The file is read once more,
// when first asked: values do not remember their lines, and problems over several files are rare.
func (f *file) line(section string, index int) int {
	if f.lines == nil {
		f.lines = make(map[string][]int)
		data, err := readFile(f.full)
		if err == nil && sha256.Sum256(data) == f.sum {
			f.lines = entryLines(data)
		}
	}
	if l := f.lines[section]; index < len(l) {
		return l[index]
	}
	return 0
}

// entryLines lists the lines on which the entries of the lists of a map begin.
func entryLines(data []byte) map[string][]int {
	out := make(map[string][]int)
	var doc yaml.Node
	if yaml.Unmarshal(data, &doc) != nil || len(doc.Content) == 0 {
		return out
	}
	top := doc.Content[0]
	for i := 0; i+1 < len(top.Content); i += 2 {
		list := top.Content[i+1]
		if list.Kind == yaml.AliasNode {
			list = list.Alias
		}
		for _, e := range list.Content {
			out[top.Content[i].Value] = append(out[top.Content[i].Value], e.Line)
		}
	}
	return out
}
