package main

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/spf13/cobra"
)

// ownServers are the HTTP servers of a `ztun run`, by flags. There is none by default: many run on one host, for which
// one port is not enough, and whoever has a local process may ask what listens on loopback. The control socket is the
// user's alone.
type ownServers struct {
	adminPort, metricsAt, readyAt string // the flags

	admin          uint16         // 0: none
	metrics, ready netip.AddrPort // not valid: none
}

func (o *ownServers) bind(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&o.adminPort, "admin", "", "`PORT` of localhost for what 'ztun proxy' has at 15000 (default none: there is "+
		"'ztun connections --run')")
	f.StringVar(&o.metricsAt, "metrics", "", "`[ADDR:]PORT` for metrics, as 'ztun proxy' has them at 15020; ADDR is 127.0.0.1 "+
		"if left out (default none)")
	f.StringVar(&o.readyAt, "ready", "", "`[ADDR:]PORT` for /healthz/ready, as 'ztun proxy' has it at 15021; ADDR is 127.0.0.1 "+
		"if left out (default none)")
}

func (o *ownServers) resolve() (err error) {
	if o.adminPort != "" {
		if o.admin, err = parsePort(o.adminPort); err != nil {
			return fmt.Errorf("--admin %s: %w", o.adminPort, err)
		}
	}
	for _, s := range []struct {
		flag, value string
		at          *netip.AddrPort
	}{{"metrics", o.metricsAt, &o.metrics}, {"ready", o.readyAt, &o.ready}} {
		if s.value == "" {
			continue
		}
		at, err := parseHostPort(s.value)
		if err != nil {
			return fmt.Errorf("--%s %s: %w", s.flag, s.value, err)
		}
		switch {
		case at.Addr().IsValid():
		case strings.Contains(s.value, ":"): // [::]
			at = netip.AddrPortFrom(netip.IPv6Unspecified(), at.Port())
		default:
			at = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), at.Port())
		}
		*s.at = at
	}
	return nil
}

// page, stats and readiness are where the three servers listen, if they are wanted; at is not valid for all addresses.

func (c *adminConfig) page() (port uint16, wanted bool) {
	if c.Own != nil {
		return c.Own.admin, c.Own.admin != 0
	}
	return c.Port, true
}

func (c *adminConfig) stats() (at netip.AddrPort, port uint16, wanted bool) {
	if c.Own != nil {
		return c.Own.metrics, 0, c.Own.metrics.IsValid()
	}
	return at, c.StatsPort, true
}

func (c *adminConfig) readiness() (at netip.AddrPort, port uint16, wanted bool) {
	if c.Own != nil {
		return c.Own.ready, 0, c.Own.ready.IsValid()
	}
	return at, c.ReadinessPort, true
}
