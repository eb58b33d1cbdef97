package main

import (
	"net"

	"ztun/cmd/attach"
	"ztun/cmd/attach/isolated"
	"ztun/netstack"
	"ztun/tun/netns"
)

// chooseKind is how this daemon attaches pods: the only place that knows which ways there are.
func (d *daemon) chooseKind() attach.Kind {
	c := d.c
	stack := c.stack()
	stack.Datagrams = c.datagrams(d.know)
	return isolated.New(attach.Options{
		NodeTUN: c.NodeTUN, MTU: c.MTU, IPv6: c.IPv6, Plain: c.TUNPlain, DNS: c.DNSProxy, Socket: c.meshSocket(), Stack: stack,
		Descriptors: d.fds, Self: d.pods.selfDoor, Report: d.report, Panics: d.panics, Serve: d.serve, Logger: d.log.Logger,
	})
}

// notSentLowat keeps what waits unsent in the kernel short on tunnels, so that a small request is not
// queued behind megabytes of bulk (design section 7, lesson 12). Bytes.
const notSentLowat = 128 << 10

// meshSocket is what the mesh's kernel sockets have in common.
func (c *Config) meshSocket() netns.SocketOptions {
	return netns.SocketOptions{UserTimeout: c.userTimeout(), NotSentLowat: notSentLowat, Mark: c.PacketMark, KeepAlive: net.KeepAliveConfig{
		Enable: c.KeepaliveEnabled, Idle: c.KeepaliveTime, Interval: c.KeepaliveInterval, Count: int(c.KeepaliveRetries),
	}}
}

// stack is what the stacks of all pods have in common.
func (c *Config) stack() netstack.Config {
	return netstack.Config{
		MaxInFlight: c.MaxInFlight, MaxInFlightPerDst: c.MaxInFlightPerDestination, DNSRate: c.DNSRate,
		KeepaliveOff: !c.KeepaliveEnabled, UserTimeout: c.userTimeout(),
		KeepaliveIdle: c.KeepaliveTime, KeepaliveInterval: c.KeepaliveInterval, KeepaliveCount: int(c.KeepaliveRetries),
	}
}
