package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"ztun/cmd/attach/rootless"
	"ztun/proxy/ports"
	"ztun/proxy/state"
)

// runPorts is how the command of `ztun run` is reached: by flags, and by what its record announces.
type runPorts struct {
	meshPort string
	publish  []string
	own      ownServers

	in   rootless.Inbound
	kind *rootless.Kind
	had  []netip.Addr // addresses of this host where the record announced the command, or does
	said string       // the last warning
}

func (r *runPorts) bind(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&r.meshPort, "mesh-port", "", "[ADDR:]PORT of this host where peers of the mesh reach the command; its record "+
		"has to announce it (default the meshAddresses of the record, and without any 15008)")
	f.StringArrayVarP(&r.publish, "publish", "p", nil, "[ADDR:]PORT[:PORT][/udp]: a TCP or UDP port of this host at which "+
		"anybody reaches the same, or the second, port of the command, if policy lets plaintext in; repeatable")
	r.own.bind(cmd)
}

// resolve reads the flags.
func (r *runPorts) resolve() (err error) {
	if err := r.own.resolve(); err != nil {
		return err
	}
	if r.meshPort != "" {
		if r.in.Mesh, err = parseHostPort(r.meshPort); err != nil {
			return fmt.Errorf("--mesh-port %s: %w", r.meshPort, err)
		}
	}
	for _, s := range r.publish {
		p, err := parsePublished(s)
		if err != nil {
			return fmt.Errorf("-p %s: %w", s, err)
		}
		for _, other := range r.in.Publish {
			if other.UDP == p.UDP && other.At == p.At {
				return fmt.Errorf("-p %s: this port is published twice", s)
			}
			// A datagram that leaves by a port of the command's leaves by one of the host's.
			a, b := other.At.Addr(), p.At.Addr()
			if other.UDP && p.UDP && other.To == p.To && (!a.IsValid() || !b.IsValid() || a.Is4() == b.Is4()) {
				return fmt.Errorf("-p %s: the command's UDP port %d is published at another port already", s, p.To)
			}
		}
		r.in.Publish = append(r.in.Publish, p)
	}
	return nil
}

// parsePublished reads [ADDR:]PORT[:PORT][/PROTOCOL].
func parsePublished(s string) (p rootless.Published, err error) {
	s, protocol, ok := strings.Cut(s, "/")
	if ok && protocol != "tcp" && protocol != "udp" {
		return p, fmt.Errorf("TCP and UDP are published, not %s", protocol)
	}
	p.UDP = protocol == "udp"
	at, to := s, ""
	host := s[:strings.LastIndex(s, "]")+1] // an IPv6 address has colons of its own
	parts := strings.Split(s[len(host):], ":")
	_, err = strconv.ParseUint(parts[0], 10, 16)
	second := host == "" && err == nil && len(parts) == 2 || len(parts) == 3
	if second {
		to = parts[len(parts)-1]
		at = strings.TrimSuffix(s, ":"+to)
	}
	if p.At, err = parseHostPort(at); err != nil {
		return p, err
	}
	if !second {
		p.To = p.At.Port()
		return p, nil
	}
	p.To, err = parsePort(to)
	return p, err
}

// parseHostPort reads [ADDR:]PORT.
func parseHostPort(s string) (netip.AddrPort, error) {
	if !strings.Contains(s, ":") {
		port, err := parsePort(s)
		return netip.AddrPortFrom(netip.Addr{}, port), err
	}
	a, err := netip.ParseAddrPort(s)
	if err != nil {
		return a, errors.New("want an IP address and a port, ADDR:PORT, an IPv6 address as [ADDR]:PORT")
	}
	if a.Port() == 0 {
		return a, errors.New("want a port from 1 to 65535")
	}
	if a.Addr().IsUnspecified() && a.Addr().Is6() {
		a = netip.AddrPortFrom(netip.Addr{}, a.Port())
	}
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()), nil
}

func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("%q: want a port from 1 to 65535", s)
	}
	return uint16(n), nil
}

// inbound makes the kind ask a View where HBONE arrives on this host's loopback, where its nameservers may be, too.
func (r *runPorts) inbound(view func() *state.View, nameservers []netip.AddrPort) *rootless.Inbound {
	r.in.Nameservers = nameservers
	r.in.Announced = func(a netip.AddrPort) bool {
		return slices.ContainsFunc(view().Workloads(), func(w *state.Workload) bool {
			return slices.Contains(w.MeshAddresses, a)
		})
	}
	return &r.in
}

// follow listens where the record w announces that HBONE arrives, and says once what keeps peers away.
func (r *runPorts) follow(ctx context.Context, w *state.Workload, log *slog.Logger) {
	if w == nil {
		return // not known yet, which others say
	}
	text := ""
	if err := r.kind.Announce(ctx, announced(w)); err != nil {
		text = err.Error()
	}
	// Without the list of addresses nothing is known of them: no warning.
	if host, err := hostAddrs(); err == nil {
		var left string
		if r.had, left = departed(announced(w), r.had, host); text == "" {
			text = left
		}
		if text == "" {
			text = unannounced(w, r.in.Mesh.Port(), host)
		}
	}
	if text != "" && text != r.said {
		log.Warn(text, "workload", w.Namespace+"/"+w.Name)
	}
	r.said = text
}

// announced is where the record w has peers call. One that is not reached over HBONE says by its meshAddresses from
// where it calls.
func announced(w *state.Workload) []netip.AddrPort {
	if w.Protocol != state.HBONE {
		return nil
	}
	return w.MeshAddresses
}

// departed says that the record sends peers to an address that this host has no longer; "": it does not, or the address
// never was this host's but, say, that of a router in front of it. had is which of the announced ones were this host's
// before, and the first result the same for the next time.
func departed(announced []netip.AddrPort, had, host []netip.Addr) (seen []netip.Addr, text string) {
	for _, a := range announced {
		switch at := a.Addr(); {
		case slices.Contains(host, at):
			seen = append(seen, at)
		case slices.Contains(had, at):
			seen = append(seen, at)
			if text == "" {
				text = fmt.Sprintf("peers do not reach the command: its record sends them to %s, an address that this host has lost; "+
					"give it meshAddresses: [\"ADDRESS-OF-THIS-HOST:%d\"]", a, a.Port())
			}
		}
	}
	return seen, text
}

// hostAddrs are the addresses of this host.
func hostAddrs() (out []netip.Addr, err error) {
	all, err := net.InterfaceAddrs()
	for _, a := range all {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			out = append(out, p.Addr().Unmap())
		}
	}
	return out, err
}

// unannounced says why no peer calls the mesh port that is listened at; "": they do, or are not meant to. asked is
// --mesh-port, 0 where nobody asked for one.
func unannounced(w *state.Workload, asked uint16, host []netip.Addr) string {
	port := asked
	if asked == 0 {
		port = ports.HBONE
	}
	own := slices.ContainsFunc(w.Addresses, func(a netip.Addr) bool { return slices.Contains(host, a) })
	switch {
	case w.Protocol != state.HBONE && asked == 0:
		return ""
	case w.Protocol != state.HBONE:
		return "peers do not reach the mesh port that is listened at: the workload's record has not protocol HBONE"
	case len(w.MeshAddresses) == 0 && own && port == ports.HBONE:
		return ""
	case len(w.MeshAddresses) > 0 && asked == 0:
		return ""
	case slices.ContainsFunc(w.MeshAddresses, func(a netip.AddrPort) bool { return a.Port() == port }):
		return ""
	}
	where := fmt.Sprintf("port %d of its own addresses", ports.HBONE)
	if len(w.MeshAddresses) > 0 {
		where = fmt.Sprint(w.MeshAddresses)
	}
	return fmt.Sprintf("peers do not find the mesh port %d that is listened at: the workload's record sends them to %s; give it "+
		"meshAddresses: [\"ADDRESS-OF-THIS-HOST:%d\"]", port, where, port)
}
