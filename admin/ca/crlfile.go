package ca

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"sync"
	"time"

	"ztun/proxy/identity"
)

// CRLFile keeps an identity.Revocation at what a file says (CRL_PATH; spec/dataplane.md 8.6).
type CRLFile struct {
	path string
	rev  *identity.Revocation
	log  *slog.Logger
	wait struct{ settle, poll time.Duration } // of watch

	mu    sync.Mutex
	sum   [sha256.Size]byte // of what is in force
	stats CRLStats
}

// CRLStats is what became of the file.
type CRLStats struct {
	Loads, Failures uint64 // new contents that were put in force; attempts that changed nothing
	Cut             uint64 // tunnels ended by new contents
	LastError       string // of the last attempt; "" if it succeeded
}

// NewCRLFile makes a CRLFile. It reads nothing yet.
func NewCRLFile(path string, rev *identity.Revocation, log *slog.Logger) *CRLFile {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	f := &CRLFile{path: path, rev: rev, log: log}
	f.wait.settle, f.wait.poll = settle, poll
	return f
}

// Load reads the file and puts it in force. If that fails, what is in force stays, nothing at first: the error is
// logged as a warning and traffic flows (checklist 137); Run tries again when the file changes. Errors name the file.
func (f *CRLFile) Load() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	data, err := readBounded(f.path, identity.MaxCRL)
	sum := sha256.Sum256(data)
	if err == nil && f.stats.Loads > 0 && sum == f.sum {
		f.stats.LastError = ""
		return nil
	}
	var crl *identity.CRL
	if err == nil {
		if crl, err = identity.ParseCRL(data); err != nil {
			err = fmt.Errorf("%s: %w", f.path, err)
		}
	}
	if err != nil {
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
	cut := f.rev.Replace(crl)
	f.sum = sum
	f.stats.Loads++
	f.stats.Cut += uint64(cut)
	f.stats.LastError = ""
	attrs := []any{"path", f.path, "lists", crl.Lists(), "entries", crl.Entries(), "tunnelsCut", cut}
	next := crl.NextUpdate()
	if !next.IsZero() {
		attrs = append(attrs, "nextUpdate", next.UTC())
	}
	if !next.IsZero() && time.Now().After(next) {
		f.log.Warn("certificate revocation lists loaded; one is older than it wants to be, and obeyed all the same", attrs...)
	} else {
		f.log.Info("certificate revocation lists loaded", attrs...)
	}
	return nil
}

// Run loads the file and then whenever it has changed and been left alone for 2 s, until ctx ends; it returns nil.
func (f *CRLFile) Run(ctx context.Context) error {
	watch(ctx, []string{f.path}, identity.MaxCRL, f.log, f.wait.settle, f.wait.poll, func() { _ = f.Load() }) // logged, and in Stats
	return nil
}

// Stats returns the counters.
func (f *CRLFile) Stats() CRLStats {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.stats
}
