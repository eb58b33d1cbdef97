package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"ztun/admin"
	"ztun/cmd/attach/steered"
	"ztun/cmd/doctor"
	"ztun/proxy/ports"
	"ztun/tun/netns"
)

// Exit codes of `ztun doctor`: 0 nothing found, 1 something is wrong (exitFailure), 2 not all could be looked at
// (exitConfig).

func doctorCommand() *cobra.Command {
	var a asker
	var o output
	var timeout time.Duration
	cmd := &cobra.Command{
		Use: "doctor", Short: "find out what is wrong with this node, why it matters, and what mends it", Args: noArgs,
		Long: "Looks at the host, the control plane, certificates, the other nodes and the pods, and says what is wrong, " +
			"why it matters\n" +
			"and which command mends it. It changes nothing. A running daemon is asked for its configuration; without one, " +
			"this\n" +
			"command's own environment counts, as for `ztun proxy`. Run it as root, in the daemon's network namespace.\n\n" +
			"Exit codes: 0 nothing is wrong, 1 something is, 2 nothing was found but not everything could be looked at.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			facts, err := examine(ctx, a)
			if err != nil {
				return &codedError{exitConfig, err}
			}
			r := diagnosis{Findings: doctor.Judge(facts), Blind: facts.Blind}
			if o.structured() {
				err = o.write(cmd.OutOrStdout(), r)
			} else {
				r.print(cmd.OutOrStdout())
			}
			return cmp.Or(err, r.verdict())
		},
	}
	a.bind(cmd)
	o.bind(cmd)
	cmd.Flags().DurationVar(&timeout, "timeout", 30*time.Second, "look no longer than this")
	return cmd
}

// diagnosis is what the command prints.
type diagnosis struct {
	Findings []doctor.Finding `json:"findings"`
	Blind    []doctor.Blind   `json:"blind"`
}

func (r diagnosis) print(w io.Writer) {
	for i, f := range r.Findings {
		fmt.Fprintf(w, "%d. %s: %s\n   why:  %s\n   mend: %s\n", i+1, f.Area, f.What, f.Why, f.Mend)
	}
	for _, b := range r.Blind {
		fmt.Fprintf(w, "could not look at %s: %s\n", b.What, b.Why)
	}
	if len(r.Findings)+len(r.Blind) == 0 {
		fmt.Fprintln(w, "nothing is wrong with this node")
	}
}

func (r diagnosis) verdict() error {
	switch {
	case len(r.Findings) > 0:
		return &codedError{exitFailure, fmt.Errorf("found wrong: %d", len(r.Findings))}
	case len(r.Blind) > 0:
		return &codedError{exitConfig, fmt.Errorf("could not be looked at: %d", len(r.Blind))}
	}
	return nil
}

// examine asks the daemon, if there is one, and looks.
func examine(ctx context.Context, a asker) (doctor.Facts, error) {
	var blind []doctor.Blind
	missed := func(what string, err error) {
		if err != nil {
			blind = append(blind, doctor.Blind{What: what, Why: err.Error()})
		}
	}
	var o doctor.Options
	pods, err := a.client().List(ctx)
	o.Running = err == nil
	lookup, environ := os.LookupEnv, os.Environ
	switch pid, perr := ownerOf(a.socket); {
	case err != nil:
		o.Daemon.Error = err.Error()
	case perr != nil:
		missed("the daemon's configuration", perr)
	default:
		env, eerr := environment(pid)
		if eerr == nil {
			lookup, environ = env.lookup, env.list
		}
		missed("the daemon's configuration", eerr)
		if elsewhere, nerr := inAnother(pid); nerr != nil {
			missed("the daemon's network namespace", nerr)
		} else if elsewhere {
			return doctor.Facts{},
				fmt.Errorf("the daemon runs in another network namespace; use: nsenter --net=/proc/%d/ns/net ztun doctor", pid)
		}
	}
	c, err := loadConfig(lookup, environ)
	if err != nil {
		return doctor.Facts{}, err
	}
	o.NodeTUN, o.MTU, o.IPv6, o.PlainTUN = c.Attach.NodeTUN, c.Attach.MTU, c.Net.IPv6, c.Attach.Plain
	o.Ports = []uint16{c.Admin.Port, c.Admin.StatsPort, c.Admin.ReadinessPort}
	o.Redirected = c.Attach.Steering == redirectedPods
	if c.isolates() {
		o.Ports = append(o.Ports, ports.HBONE) // else that port is each pod's own
	} else {
		o.NodeTUN = ""
	}
	if s := c.Attach.Steering; s == steeredPods || s == rulesPods {
		o.Steered = steered.Records(hostRecord(c.State.Dir))
	}
	o.Upstreams = upstreams(c)
	for _, p := range pods {
		o.Pods = append(o.Pods, podOptions(p, o.Redirected))
	}
	if c.DNS.Proxy {
		// The pods' stacks take port 53 of any address. This one is nobody's (RFC 5737).
		o.Nameserver = netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, 53}), 53)
	}
	if o.Running {
		o.Daemon.Ready, err = unready(ctx, c.Admin.ReadinessPort)
		missed("readiness", err)
		body, err := fetch(ctx, c.Admin.Port, "/config_dump")
		if err == nil {
			domain, _ := lookup("TRUST_DOMAIN")
			if c.CA.Fake || c.CA.LocalDir != "" {
				domain = "" // it is the authority's
			}
			o.Certs, o.Peers, err = fromDump(body, c.Node.Name, domain)
		}
		missed("certificates and peers", err)
	}
	f := doctor.Collect(ctx, o)
	f.Blind = append(blind, f.Blind...)
	return f, nil
}

// podOptions are what is to be true for a pod.
func podOptions(p admin.PodStatus, redirected bool) doctor.PodOptions {
	name := refOf(p.PodSpec).String()
	slow := ""
	if !p.Offload.VNetHdr && !redirected { // which have no device
		slow = cmp.Or(p.Offload.Why, "no reason is known")
	}
	return doctor.PodOptions{
		Pod:   doctor.Pod{Name: name, State: p.State, Error: p.Error, Ref: p.NetNS, Slow: slow},
		Addrs: p.IPs, Device: p.Device, MTU: p.MTU,
	}
}

// upstreams are the control planes of the configuration, one of each address.
func upstreams(c *Config) []doctor.UpstreamOptions {
	var all []doctor.UpstreamOptions
	for _, u := range []struct {
		name string
		upstream
	}{{"XDS_ADDRESS", c.XDS.upstream}, {"CA_ADDRESS", c.CA.upstream}} {
		local := u.name == "CA_ADDRESS" && (c.CA.Fake || c.CA.LocalDir != "")
		if u.Address == "" || local {
			continue
		}
		up := doctor.UpstreamOptions{Upstream: doctor.Upstream{Variable: u.name, Address: u.Address,
			Token: doctor.Token{Path: c.Control.Token.File}}}
		if u.Roots.File != "" {
			if _, err := os.ReadFile(u.Roots.File); err != nil {
				up.Roots = err.Error()
			}
		}
		conn, err := newConnector(c, u.name, u.upstream, 0, slog.New(slog.DiscardHandler))
		if err != nil {
			up.Probe = func(context.Context) error { return err }
		} else {
			up.Address, up.Probe = conn.Address(), conn.Probe
		}
		all = append(all, up)
	}
	return all
}

// ownerOf is the process that listens on a socket.
func ownerOf(socket string) (pid int, err error) {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	cerr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = cmp.Or(cerr, err); err != nil {
		return 0, err
	}
	return int(cred.Pid), nil
}

// processEnv is the environment that a process was started with.
type processEnv []string

func environment(pid int) (processEnv, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		return nil, err
	}
	return strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00"), nil
}

func (e processEnv) list() []string { return e }

func (e processEnv) lookup(name string) (string, bool) {
	for _, pair := range e {
		if n, v, ok := strings.Cut(pair, "="); ok && n == name {
			return v, true
		}
	}
	return "", false
}

// inAnother reports whether a process is in another network namespace than this one.
func inAnother(pid int) (bool, error) {
	theirs, err := netns.OpenPID(pid)
	if err != nil {
		return false, err
	}
	defer theirs.Close()
	ours, err := netns.Current()
	if err != nil {
		return false, err
	}
	defer ours.Close()
	return !ours.Same(theirs), nil
}

// maxDump bounds what is read of the daemon's answers.
const maxDump = 256 << 20

func get(ctx context.Context, port uint16, path string) (code int, body []byte, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d%s", port, path),
		http.NoBody)
	if err != nil {
		return 0, nil, err
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(io.LimitReader(resp.Body, maxDump))
	return resp.StatusCode, body, err
}

func fetch(ctx context.Context, port uint16, path string) ([]byte, error) {
	code, body, err := get(ctx, port, path)
	if err == nil && code != http.StatusOK {
		err = fmt.Errorf("%s on port %d answers %d: %s", path, port, code, firstLine(body))
	}
	return body, err
}

// unready is why the daemon is not ready; "" it is.
func unready(ctx context.Context, port uint16) (string, error) {
	code, body, err := get(ctx, port, "/healthz/ready")
	if err != nil || code == http.StatusOK {
		return "", err
	}
	return firstLine(body), nil
}

func firstLine(b []byte) string {
	line, _, _ := bytes.Cut(bytes.TrimSpace(b), []byte("\n"))
	return string(line[:min(len(line), 200)])
}

// dumpParts are what is read of /config_dump.
type dumpParts struct {
	Certificates []struct {
		Identity  string        `json:"identity"`
		State     string        `json:"state"`
		CertChain []dumpedChain `json:"certChain"`
		RootCerts []dumpedChain `json:"rootCerts"`
	} `json:"certificates"`
	Workloads []struct {
		Name        string           `json:"name"`
		Namespace   string           `json:"namespace"`
		Node        string           `json:"node"`
		Protocol    string           `json:"protocol"`
		Status      string           `json:"status"`
		NetworkMode string           `json:"networkMode"`
		IPs         []netip.Addr     `json:"workloadIps"`
		Mesh        []netip.AddrPort `json:"meshAddresses"`
		Network     string           `json:"network"`
	} `json:"workloads"`
}

type dumpedChain struct {
	PEM []byte `json:"pem"` // base64 of the text, which encoding/json undoes
}

// maxMeshPeers is how many workloads that take HBONE at an address of their host's are called.
const maxMeshPeers = 16

// fromDump reads certificates, and for each other node a pod of it that takes HBONE, and workloads that take it at an
// address of their host's. One on a loopback may be another host's.
func fromDump(body []byte, node, domain string) (certs []doctor.Cert, peers []doctor.Peer, err error) {
	var d dumpParts
	if err := json.Unmarshal(body, &d); err != nil {
		return nil, nil, fmt.Errorf("/config_dump is not as expected: %w", err)
	}
	for _, c := range d.Certificates {
		have := doctor.Cert{Identity: c.Identity, State: c.State, Domain: domain}
		var err1, err2 error
		have.Chain, err1 = parseChain(c.CertChain)
		have.Roots, err2 = parseChain(c.RootCerts)
		if err := errors.Join(err1, err2); err != nil {
			return nil, nil, fmt.Errorf("certificate of %s: %w", c.Identity, err)
		}
		certs = append(certs, have)
	}
	seen := map[string]bool{node: true, "": true}
	atHosts := 0
	for _, w := range d.Workloads {
		if len(w.Mesh) > 0 {
			if w.Protocol == "HBONE" && w.Status != "Unhealthy" && w.Network == "" && !w.Mesh[0].Addr().IsLoopback() &&
				atHosts < maxMeshPeers {
				atHosts++
				peers = append(peers, doctor.Peer{Workload: w.Namespace + "/" + w.Name, Addr: w.Mesh[0]})
			}
			continue
		}
		if seen[w.Node] || w.Protocol != "HBONE" || w.Status == "Unhealthy" || w.NetworkMode == "HostNetwork" ||
			w.Network != "" || len(w.IPs) == 0 {
			continue
		}
		seen[w.Node] = true
		peers = append(peers, doctor.Peer{Node: w.Node, Addr: netip.AddrPortFrom(w.IPs[0], ports.HBONE)})
	}
	slices.SortFunc(peers, func(a, b doctor.Peer) int { return strings.Compare(a.String(), b.String()) })
	return certs, peers, nil
}

func parseChain(chain []dumpedChain) (out []*x509.Certificate, err error) {
	for _, c := range chain {
		block, _ := pem.Decode(c.PEM)
		if block == nil {
			return nil, fmt.Errorf("no PEM in %.40q", base64.StdEncoding.EncodeToString(c.PEM))
		}
		parsed, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		out = append(out, parsed)
	}
	return out, nil
}
