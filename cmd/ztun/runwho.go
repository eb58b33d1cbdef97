package main

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"ztun/admin"
	"ztun/admin/control"
)

// runWho is which workload the command of `ztun run` is, and by what the control plane knows that: flags; a bundle of
// `ztun control join --workload`; or, as for `ztun proxy`, PROXY_MODE=dedicated and PROXY_WORKLOAD_INFO.
type runWho struct {
	spec   admin.PodSpec
	ips    []string
	join   string
	wait   string          // "": as the environment says
	bundle *control.Bundle // nil: there is none
}

func (r *runWho) bind(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&r.join, "join", "", "`BUNDLE` that 'ztun control join --workload' has written, a directory or a file: who the "+
		"command is, and all it takes to be that")
	f.StringVar(&r.spec.Name, "name", "", "name of the workload, where neither --join nor PROXY_WORKLOAD_INFO has it")
	f.StringVar(&r.spec.Namespace, "namespace", "default", "namespace of the workload")
	f.StringVar(&r.spec.ServiceAccount, "service-account", "default", "service account of the workload")
	f.StringSliceVar(&r.ips, "ip", nil, "address of the workload, at most one per family: 10.1.0.2[,fd00::2] (default those "+
		"of the bundle)")
	f.StringVar(&r.wait, "wait", "", "wait for so long for a control plane that does not answer, before giving up; 0 starts "+
		"the command without what it needs to call anybody (default ZTUN_RUN_WAIT)")
	for _, name := range []string{"name", "namespace", "service-account"} {
		cmd.MarkFlagsMutuallyExclusive("join", name)
	}
}

// resolve completes spec. lookup is the environment.
func (r *runWho) resolve(lookup func(string) (string, bool)) (err error) {
	if r.spec.IPs, err = parseIPs(r.ips); err != nil {
		return err
	}
	if r.wait != "" {
		if _, err := parseDuration(r.wait); err != nil {
			return fmt.Errorf("--wait %s: %w", r.wait, err)
		}
	}
	mode, _ := lookup("PROXY_MODE")
	info, named := lookup("PROXY_WORKLOAD_INFO")
	switch {
	case r.join != "":
		if r.bundle, err = control.ReadBundle(r.join); err != nil {
			return fmt.Errorf("--join: %w", err)
		}
		b := r.bundle
		r.spec.Namespace, r.spec.Name, r.spec.ServiceAccount = b.Namespace, b.Name, b.ServiceAccount
		if len(r.spec.IPs) == 0 {
			r.spec.IPs = b.IPs
		}
	case r.spec.Name != "":
	case mode == "dedicated" && named:
		if r.spec.Namespace, r.spec.Name, r.spec.ServiceAccount, err = parseWorkloadInfo(info); err != nil {
			return &configError{"PROXY_WORKLOAD_INFO", info, err}
		}
	default:
		return errors.New("which workload is the command? Name it by --join, by --name, or by PROXY_MODE=dedicated and " +
			"PROXY_WORKLOAD_INFO")
	}
	if len(r.spec.IPs) == 0 {
		return fmt.Errorf("the workload %s needs an address: --ip", refOf(r.spec))
	}
	return nil
}

// environment is lookup with what the bundle stands for in it. What a bundle that is one file has is written to dir.
func (r *runWho) environment(lookup func(string) (string, bool), dir string) (func(string) (string, bool), error) {
	own := map[string]string{}
	// Without one a node's credentials may be used, which have to say whose certificate is wanted.
	if b := r.bundle; b != nil {
		credentials := b.Dir
		if credentials == "" {
			credentials = filepath.Join(dir, "join")
			if err := b.Unpack(credentials); err != nil {
				return nil, err
			}
		}
		own["ZTUN_CONTROL_CREDENTIALS"], own["PROXY_MODE"] = credentials, "dedicated"
		// Whatever else the environment says of credentials is somebody else's.
		for name, file := range map[string]string{"XDS_ROOT_CA": control.RootFile, "CA_ROOT_CA": control.RootFile,
			"AUTH_TOKEN": control.TokenFile, "ZTUN_CONTROL_CERT": control.CertFile, "ZTUN_CONTROL_KEY": control.KeyFile} {
			own[name] = filepath.Join(credentials, file)
		}
		own["PROXY_WORKLOAD_INFO"] = b.Namespace + "/" + b.Name + "/" + b.ServiceAccount
		for name, value := range map[string]string{"XDS_ADDRESS": b.Address, "CA_ADDRESS": b.Address,
			"TRUST_DOMAIN": b.TrustDomain, "NETWORK": b.Network} {
			if _, given := lookup(name); !given && value != "" {
				own[name] = value
			}
		}
	}
	return func(name string) (string, bool) {
		if v, ok := own[name]; ok {
			return v, true
		}
		return lookup(name)
	}, nil
}
