package main

import (
	"errors"
	"net/netip"

	"ztun/netstack"
	"ztun/proxy/dns"
)

// udpMode is what becomes of the pods' UDP and ICMP.
type udpMode uint8

const (
	udpPolicy udpMode = iota // UDP passes if policy lets plaintext pass
	udpAll                   // all passes
	udpOff                   // nothing does
)

func udpModes(m *udpMode) func(string) error {
	return func(v string) error {
		switch v {
		case "policy":
			*m = udpPolicy
		case "all":
			*m = udpAll
		case "off":
			*m = udpOff
		default:
			return errors.New("not policy, all or off")
		}
		return nil
	}
}

// datagrams is how all pods' UDP and ICMP are carried; nil: they are not.
func (c *Config) datagrams(know dns.Knowledge) *netstack.Datagrams {
	if c.UDP.Mode == udpOff {
		return nil
	}
	return &netstack.Datagrams{MaxFlows: c.UDP.MaxFlows, Version: func() uint64 { return know.View().Version() }}
}

// AllowDatagram implements attach.Handler.
func (p *pod) AllowDatagram(inbound bool, src, dst netip.AddrPort) bool {
	if p.udp == udpAll {
		return true
	}
	select {
	case <-p.built:
	default:
		return false // it is being attached: who sends tries again
	}
	return p.proxy != nil && p.proxy.AllowDatagram(inbound, src, dst)
}
