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

// connector is the way to a control plane: what XDS_ADDRESS and CA_ADDRESS have in common.
func (d *daemon) connector(name, address string, roots RootSource, alt string, headers [][2]string, maxRecv int) (
	*istiod.Connector, error) {
	return newConnector(d.c, name, address, roots, alt, headers, maxRecv, d.log.Logger("istiod"))
}

// newConnector is for those who have no daemon.
func newConnector(
	c *Config, name, address string, roots RootSource, alt string, headers [][2]string, maxRecv int, log *slog.Logger,
) (*istiod.Connector, error) {
	conn, err := istiod.New(istiod.Options{
		Address: address, Roots: istiod.Roots{File: roots.File, PEM: roots.PEM, System: roots.System}, AltHostname: alt,
		Token: istiod.Token{File: c.TokenFile, Literal: c.TokenLiteral}, ClusterID: c.ClusterID, Headers: headers,
		ClientCert: c.ClientCert, ClientKey: c.ClientKey, TLS12: c.TLS12, PQC: c.PQC, MaxRecv: maxRecv, Logger: log,
	})
	if err != nil {
		return nil, &configError{name, address, err}
	}
	return conn, nil
}

// authority makes the Signer, istiod or `ztun control`, a local CA, or the fake one, and the Manager of its
// certificates.
func (d *daemon) authority(ctx context.Context) (ca.Signer, error) {
	c := d.c
	options := ca.ManagerOptions{TTL: c.SecretTTL, Logger: d.log.Logger("ca")}
	var dir *ca.Dir
	switch {
	case c.FakeCA:
		fake := ca.NewFake()
		d.logger.Warn("FAKE_CA=true: certificates are signed with a key that everybody knows, and that is not ztunnel's; "+
			"for tests only",
			"root", ca.Describe(fake.Certificate()))
		options.Signer = fake
	case c.LocalCADir != "":
		var err error
		if dir, err = ca.OpenDir(c.LocalCADir, d.log.Logger("ca")); err != nil {
			return nil, &configError{"LOCAL_CA_DIR", c.LocalCADir, err}
		}
		options.Signer = dir
	default:
		conn, err := d.connector("CA_ADDRESS", c.CAAddress, c.CARoots, c.AltCAHostname, c.CAHeaders, 0)
		if err != nil {
			return nil, err
		}
		d.remoteCA = ca.NewRemote(ca.RemoteOptions{Connector: conn, Impersonate: !c.Dedicated, Logger: d.log.Logger("ca"),
			Changed: func() {
				d.certs.Renew()
			}})
		d.probeCA = conn.Probe
		options.Signer = d.remoteCA
		if c.ControlDir != "" {
			d.followControl(ctx, conn)
		}
	}
	signer := options.Signer
	if c.Workload != (state.WorkloadInfo{}) {
		options.Signer = &ownSigner{Signer: signer, of: c.Workload, log: options.Logger}
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
	if c.ClientCert != "" && filepath.Dir(c.ClientCert) == filepath.Clean(c.ControlDir) {
		d.admin(ctx, "own certificate",
			ca.NewOwn(ca.OwnOptions{Connector: conn, CertFile: c.ClientCert, KeyFile: c.ClientKey, Logger: log}).Run)
	}
	path := filepath.Join(c.StateDir, "control-crl.pem")
	d.crl = ca.NewCRLFile(c.CRLPath, &d.revoked, d.log.Logger("crl"))
	d.crl.Also(path)
	follow := ca.NewRevocations(ca.RevocationsOptions{Connector: conn, Path: path, Put: func() {
		d.crl.Load()
	}, Logger: d.log.Logger("crl")})
	d.admin(ctx, "revocations of the control plane", follow.Run)
}

// revocation reads CRL_PATH. A list that cannot be read at start only warns, as in ztunnel: a pod that does not come up
// is worse than one whose list comes late.
func (d *daemon) revocation(ctx context.Context) {
	if d.crl == nil && d.c.CRLPath == "" {
		return
	}
	if d.crl == nil {
		d.crl = ca.NewCRLFile(d.c.CRLPath, &d.revoked, d.log.Logger("crl"))
	}
	d.crl.Load() // it says itself what is wrong
	d.admin(ctx, "revocation list", d.crl.Run)
}

// tls is what handshakes with peers are asked for.
func (d *daemon) tls() identity.Params {
	p := identity.Params{TLS12: d.c.TLS12, PQC: d.c.PQC}
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
	if c.LocalXDSPath != "" || c.LocalXDS != "" {
		// The first load is synchronous: a wrong file at start is an error, later it keeps the last good state.
		first, err := file.Load()
		switch {
		case err != nil && c.LocalXDSPath == "":
			return &configError{"LOCAL_XDS", "...", err}
		case err != nil:
			return &configError{"LOCAL_XDS_PATH", c.LocalXDSPath, err}
		}
		base = first
		d.static.Keep(first)
	}
	if c.XDSAddress == "" {
		if err := d.loop.Do(ctx, func() { d.loop.Publish(base.View(c.NodeName)) }); err != nil {
			return err
		}
		ready.Done()
		d.admin(ctx, "workload file", func(ctx context.Context) error {
			return file.Run(ctx, func(l *xds.Local) {
				d.static.Keep(l)
				d.loop.Post(ctx, admin.StateBuilt{Source: "file", View: l.View(c.NodeName)})
			}, func(err error) {
				d.static.Keep(nil)
				d.loop.Post(ctx, admin.SourceBroken{Source: "file", Err: err})
			})
		})
		return nil
	}
	conn, err := d.connector("XDS_ADDRESS", c.XDSAddress, c.XDSRoots, c.AltXDSHostname, c.XDSHeaders, maxXDS)
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
	client := xds.NewClient(xds.ClientOptions{
		Connector: conn, NodeName: c.NodeName, OnDemand: c.XDSOnDemand, Base: base, Logger: d.log.Logger("xds"),
		Node: xds.NewNode(xds.NodeInfo{IP: c.InstanceIP, Pod: c.PodName, Namespace: c.PodNamespace, NodeName: c.NodeName,
			Metadata: c.ProxyMetadata, JSON: c.MetaJSON}),
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
		Trouble: ready.Fail, Connected: d.certs.Retry,
		Turned: func(pod string, evicted bool) { d.report.Turned("on-demand look-ups", pod, pod, evicted) },
	})
	d.xds.Store(client)
	d.admin(ctx, "xds", client.Run)
	return nil
}
