package main

import (
	"errors"
	"net"
	"net/netip"
	"time"

	"ztun/admin"
	"ztun/proxy"
)

// acceptWait is the longest pause of an accept loop after failures: long enough not to burn a processor, short enough that nobody who
// waits in the listener's queue repeats his SYN meanwhile.
const acceptWait = 500 * time.Millisecond

// serveMesh accepts HBONE connections for all pods until the listener is closed.
func (m *podManager) serveMesh(ln *net.TCPListener) error {
	delay, said := time.Duration(0), time.Time{}
	for {
		conn, err := ln.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			// Out of file descriptors, mostly (the machine's: ours are shared out): accepting again at once would only burn the processor.
			delay = min(max(2*delay, 5*time.Millisecond), acceptWait)
			if now := time.Now(); now.Sub(said) > 10*time.Second {
				said = now
				m.log.Warn("accept on port 15008 failed, will be tried again", "error", err)
			}
			time.Sleep(delay)
			continue
		}
		delay = 0
		local := conn.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
		to, ref, ok := m.door(local)
		if !ok || m.leaving.Load() {
			if !ok {
				m.unknown.Add(1)
			}
			conn.SetLinger(0)
			conn.Close()
			continue
		}
		place := m.fds.inbound(ref, conn)
		if place == nil {
			conn.SetLinger(0)
			conn.Close()
			continue
		}
		go m.panics.Func("a connection to port 15008", func() {
			defer place.release()
			to.ServeMesh(conn)
		}, nil)()
	}
}

// door is who serves the mesh at an address: the pod that has it, or the daemon itself.
func (m *podManager) door(a netip.Addr) (*proxy.Proxy, admin.PodRef, bool) {
	if p := (*m.byAddr.Load())[a]; p != nil {
		return p.proxy, refOf(p.spec), true
	}
	if s := m.self.Load(); s.owns(a) {
		return s.proxy, refOf(s.spec), true
	}
	return nil, admin.PodRef{}, false
}
