package main

import (
	"errors"
	"net"
	"path/filepath"

	"ztun/cmd/attach"
	"ztun/cmd/attach/dedicated"
	"ztun/cmd/attach/isolated"
	"ztun/cmd/attach/rootless"
	"ztun/cmd/attach/steered"
	"ztun/netstack"
	"ztun/tun/netns"
)

// chooseKind is how this daemon attaches pods: the only place that knows which ways there are.
func (d *daemon) chooseKind() attach.Kind {
	c := d.c
	o := attach.Options{
		NodeTUN: c.NodeTUN, MTU: c.MTU, IPv6: c.IPv6, Plain: c.TUNPlain, Record: hostRecord(c.StateDir), DNS: c.DNSProxy,
		Socket: c.meshSocket(), Stack: c.stack(),
		Descriptors: d.fds, Self: d.pods.selfDoor, Report: d.report, Panics: d.panics, Serve: d.serve, Logger: d.log.Logger,
	}
	o.Stack.Datagrams = c.datagrams(d.know)
	switch {
	case c.Rootless:
		return rootless.New(o)
	case c.Dedicated:
		return dedicated.New(o)
	}
	if c.Steer {
		return nodeKinds{isolated.New(o), steered.New(o)}
	}
	return isolated.New(o)
}

// hostRecord is the file of what the host's settings were before ztun.
func hostRecord(stateDir string) string { return filepath.Join(stateDir, "host.json") }

// hostLeft and hostUndo are what kinds leave on a host when no daemon runs, and its removal. pods lived in places.
func hostLeft(places []attach.Place, stateDir string) (isolated.Left, error) {
	left, err := isolated.Look(places, hostRecord(stateDir))
	pods, err2 := steered.Look(steered.Records(hostRecord(stateDir)))
	left.Devices = append(left.Devices, pods...)
	return left, errors.Join(err, err2)
}

func hostUndo(places []attach.Place, stateDir string) error {
	record := hostRecord(stateDir)
	return errors.Join(steered.Undo(steered.Records(record), nil), isolated.Undo(places, record))
}

// notSentLowat keeps what waits unsent in the kernel short on tunnels, so that a small request is not
// queued behind megabytes of bulk (design section 7, lesson 12). Bytes.
const notSentLowat = 128 << 10

// meshSocket is what the mesh's kernel sockets have in common.
func (c *Config) meshSocket() netns.SocketOptions {
	return netns.SocketOptions{UserTimeout: c.userTimeout(), NotSentLowat: notSentLowat, Mark: c.PacketMark,
		KeepAlive: net.KeepAliveConfig{
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
