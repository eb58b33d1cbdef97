package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"ztun/test/lab"
)

// scenario is one connection, in words: who calls what, by which way, and what may become of it.
type scenario struct {
	name  string
	world func(*lab.WorldFile)     // how the base world is changed first
	from  string                   // the name of a pod or host
	via   func(f family) way       // nil: a socket
	to    func(f family) string    // address
	want  func(f family) []outcome // alternatives, each of which has to come in turn
	slow  time.Duration            // how long a refusal may take; default 2 s
	once  bool                     // it takes time: over IPv4 with a workload file, over IPv6 with a control plane
}

// outcome is what the client is told, and what the nodes on the way say of it.
type outcome struct {
	says    string // everything that came before the echo
	refused string // or how it was refused: alternatives, separated by blanks
	hops    []hop
}

// way opens a connection from a namespace to an address.
type way func(ctx context.Context, ns *lab.NS, address string) (duplex, error)

// family is the world seen over IPv4 or IPv6.
type family struct {
	*routing
	v4 bool
}

// ip of a pod, host or record.
func (f family) ip(name string) netip.Addr { return pick(f.places[name].ips, f.v4) }

func (f family) at(name string, port uint16) string { return lab.HostPort(f.ip(name), port) }

// vip is an address of a service.
func (f family) vip(service string, port uint16) string {
	for _, s := range f.service(service).VIPs {
		if ip := netip.MustParseAddr(strings.TrimPrefix(s, "/")); ip.Is4() == f.v4 {
			return lab.HostPort(ip, port)
		}
	}
	f.t.Fatal(service, " has no address")
	return ""
}

func (f family) only(v4 bool) family { return family{f.routing, v4} }

// outbound is what the client's node says of a tunnel to a workload's 15008.
func (f family) outbound(from, to, authority, service string) hop {
	return hop{node: f.places[from].node, from: f.ip(from), src: from, dst: to, at: f.at(to, 15008), hbone: authority,
		service: service}
}

// inbound is what the destination's node says of a tunnel.
func (f family) inbound(from, to, authority, service string, port uint16) hop {
	return hop{node: f.places[to].node, inbound: true, from: f.ip(from), src: from, dst: to, at: f.at(to, 15008),
		hbone: authority, service: service, port: port}
}

// tunnelled is a connection by HBONE to a workload's port.
func (f family) tunnelled(from, to string, port uint16, service string) outcome {
	says := greeting(to, port, f.ip(from), "")
	hops := []hop{f.outbound(from, to, f.at(to, port), service), f.inbound(from, to, f.at(to, port), service, port)}
	for i := range hops {
		hops[i].reply = says
	}
	return outcome{says: says, hops: hops}
}

// plain is a connection without a tunnel; who is the name of the record, "" if it goes to nobody that the mesh knows.
func (f family) plain(from, to string, port uint16, who, service string) outcome {
	says := greeting(to, port, f.ip(from), "")
	return outcome{says: says,
		hops: []hop{{node: f.places[from].node, from: f.ip(from), src: from, dst: who, at: f.at(to, port), service: service,
			reply: says}}}
}

// early is a connection that is refused before anything is tried.
func (f family) early(from, to, why string) outcome {
	return outcome{refused: "ECONNREFUSED",
		hops: []hop{{node: f.places[from].node, early: true, from: f.ip(from), at: to, err: why}}}
}

// throughWaypoint is a connection that the host wp carries on to pod c. It reaches wp at a port, over a family.
func (f family) throughWaypoint(from, authority, service string, wp family, port uint16) outcome {
	w := f.record(from)
	host := ""
	if service != "" {
		host = f.service(service).Hostname
	}
	baggage :=
		fmt.Sprintf("k8s.cluster.name=%s,k8s.namespace.name=%s,k8s.deployment.name=%s,service.name=%s,service.version=%s",
			w.ClusterID, w.Namespace, w.WorkloadName, w.CanonicalName, w.CanonicalRevision)
	if l := w.Locality; l != nil {
		baggage += ",cloud.region=" + l.Region + ",cloud.availability_zone=" + l.Zone
	}
	client := lab.HostPort(f.ip(from), 1)
	first := "wp " + askedText(authority, identityOf(w), client[:len(client)-2]+" "+host, baggage,
		"baggage,forwarded,traceparent") + "\n"
	second := greeting("c", 9000, f.ip("wp"), "")
	out, in := f.outbound(from, "wp", authority, service), f.inbound("wp", "c", f.at("c", 9000), "", 9000)
	out.at, out.reply, in.reply = wp.at("wp", port), first+second, second
	return outcome{says: first + second, hops: []hop{out, in}}
}

// sandwich is a connection that a pod takes as the waypoint of what was called.
func (f family) sandwich(from, to, authority, service string, wp family, port uint16, says string) outcome {
	out, in := f.outbound(from, to, authority, service), wp.inbound(from, to, authority, service, port)
	out.at, out.reply, in.reply = wp.at(to, 15008), says, says
	return outcome{says: says, hops: []hop{out, in}}
}

// failed is an outbound connection by tunnel that ended with an error, and what the other node says of it.
func failed(refused string, out hop, err, flag string, rest ...hop) outcome {
	out.err, out.flag = err, flag
	if (err == status401 || err == status503) && len(rest) > 0 {
		out.err += ": " + rest[0].err // the refuser says why (x-ztun-reason)
	}
	return outcome{refused: refused, hops: append([]hop{out}, rest...)}
}

func one(f func(f family) outcome) func(family) []outcome {
	return func(x family) []outcome { return []outcome{f(x)} }
}

func pod(name string, port uint16) func(family) string {
	return func(f family) string { return f.at(name, port) }
}

func vip(service string, port uint16) func(family) string {
	return func(f family) string { return f.vip(service, port) }
}

// call does the one thing that every scenario does: connect, send, end the direction, and read to the end.
func (f family) call(s scenario, address string) (says, refused string, took time.Duration) {
	ctx, cancel := context.WithTimeout(f.ctx, 20*time.Second)
	defer cancel()
	open := way(func(ctx context.Context, ns *lab.NS, address string) (duplex, error) {
		c, err := ns.Dial(ctx, "tcp", address)
		if err != nil {
			return nil, err
		}
		c.SetDeadline(time.Now().Add(20 * time.Second))
		return c.(*net.TCPConn), nil
	})
	if s.via != nil {
		open = s.via(f)
	}
	start := time.Now()
	c, err := open(ctx, f.places[s.from].ns, address)
	took = time.Since(start)
	if err != nil {
		return "", whyRefused(err), took
	}
	defer c.Close()
	// On a connection that is refused this late, either may meet the end of it.
	_, werr := io.WriteString(c, payload)
	if werr == nil {
		werr = c.CloseWrite()
	}
	b, err := io.ReadAll(c)
	switch {
	case err != nil:
		return "", whyRefused(err), took
	case len(b) == 0 && werr == nil:
		return "", "closed", took
	case werr != nil:
		return "", whyRefused(werr), took
	case !strings.HasSuffix(string(b), payload):
		return fmt.Sprintf("%.200q, which does not end with what was sent", b), "", took
	}
	return strings.TrimSuffix(string(b), payload), "", took
}

func whyRefused(err error) string {
	for errno, name := range map[syscall.Errno]string{
		syscall.ECONNREFUSED: "ECONNREFUSED", syscall.EHOSTUNREACH: "EHOSTUNREACH", syscall.ENETUNREACH: "ENETUNREACH",
		syscall.ECONNRESET: "ECONNRESET", syscall.EPIPE: "ECONNRESET",
	} {
		if errors.Is(err, errno) {
			return name
		}
	}
	return strings.ReplaceAll(err.Error(), " ", "-")
}

// socksError is a SOCKS5 reply other than success.
type socksError byte

func (e socksError) Error() string { return fmt.Sprintf("socks-%d", byte(e)) }

// socks asks the pod's SOCKS5 port on the loopback of the family for host:port.
func socks(f family) way {
	return func(ctx context.Context, ns *lab.NS, address string) (duplex, error) {
		proxy := map[bool]string{true: "127.0.0.1:15080", false: "[::1]:15080"}[f.v4]
		c, err := ns.Dial(ctx, "tcp", proxy)
		if err != nil {
			return nil, err
		}
		c.SetDeadline(time.Now().Add(20 * time.Second))
		host, port, _ := net.SplitHostPort(address)
		var n uint16
		fmt.Sscan(port, &n)
		q := []byte{5, 1, 0, 5, 1, 0}
		if ip, err := netip.ParseAddr(host); err != nil {
			q = append(append(q, 3, byte(len(host))), host...)
		} else if ip.Is4() {
			q = append(append(q, 1), ip.AsSlice()...)
		} else {
			q = append(append(q, 4), ip.AsSlice()...)
		}
		b := make([]byte, 2+4+6)
		if _, err = c.Write(append(q, byte(n>>8), byte(n))); err == nil {
			_, err = io.ReadFull(c, b)
		}
		if err == nil && b[3] != 0 {
			err = socksError(b[3])
		}
		if err != nil {
			c.Close()
			return nil, err
		}
		return c.(*net.TCPConn), nil
	}
}

// overSOCKS is an outcome as it is when the client comes by the loopback.
func (f family) overSOCKS(o outcome, reply string) outcome {
	if o.refused != "" {
		o.refused = reply
	}
	o.hops[0].from = netip.MustParseAddr(map[bool]string{true: "127.0.0.1", false: "::1"}[f.v4])
	return o
}

// run is the body of every scenario.
func (s scenario) run(t *testing.T, r *routing) {
	if s.world != nil || r.changed {
		r.apply(s.world)
	}
	body := func(t *testing.T, v4 bool) {
		r.t = t
		f := family{r, v4}
		want := s.want(f)
		limit := 2 * time.Second
		if s.slow > 0 {
			limit = s.slow
		}
		seen := map[int]bool{}
		for try := 0; len(seen) < len(want); try++ {
			if try == 100 {
				t.Fatalf("after %d connections only %d of %d outcomes were seen", try, len(seen), len(want))
			}
			says, refused, took := f.call(s, s.to(f))
			i := 0
			for ; i < len(want); i++ {
				if says == want[i].says && (refused == want[i].refused || refused != "" &&
					strings.Contains(" "+want[i].refused+" ", " "+refused+" ")) {
					break
				}
			}
			if i == len(want) {
				t.Errorf("answered by %q, refused %q; want one of:", says, refused)
				for _, o := range want {
					t.Errorf("answered by %q, refused %q", o.says, o.refused)
				}
				r.expect(t, want[0].hops) // what the nodes say may explain it
				return
			}
			if took > limit {
				t.Errorf("that took %v", took)
			}
			seen[i] = true
			r.expect(t, want[i].hops)
			if t.Failed() {
				return
			}
		}
		f.agrees(t, s, want)
	}
	if s.once {
		body(t, r.control == nil)
	} else {
		families(t, body)
	}
}

// TestRouting: where connections go, for everything that a connection can be made to, with both nodes as witnesses.
// The same scenarios with a workload file and with `ztun control`, over IPv4 and IPv6, and those of a pod's own by a
// user's `ztun run` in its place.
func TestRouting(t *testing.T) {
	for _, mode := range []string{"file", "control"} {
		t.Run(mode, func(t *testing.T) {
			r := newRouting(t, mode == "control")
			for _, s := range scenarios() {
				t.Run(strings.ReplaceAll(s.name, " ", "-"), func(t *testing.T) { s.run(t, r) })
			}
			if mode == "file" {
				t.Run("weights", func(t *testing.T) { weights(t, r) })
				t.Run("rootless", func(t *testing.T) { rootlessRoutes(t, r) })
			}
		})
	}
}
