package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"ztun/admin"
	"ztun/admin/ca"
	"ztun/proxy/identity"
)

// stateManager is the task of readiness that is done when the mesh is known.
const stateManager = "state manager"

// How soon, and how often then, the log says why this node is not ready.
const (
	firstExcuse = 10 * time.Second
	nextExcuse  = time.Minute
)

// sayReady says in the log what 15021 answers, when it begins to: there is no other truth about readiness.
func sayReady(ctx context.Context, ready *admin.Ready, log *slog.Logger) {
	was := false
	excuse := time.NewTimer(firstExcuse)
	defer excuse.Stop()
	for {
		pending, changed := ready.State()
		switch now := len(pending) == 0; {
		case now && !was:
			log.Info("ready")
		case was && !now:
			log.Warn("not ready any more", "pending", reasons(pending))
			excuse.Reset(nextExcuse)
		}
		was = len(pending) == 0
		select {
		case <-changed:
		case <-excuse.C:
			if pending := ready.Pending(); len(pending) > 0 {
				log.Warn("not ready", "pending", reasons(pending))
			}
			excuse.Reset(nextExcuse)
		case <-ctx.Done():
			return
		}
	}
}

// reasons names what is missing, and why as far as that is known.
func reasons(pending []admin.PendingTask) string {
	var all []string
	for _, p := range pending {
		why := p.Name
		if p.LastError != nil {
			why += " (" + p.LastError.Error() + ")"
		}
		all = append(all, why)
	}
	return strings.Join(all, ", ")
}

// The pauses between looks at the certificates, and between attempts to reach the CA, while the node is not ready.
const (
	certificateLook = 200 * time.Millisecond
	lastProbe       = 5 * time.Second
)

// checkCertificates ends the readiness task of the certificates: when one was received, or, while no pod of this node
// wants one, when the CA can be reached and shows a certificate that we trust. Once that was so an outage does not make
// the node unready again: the pods go on with what they have, and taking the node out of service would end that.
func (d *daemon) checkCertificates(ctx context.Context, task *admin.Task) {
	var last string
	pause, next := certificateLook, time.Now()
	for ctx.Err() == nil {
		err := d.certificates(func() error {
			if time.Now().Before(next) {
				return errTooSoon
			}
			err := d.probeCA(ctx)
			next, pause = time.Now().Add(pause), min(2*pause, lastProbe)
			return err
		})
		if err == nil {
			task.Done()
			return
		}
		if err != errTooSoon && err.Error() != last {
			last = err.Error()
			task.Fail(err)
		}
		select {
		case <-time.After(certificateLook):
		case <-ctx.Done():
		}
	}
}

var errTooSoon = errors.New("tried a moment ago")

// certificates says why none can be had. probe tells whether the CA can be reached.
func (d *daemon) certificates(probe func() error) error {
	if d.probeCA == nil || d.certs.Stats().Signed > 0 {
		return nil
	}
	for _, p := range d.ready.Pending() {
		if p.Name == stateManager {
			return errors.New("which pods want one is known with the first state")
		}
	}
	wanted := map[identity.ID]bool{}
	view := d.loop.View()
	for _, p := range d.pods.all() {
		if w := view.WorkloadByInfo(p.info()); w != nil {
			wanted[w.Identity()] = true
		}
	}
	if len(wanted) == 0 {
		return probe()
	}
	return unavailable(d.certs.Dump(), wanted)
}

// unavailable says of one of the wanted identities why it has no certificate.
func unavailable(states []ca.CertState, wanted map[identity.ID]bool) error {
	for _, s := range states {
		if why, ok := strings.CutPrefix(s.State, "Unavailable: "); ok && wanted[s.Identity] {
			return fmt.Errorf("%s: %s", s.Identity, why)
		}
	}
	return errors.New("none has been received yet")
}
