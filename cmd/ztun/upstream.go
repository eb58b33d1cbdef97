package main

import (
	"context"
	"log/slog"
	"path/filepath"

	"ztun/admin"
	"ztun/admin/ca"
	"ztun/admin/istiod"
	"ztun/admin/xds"
	"ztun/proxy/identity"
	"ztun/proxy/state"
)

// maxXDS bounds a message of the control plane, in bytes (spec controlplane 2.1).
const maxXDS = 200 << 20

// connector is the way to a control plane: what XDS_ADDRESS and CA_ADDRESS, which is the name, have in common.
func (d *daemon) connector(name string, up upstream, maxRecv int) (*istiod.Connector, error) {
	conn, err := newConnector(d.c, name, up, maxRecv, d.log.Logger("istiod"))
	if err == nil {
		d.upstreams = append(d.upstreams, conn)
	}
	return conn, err
}

// newConnector is for those who have no daemon.
func newConnector(c *Config, name string, up upstream, maxRecv int, log *slog.Logger) (*istiod.Connector, error) {
	conn, err := istiod.New(istiod.Options{
		Address: up.Address, Roots: up.Roots, AltHostname: up.AltHostname, Headers: up.Headers,
		Token: c.Control.Token, ClusterID: c.Node.ClusterID, ClientCert: c.Control.Cert, ClientKey: c.Control.Key,
		TLS12: c.Proxy.TLS.TLS12, PQC: c.Proxy.TLS.PQC, MaxRecv: maxRecv, Logger: log,
	})
	if err != nil {
		return nil, &configError{name, up.Address, err}
	}
	return conn, nil
}

// authority makes the Signer, istiod or `ztun control`, a local CA, or the fake one, and the Manager of its
// certificates.
func (d *daemon) authority(ctx context.Context) (ca.Signer, error) {
	c := d.c
	options := ca.ManagerOptions{TTL: c.CA.TTL, Logger: d.log.Logger("ca")}
	var dir *ca.Dir
	remote := ""
	switch {
	case c.CA.Fake:
		fake := ca.NewFake()
		d.logger.Warn("FAKE_CA=true: certificates are signed with a key that everybody knows, and that is not ztunnel's; "+
			"for tests only",
			"root", ca.Describe(fake.Certificate()))
		options.Signer = fake
	case c.CA.LocalDir != "":
		var err error
		if dir, err = ca.OpenDir(c.CA.LocalDir, d.log.Logger("ca")); err != nil {
			return nil, &configError{"LOCAL_CA_DIR", c.CA.LocalDir, err}
		}
		options.Signer = dir
	default:
		conn, err := d.connector("CA_ADDRESS", c.CA.upstream, 0)
		if err != nil {
			return nil, err
		}
		d.remoteCA = ca.NewRemote(ca.RemoteOptions{Connector: conn, Impersonate: !c.Mode.Dedicated,
			Logger: d.log.Logger("ca"),
			Changed: func() {
				d.certs.Renew()
			}})
		d.probeCA, remote = conn.Probe, conn.Address()
		options.AnyIdentity = c.Mode.Dedicated
		options.Signer = d.remoteCA
		if c.Control.Dir != "" {
			d.followControl(ctx, conn)
		}
	}
	signer := options.Signer
	if c.Mode.Workload != (state.WorkloadInfo{}) {
		address, setting := c.CA.LocalDir, "LOCAL_CA_DIR"
		if d.remoteCA != nil {
			address, setting = remote, "CA_ADDRESS"
		}
		d.caLost = newCALost(d.runLog(), address, setting, c.Process.RunWait)
		options.Signer = &ownSigner{Signer: signer, of: c.Mode.Workload, log: options.Logger, lost: d.caLost}
	}
	d.certs = ca.NewManager(options)
	if d.remoteCA != nil {
		d.admin(ctx, "certificate authority", d.remoteCA.Run)
	}
	if dir != nil {
		d.admin(ctx, "certificate authority", func(ctx context.Context) error { return dir.Run(ctx, d.certs.Renew) })
	}
	return signer, nil
}

// runLog is where a `ztun run` says what its user has to know of the control side; nil: this is none.
func (d *daemon) runLog() *slog.Logger {
	if !d.c.Mode.Rootless {
		return nil
	}
	return d.log.Logger("run")
}

// trustDomain is that of workloads of a file that name none: the local CA's, else this proxy's own.
func trustDomain(signer ca.Signer, own string) string {
	if local, ok := signer.(interface{ TrustDomain() string }); ok && local.TrustDomain() != "" {
		return local.TrustDomain()
	}
	return own
}

// followControl takes from `ztun control` what istiod has not: the list of what is revoked, and a newer client
// certificate of this node when its own nears its end.
func (d *daemon) followControl(ctx context.Context, conn *istiod.Connector) {
	c, log := d.c, d.log.Logger("ca")
	if c.Control.Cert != "" && filepath.Dir(c.Control.Cert) == filepath.Clean(c.Control.Dir) {
		d.admin(ctx, "own certificate",
			ca.NewOwn(ca.OwnOptions{Connector: conn, CertFile: c.Control.Cert, KeyFile: c.Control.Key, Logger: log}).Run)
	}
	path := filepath.Join(c.State.Dir, "control-crl.pem")
	d.crl = ca.NewCRLFile(c.CA.CRLPath, &d.revoked, d.log.Logger("crl"), path)
	follow := ca.NewRevocations(ca.RevocationsOptions{Connector: conn, Path: path, Put: func() {
		d.crl.Load()
	}, Logger: d.log.Logger("crl")})
	d.admin(ctx, "revocations of the control plane", follow.Run)
}

// revocation reads CRL_PATH. A list that cannot be read at start only warns, as in ztunnel: a pod that does not come up
// is worse than one whose list comes late.
func (d *daemon) revocation(ctx context.Context) {
	if d.crl == nil && d.c.CA.CRLPath == "" {
		return
	}
	if d.crl == nil {
		d.crl = ca.NewCRLFile(d.c.CA.CRLPath, &d.revoked, d.log.Logger("crl"))
	}
	d.crl.Load() // it says itself what is wrong
	d.admin(ctx, "revocation list", d.crl.Run)
}

// tls is what handshakes with peers are asked for.
func (d *daemon) tls() identity.Params {
	p := d.c.Proxy.TLS
	if d.crl != nil {
		p.Revocation = &d.revoked
	}
	return p
}

// learn starts the source of workloads: the control plane, or a file alone. ready is told when the first complete state
// is in use.
func (d *daemon) learn(ctx context.Context, ready *admin.Task) error {
	c := d.c
	var base *xds.Local
	file := d.file
	if c.XDS.LocalPath != "" || c.XDS.LocalInline != "" {
		// The first load is synchronous: a wrong file at start is an error, later it keeps the last good state.
		first, err := file.Load()
		switch {
		case err != nil && c.XDS.LocalPath == "":
			return &configError{"LOCAL_XDS", "...", err}
		case err != nil:
			return &configError{"LOCAL_XDS_PATH", c.XDS.LocalPath, err}
		}
		base = first
		d.static.Keep(first)
	}
	if c.XDS.Address == "" {
		if err := d.loop.Do(ctx, func() { d.loop.Publish(base.View(c.Node.Name)) }); err != nil {
			return err
		}
		ready.Done()
		d.admin(ctx, "workload file", func(ctx context.Context) error {
			return file.Run(ctx, func(l *xds.Local) {
				d.static.Keep(l)
				d.loop.Post(ctx, admin.StateBuilt{Source: "file", View: l.View(c.Node.Name)})
			}, func(err error) {
				d.static.Keep(nil)
				d.loop.Post(ctx, admin.SourceBroken{Source: "file", Err: err})
			})
		})
		return nil
	}
	conn, err := d.connector("XDS_ADDRESS", c.XDS.upstream, maxXDS)
	if err != nil {
		return err
	}
	// Nothing is used before the first complete state: workloads come first, and without the policies that follow they
	// would be open to everybody. Publish and Synced run on one goroutine.
	var early *state.View
	publish := func(v *state.View) {
		// Waits until it is in use, so that whoever demanded something finds it.
		d.loop.DoNamed(ctx, "state from "+conn.Address(), func() { d.loop.Publish(v) })
	}
	synced := false
	d.lost = newControlLost(d.runLog(), conn.Address(), c.Process.RunWait)
	client := xds.NewClient(xds.ClientOptions{
		Connector: conn, NodeName: c.Node.Name, OnDemand: c.XDS.OnDemand, Base: base, Logger: d.log.Logger("xds"),
		Node: xds.NewNode(xds.NodeInfo{IP: c.Self.InstanceIP, Pod: c.Self.Pod, Namespace: c.Self.Namespace,
			NodeName: c.Node.Name,
			Metadata: c.Self.Metadata, JSON: c.Self.MetaJSON}),
		Publish: func(v *state.View, _ bool) {
			if synced {
				publish(v)
			} else {
				early = v
			}
		},
		Synced: func() {
			synced = true
			if early != nil {
				publish(early)
				early = nil
			}
			w, s, p := d.loop.View().Counts()
			d.log.Logger("xds").Info("first state", "source", conn.Address(), "workloads", w, "services", s, "policies", p)
			ready.Done()
		},
		Trouble:   func(err error) { ready.Fail(err); d.lost.trouble(err) },
		Connected: func() { d.certs.Retry(); d.lost.connected() },
		Turned:    func(pod string, evicted bool) { d.report.Turned("on-demand look-ups", pod, pod, evicted) },
	})
	d.xds.Store(client)
	d.admin(ctx, "xds", client.Run)
	return nil
}
