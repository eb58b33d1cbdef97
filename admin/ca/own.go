package ca

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"ztun/proxy/identity"
	"ztun/tun/replace"
)

// OwnOptions configure an Own.
type OwnOptions struct {
	Connector         Connector
	CertFile, KeyFile string // PEM, as `ztun control join` wrote them; the connector reads them, too
	Logger            *slog.Logger
}

// Own renews the client certificate that this node shows `ztun control`, in the file where that is. The key stays: the
// control plane knows the node by it.
type Own struct {
	o    OwnOptions
	wait struct{ first, most time.Duration } // between attempts, and between looks
}

// NewOwn makes an Own; let Run run.
func NewOwn(o OwnOptions) *Own {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	w := &Own{o: o}
	w.wait.first, w.wait.most = time.Minute, time.Hour
	return w
}

// Run renews the certificate when two thirds of its life are over, and tries again until it has; until ctx ends. It
// returns nil.
func (w *Own) Run(ctx context.Context) error {
	wait := w.wait.first
	for {
		pause, err := w.renewIfDue(ctx)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			w.o.Logger.Warn("this node's client certificate cannot be renewed", "file", w.o.CertFile, "error", clip(err.Error()))
			pause, wait = wait, min(2*wait, w.wait.most)
		} else {
			wait, pause = w.wait.first, min(max(pause, time.Second), w.wait.most)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil
		}
	}
}

// renewIfDue returns when the certificate is due, from now.
func (w *Own) renewIfDue(ctx context.Context) (time.Duration, error) {
	// Read anew each time: the operator may have joined the node again.
	pair, err := tls.LoadX509KeyPair(w.o.CertFile, w.o.KeyFile)
	if err != nil {
		return 0, err
	}
	life := pair.Leaf.NotAfter.Sub(pair.Leaf.NotBefore)
	if due := time.Until(pair.Leaf.NotAfter.Add(-life / 3)); due > 0 {
		return due, nil
	}
	key, ok := pair.PrivateKey.(crypto.Signer)
	uris := identity.URIs(pair.Leaf.Extensions)
	if !ok || len(uris) != 1 {
		return 0, errors.New("it is not one that `ztun control join` made")
	}
	id, err := identity.Parse(uris[0])
	if err != nil {
		return 0, err
	}
	csr, err := requestFor(id, key)
	if err != nil {
		return 0, err
	}
	remote := NewRemote(RemoteOptions{Connector: w.o.Connector, Logger: w.o.Logger})
	defer remote.Close()
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	// Its life without what the CA dates back, lest it grow each time.
	chain, _, err := remote.Sign(ctx, id, csr, max(life-backdate, life/2))
	if err != nil {
		return 0, err
	}
	if !samePublicKey(chain[0], key) {
		return 0, errors.New("the certificate that came is for another key")
	}
	if !chain[0].NotAfter.After(pair.Leaf.NotAfter) {
		return 0, fmt.Errorf("the certificate that came ends at %s, no later than the old one",
			chain[0].NotAfter.UTC().Format(time.RFC3339))
	}
	if err := replace.File(w.o.CertFile, 0o644, encodePEM(chain)); err != nil {
		return 0, err
	}
	w.o.Logger.Info("renewed this node's client certificate", "file", w.o.CertFile, "valid until",
		chain[0].NotAfter.UTC().Format(time.RFC3339))
	life = chain[0].NotAfter.Sub(chain[0].NotBefore)
	return time.Until(chain[0].NotAfter.Add(-life / 3)), nil
}

func encodePEM(certs []*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}
