package ca

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"strings"
	"sync"
	"time"

	"ztun/proxy/identity"
)

// CRLFile keeps an identity.Revocation at what files say: the operator's (CRL_PATH; spec/dataplane.md 8.6) and the
// one in which Revocations keeps the control plane's list. A fault of one leaves the other in force.
type CRLFile struct {
	rev  *identity.Revocation
	log  *slog.Logger
	wait struct{ settle, poll time.Duration } // of watch

	mu    sync.Mutex
	files []crlPart
	stats CRLStats
}

// crlPart is one file.
type crlPart struct {
	path     string
	optional bool // it need not be there yet
	sum      [sha256.Size]byte
	crl      *identity.CRL // of the last good content, which has sum; nil before
}

// CRLStats is what became of the file.
type CRLStats struct {
	Loads, Failures uint64 // new contents that were put in force; attempts that changed nothing
	Cut             uint64 // tunnels ended by new contents
	LastError       string // of the last attempt; "" if it succeeded
}

// NewCRLFile makes a CRLFile of an operator's file, "": there is none, and of others that need not be there yet. It
// reads nothing yet.
func NewCRLFile(path string, rev *identity.Revocation, log *slog.Logger, also ...string) *CRLFile {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	f := &CRLFile{rev: rev, log: log}
	if path != "" {
		f.files = append(f.files, crlPart{path: path})
	}
	for _, path := range also {
		f.files = append(f.files, crlPart{path: path, optional: true})
	}
	f.wait.settle, f.wait.poll = settle, poll
	return f
}

func (f *CRLFile) paths() []string {
	var all []string
	for _, p := range f.files {
		all = append(all, p.path)
	}
	return all
}

// Load reads the files and puts them in force. What of that fails leaves what is in force, nothing at first: the
// error is logged as a warning and traffic flows (checklist 137); Run tries again when a file changes. Errors name
// the file.
func (f *CRLFile) Load() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	var errs []error
	changed := false
	var all []*identity.CRL
	for i := range f.files {
		p := &f.files[i]
		fresh, err := p.load()
		if err != nil {
			errs = append(errs, err)
		}
		changed = changed || fresh
		all = append(all, p.crl)
	}
	if changed {
		f.replace(identity.MergeCRL(all...))
	}
	err := errors.Join(errs...)
	if err == nil {
		f.stats.LastError = ""
		return nil
	}
	f.stats.Failures++
	if f.stats.LastError != err.Error() {
		state := "what was loaded before stays in force"
		if f.stats.Loads == 0 {
			state = "nothing is revoked"
		}
		if errors.Is(err, fs.ErrNotExist) {
			state += ", the file is read when it appears"
		}
		f.log.Warn("cannot load certificate revocation lists: "+state, "error", err.Error())
	}
	f.stats.LastError = err.Error()
	return err
}

// load reads the file; fresh says that it has other lists than before.
func (p *crlPart) load() (fresh bool, err error) {
	data, err := readBounded(p.path, identity.MaxCRL)
	if p.optional && errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	sum := sha256.Sum256(data)
	if p.crl != nil && sum == p.sum {
		return false, nil
	}
	crl, err := identity.ParseCRL(data)
	if err != nil {
		return false, fmt.Errorf("%s: %w", p.path, err)
	}
	p.crl, p.sum = crl, sum
	return true, nil
}

// replace puts a set in force.
func (f *CRLFile) replace(crl *identity.CRL) {
	cut := f.rev.Replace(crl)
	f.stats.Loads++
	f.stats.Cut += uint64(cut)
	attrs := []any{"path", strings.Join(f.paths(), ", "), "lists", crl.Lists(), "entries", crl.Entries(),
		"tunnelsCut", cut}
	next := crl.NextUpdate()
	if !next.IsZero() {
		attrs = append(attrs, "nextUpdate", next.UTC())
	}
	if !next.IsZero() && time.Now().After(next) {
		f.log.Warn("certificate revocation lists loaded; one is older than it wants to be, and obeyed all the same", attrs...)
	} else {
		f.log.Info("certificate revocation lists loaded", attrs...)
	}
}

// Run loads the files and then whenever one has changed and been left alone for 2 s, until ctx ends; it returns nil.
func (f *CRLFile) Run(ctx context.Context) error {
	// logged, and in Stats
	watch(ctx, f.paths(), identity.MaxCRL, f.log, f.wait.settle, f.wait.poll, func() { _ = f.Load() })
	return nil
}

// Stats returns the counters.
func (f *CRLFile) Stats() CRLStats {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.stats
}
