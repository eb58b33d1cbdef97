package main

import (
	"errors"
	"net"
	"path/filepath"

	"ztun/cmd/attach"
	"ztun/cmd/attach/dedicated"
	"ztun/cmd/attach/isolated"
	"ztun/cmd/attach/redirected"
	"ztun/cmd/attach/rootless"
	"ztun/cmd/attach/steered"
	"ztun/netstack"
	"ztun/tun/netns"
)

// chooseKind is how this daemon attaches pods: the only place that knows which ways there are.
func (d *daemon) chooseKind() attach.Kind {
	c := d.c
	o := attach.Options{
		NodeTUN: c.Attach.NodeTUN, MTU: c.Attach.MTU, IPv6: c.Net.IPv6, Plain: c.Attach.Plain,
		Record: hostRecord(c.State.Dir), DNS: c.DNS.Proxy,
		Socket: c.meshSocket(), Stack: c.stack(),
		Descriptors: d.fds, Store: d.store, Self: d.selfDoor, Report: d.report, Panics: d.panics, Serve: d.serve,
		Logger: d.log.Logger,
	}
	o.Stack.Datagrams = c.datagrams(d.know)
	switch {
	case c.Mode.Rootless:
		d.ports.kind = rootless.New(o, *d.ports.inbound(d.know.View, d.nameservers))
		return d.ports.kind
	case c.Mode.Dedicated:
		return dedicated.New(o)
	}
	switch c.Attach.Steering {
	case redirectedPods:
		own := c.Proxy.OriginalSource
		return redirected.New(o, own != nil && !*own)
	case steeredPods, rulesPods:
		k := steered.New(o, c.Attach.Native, c.Attach.Steering == rulesPods)
		if !c.isolates() {
			return k
		}
		return nodeKinds{isolated.New(o), k}
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
	return netns.SocketOptions{UserTimeout: c.userTimeout(), NotSentLowat: notSentLowat, Mark: c.Net.PacketMark,
		ReusePort: c.Attach.Steering == redirectedPods && c.Attach.PortReuse,
		KeepAlive: net.KeepAliveConfig{
			Enable: c.Net.KeepaliveEnabled, Idle: c.Net.KeepaliveTime, Interval: c.Net.KeepaliveInterval,
			Count: int(c.Net.KeepaliveRetries),
		}}
}

// stack is what the stacks of all pods have in common.
func (c *Config) stack() netstack.Config {
	s := c.Stack
	s.KeepaliveOff, s.KeepaliveIdle, s.KeepaliveInterval = !c.Net.KeepaliveEnabled, c.Net.KeepaliveTime,
		c.Net.KeepaliveInterval
	s.KeepaliveCount, s.UserTimeout = int(c.Net.KeepaliveRetries), c.userTimeout()
	s.Shortcuts = c.Proxy.Shortcuts && c.Attach.Steering == isolatedPods
	return s
}
