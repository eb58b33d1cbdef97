package ca

import (
	"context"
	"crypto/x509"
	"log/slog"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"ztun/proxy/identity"
)

// Dir is the Signer of LOCAL_CA_DIR: a Local that is read again when a file of its directory changes, so that a root or
// a key can be replaced while it runs. Safe for concurrent use.
type Dir struct {
	path string
	log  *slog.Logger
	wait struct{ settle, poll time.Duration } // of watch

	now atomic.Pointer[Local]
}

// OpenDir reads the directory; see LoadDir. It says in the log which root is in use.
func OpenDir(path string, log *slog.Logger) (*Dir, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	d := &Dir{path: path, log: log}
	d.wait.settle, d.wait.poll = settle, poll
	if _, err := d.load(); err != nil {
		return nil, err
	}
	return d, nil
}

// load reads the directory, and reports whether there is something else in it than before.
func (d *Dir) load() (changed bool, err error) {
	l, err := LoadDir(d.path)
	if err != nil {
		return false, err
	}
	if old := d.now.Load(); old != nil && old.cert.Equal(l.cert) && samePublicKey(l.cert, old.key) &&
		slices.EqualFunc(old.chain, l.chain, (*x509.Certificate).Equal) && sumOf(old.roots) == sumOf(l.roots) {
		return false, nil
	}
	for _, w := range l.Warnings() {
		d.log.Warn(w)
	}
	d.log.Info("local CA", "path", d.path, "signer", Describe(l.cert), "roots", describeAll(l.roots), "trustDomain",
		l.trustDomain)
	d.now.Store(l)
	return true, nil
}

// TrustDomain is that of Local.
func (d *Dir) TrustDomain() string { return d.now.Load().TrustDomain() }

// Sign is that of the Local that the directory holds, or held when it was last in order.
func (d *Dir) Sign(ctx context.Context, id identity.ID, csr []byte, ttl time.Duration) (chain,
	roots []*x509.Certificate, err error) {
	return d.now.Load().Sign(ctx, id, csr, ttl)
}

// Run reads the directory again when it has changed and been left alone for 2 s, until ctx ends, and calls changed if
// there is something else in it; it returns nil. What cannot be used is said in the log, and what was read before goes
// on to be used.
func (d *Dir) Run(ctx context.Context, changed func()) error {
	var files []string
	for _, name := range []string{rootFile, keyFile, certFile, chainFile} {
		files = append(files, filepath.Join(d.path, name))
	}
	watch(ctx, files, maxFile, d.log, d.wait.settle, d.wait.poll, func() {
		switch other, err := d.load(); {
		case err != nil:
			d.log.Warn("the local CA has changed and cannot be used; going on with what was read before", "error", err.Error())
		case other:
			changed()
		}
	})
	return nil
}
