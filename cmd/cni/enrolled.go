package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
)

// MaxEnrolled is the largest file Enrolled that is read, in bytes: some ten thousand pods.
const MaxEnrolled = 4 << 20

// Enrolled is what the agent has last known of the mesh on its node: by it the plugin decides which pods wait while no
// agent answers.
type Enrolled struct {
	// Namespaces are those whose new pods are to be taken for the mesh's: that have the label, or in which pods of the
	// node are enrolled by a label of their own.
	Namespaces []string `json:"namespaces"`
	// Except are the pods in them, as namespace/name, that are known not to be.
	Except []string `json:"except,omitempty"`
}

// Waits reports whether a pod has to wait for the agent.
func (e Enrolled) Waits(namespace, name string) bool {
	return slices.Contains(e.Namespaces, namespace) && !slices.Contains(e.Except, namespace+"/"+name)
}

// encode is the text of the file, the same for the same content.
func (e Enrolled) encode() []byte {
	e.Namespaces, e.Except = sorted(e.Namespaces), sorted(e.Except)
	b, _ := json.MarshalIndent(e, "", "  ") // lists of strings are always marshalled
	return append(b, '\n')
}

func sorted(s []string) []string {
	s = slices.Clone(s)
	slices.Sort(s)
	return slices.Compact(s)
}

// readEnrolled reads the file. Whatever it is not sure of is an error, which names path.
func readEnrolled(path string) (Enrolled, error) {
	f, err := os.Open(path)
	if err != nil {
		return Enrolled{}, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, MaxEnrolled+1))
	if err != nil {
		return Enrolled{}, err
	}
	if len(b) > MaxEnrolled {
		return Enrolled{}, fmt.Errorf("%s: larger than %d bytes", path, MaxEnrolled)
	}
	e, err := parseEnrolled(b)
	if err != nil {
		return Enrolled{}, fmt.Errorf("%s: %w", path, err)
	}
	return e, nil
}

// parseEnrolled is strict: a file that is somebody else's, or of another version of ztun, must not let pods start.
func parseEnrolled(b []byte) (Enrolled, error) {
	var e struct {
		Namespaces *[]string `json:"namespaces"`
		Except     []string  `json:"except"`
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&e); err != nil {
		return Enrolled{}, err
	}
	if e.Namespaces == nil {
		return Enrolled{}, errors.New(`no "namespaces"`)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return Enrolled{}, errors.New("something comes after it")
	}
	return Enrolled{Namespaces: *e.Namespaces, Except: e.Except}, nil
}
