package xds

import (
	"iter"
	"strconv"
)

// retained is the names that the client holds resources of, with their versions
// as the server last said them: what it tells the server after a reconnect.
//
// istiod's versions are 64-bit numbers in hex; kept as numbers they cost half as
// much. Other texts are kept as they are.
type retained struct {
	hex  map[string]uint64
	text map[string]string
}

func (r *retained) set(name string, version []byte) {
	if n, err := strconv.ParseUint(string(version), 16, 64); err == nil && strconv.FormatUint(n, 16) == string(version) {
		if r.hex == nil {
			r.hex = make(map[string]uint64)
		}
		delete(r.text, name)
		r.hex[name] = n
		return
	}
	if r.text == nil {
		r.text = make(map[string]string)
	}
	delete(r.hex, name)
	r.text[name] = string(version)
}

func (r *retained) has(name string) bool {
	if _, ok := r.hex[name]; ok {
		return true
	}
	_, ok := r.text[name]
	return ok
}

func (r *retained) del(name string) {
	delete(r.hex, name)
	delete(r.text, name)
}

func (r *retained) len() int { return len(r.hex) + len(r.text) }

func (r *retained) all() iter.Seq2[string, string] {
	return func(yield func(name, version string) bool) {
		for name, n := range r.hex {
			if !yield(name, strconv.FormatUint(n, 16)) {
				return
			}
		}
		for name, v := range r.text {
			if !yield(name, v) {
				return
			}
		}
	}
}

// forgetVersions keeps the names, so that the server sends everything anew.
func (r *retained) forgetVersions() {
	text := make(map[string]string, r.len())
	for name := range r.all() {
		text[name] = ""
	}
	*r = retained{text: text}
}
