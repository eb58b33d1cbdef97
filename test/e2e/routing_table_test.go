package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"

	"ztun/test/lab"
)

const (
	recursive   = "attempted recursive call to ourselves"
	denied      = "connection closed due to policy rejection: explicitly denied by: default/deny-7777"
	nobody      = "connection failed: Connection refused (os error 111)"
	status401   = "http status: 401 Unauthorized"
	status503   = "http status: 503 Service Unavailable"
	unreachable = "io error: Network is unreachable (os error 101)"
)

// unhealthy makes workloads unhealthy.
func unhealthy(names ...string) func(*lab.WorldFile) {
	return func(f *lab.WorldFile) {
		for i := range f.Workloads {
			if slices.Contains(names, f.Workloads[i].Name) {
				f.Workloads[i].Status = "Unhealthy"
			}
		}
	}
}

func noUpstream(service string, port uint16) func(family) []outcome {
	return one(func(f family) outcome {
		to := f.vip(service, port)
		return f.early("a", to, "no healthy upstream: "+to)
	})
}

// selfCall is a tunnel to one of the proxy's own ports, which the other node turns down.
func selfCall(port uint16) scenario {
	return scenario{name: fmt.Sprintf("a pod calls %d of another", port), from: "a", to: pod("c", port),
		want: one(func(f family) outcome {
			in := f.inbound("a", "c", "", "", port)
			in.early, in.err = true, recursive
			return failed("ECONNREFUSED", f.outbound("a", "c", f.at("c", port), ""), status503, "CONNECT", in)
		})}
}

// outsider is a plaintext connection from a host to one of the proxy's own ports.
func outsider(port uint16) scenario {
	return scenario{name: fmt.Sprintf("a host calls %d of a pod", port), from: "h1", to: pod("c", port),
		want: one(func(f family) outcome {
			return outcome{refused: "ECONNREFUSED",
				hops: []hop{{node: f.N2, inbound: true, early: true, from: f.ip("h1"), at: f.at("c", port), err: recursive}}}
		})}
}

// plaintext is a connection from outside of the mesh to pod c.
func (f family) plaintext(from, who string, port uint16) outcome {
	says := greeting("c", port, f.ip(from), "")
	return outcome{says: says,
		hops: []hop{{node: f.N2, inbound: true, from: f.ip(from), src: who, dst: "c", at: f.at("c", port), port: port,
			reply: says}}}
}

func closedPort(f family) outcome {
	in := f.inbound("a", "c", f.at("c", 9998), "", 9998)
	in.err, in.flag = nobody, "CONNECT"
	return failed("ECONNREFUSED", f.outbound("a", "c", f.at("c", 9998), ""), status503, "CONNECT", in)
}

func deniedPort(f family) outcome {
	in := f.inbound("a", "c", f.at("c", 7777), "", 7777)
	in.err, in.flag = denied, "DENY"
	return failed("ECONNREFUSED", f.outbound("a", "c", f.at("c", 7777), ""), status401, "CONNECT", in)
}

// noRoute is a plain connection to an address that is the mesh's no more, and nobody else's either.
func noRoute(from, refused string, to func(family) string) func(family) []outcome {
	return one(func(f family) outcome {
		return failed(refused, hop{node: f.places[from].node, from: f.ip(from), src: from, at: to(f)}, unreachable, "CONNECT")
	})
}

// ghost is a pod of the mesh that is not there: node n2 says that the host is unreachable.
func ghost(f family) outcome {
	err, refused := "io error: No route to host (os error 113)", "EHOSTUNREACH"
	if !f.v4 { // RFC 4443 3.1: what Linux answers for an unreachable route is code 0, no route
		err, refused = unreachable, "ENETUNREACH"
	}
	return failed(refused, f.outbound("a", "ghost", f.at("ghost", 9000), ""), err, "CONNECT")
}

// proxied is a connection to a service whose waypoint is a pod with a PROXY tunnel.
func proxied(waypoint string, src func(f family) netip.Addr) func(family) []outcome {
	return one(func(f family) outcome {
		to := f.vip("via-"+waypoint, 80)
		says := greeting(waypoint, 15088, src(f), fmt.Sprintf(" proxy %v %s %s", f.ip("a"), to, identityOf(f.record("a"))))
		return f.sandwich("a", waypoint, to, "via-"+waypoint, f, 15088, says)
	})
}

func loopback(f family) netip.Addr {
	if f.v4 {
		return netip.MustParseAddr("127.0.0.1")
	}
	return netip.IPv6Loopback()
}

// resolved asks the pod's DNS proxy for a name and takes one of the answers.
func resolved(from, name string, port uint16) func(family) string {
	return func(f family) string {
		qtype := map[bool]uint16{true: dns.TypeA, false: dns.TypeAAAA}[f.v4]
		c, err := udpFrom(f.places[from].ns, netip.AddrPortFrom(loopback(f), 15053))
		must(f.t, err)
		defer c.Close()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		conn := &dns.Conn{Conn: c}
		must(f.t, conn.WriteMsg(new(dns.Msg).SetQuestion(name+".", qtype)))
		m, err := conn.ReadMsg()
		must(f.t, err)
		if len(m.Answer) != 2 {
			f.t.Fatalf("%s has %d addresses, want 2: %v", name, len(m.Answer), m)
		}
		// Which comes first is up to the server.
		rr := m.Answer[time.Now().UnixNano()/1000%2]
		var ip netip.Addr
		switch rr := rr.(type) {
		case *dns.A:
			ip, _ = netip.AddrFromSlice(rr.A.To4())
		case *dns.AAAA:
			ip, _ = netip.AddrFromSlice(rr.AAAA)
		}
		return lab.HostPort(ip, port)
	}
}

// connect is a CONNECT with wp's identity and an authority of one's choice, and with headers "name: value".
func connect(authority func(family) string, headers ...string) func(family) way {
	return func(f family) way {
		return func(ctx context.Context, ns *lab.NS, address string) (duplex, error) {
			h := http.Header{}
			for _, line := range headers {
				name, value, _ := strings.Cut(line, ": ")
				h.Add(name, value)
			}
			return openTunnel(ctx, ns, netip.MustParseAddrPort(address), authority(f),
				f.ca.client(f.t, identityOf(f.record("wp"))), h)
		}
	}
}

func text(s string) func(family) string { return func(family) string { return s } }

// byHostname is a CONNECT of the host wp to pod c that names a service and its port.
func byHostname(service, port, checklist string, app uint16) scenario {
	authority := service + domain + ":" + port
	return scenario{name: "CONNECT " + service + ":" + port + ", checklist " + checklist, from: "wp",
		via: connect(text(authority)), to: pod("c", 15008), want: one(func(f family) outcome {
			in := f.inbound("wp", "c", authority, service, app)
			in.named, in.reply = true, greeting("c", app, f.ip("wp"), "")
			return outcome{says: in.reply, hops: []hop{in}}
		})}
}

// badCONNECT is one of the host wp to pod c that is refused before anything is counted.
func badCONNECT(name string, status int, authority, why func(family) string) scenario {
	return scenario{name: name, from: "wp", via: connect(authority), to: pod("c", 15008),
		want: one(func(f family) outcome {
			in := f.inbound("wp", "c", "", "", 0)
			in.early, in.err = true, why(f)
			return outcome{refused: fmt.Sprint("status-", status), hops: []hop{in}}
		})}
}

func scenarios() []scenario {
	return []scenario{
		// Workloads.
		// checklist 17, 142, 144
		{name: "a pod by its address", from: "a", to: pod("c", 9000), want: one(func(f family) outcome {
			return f.tunnelled("a", "c", 9000, "")
		})},
		// checklist 18
		{name: "a pod on the same node", from: "a", to: pod("s", 9000), want: one(func(f family) outcome {
			return f.tunnelled("a", "s", 9000, "")
		})},
		// checklist 16
		{name: "a plaintext host", from: "a", to: pod("h2", 9000), want: one(func(f family) outcome {
			return f.plain("a", "h2", 9000, "h2", "")
		})},
		// checklist 55, 86
		{name: "a closed port of a pod", from: "a", to: pod("c", 9998), want: one(closedPort)},
		// checklist 87, 143
		{name: "a denied port of a pod", from: "a", to: pod("c", 7777), want: one(deniedPort)},
		{name: "a pod that is not there", from: "a", to: pod("ghost", 9000), want: one(ghost)},
		// checklist 45
		{name: "a pod that nobody knows calls", from: "u", to: pod("c", 9000), slow: 9 * time.Second, once: true,
			want: one(func(f family) outcome {
				return f.early("u", f.at("c", 9000), "failed to fetch information about local workload: u.default (u)")
			})},
		// checklist 13, 14
		{name: "a node by its address", from: "a", to: pod("hostnet", 9000), want: one(func(f family) outcome {
			return f.plain("a", "hostnet", 9000, "", "")
		})},

		// Services and their endpoints.
		{name: "a service of two endpoints", from: "a", to: vip("shop", 80), want: func(f family) []outcome { // checklist 19
			return []outcome{f.tunnelled("a", "c", 9000, "shop"), f.tunnelled("a", "d", 9000, "shop")}
		}},
		{name: "from another namespace", from: "o", to: vip("shop", 80), want: func(f family) []outcome {
			return []outcome{f.tunnelled("o", "c", 9000, "shop"), f.tunnelled("o", "d", 9000, "shop")}
		}},
		// checklist 32
		{name: "a named target port", from: "a", to: vip("named", 80), want: one(func(f family) outcome {
			return f.tunnelled("a", "c", 9001, "named")
		})},
		{name: "a target port of each endpoint", from: "a", to: vip("mapped", 80), want: func(f family) []outcome {
			return []outcome{f.tunnelled("a", "c", 9001, "mapped"), f.tunnelled("a", "d", 9002, "mapped")}
		}},
		// checklist 31
		{name: "a port that the service has not", from: "a", to: vip("shop", 82), want: noUpstream("shop", 82)},
		// checklist 28
		{name: "a service without endpoints", from: "a", to: vip("empty", 80), want: noUpstream("empty", 80)},
		// checklist 33
		{name: "a service of unhealthy endpoints", from: "a", to: vip("sick", 80), want: noUpstream("sick", 80)},
		// Endpoint e has a waypoint, for those that call it by its own address (checklist 22).
		// checklist 33
		{name: "a service that publishes them", from: "a", to: vip("lenient", 80), want: one(func(f family) outcome {
			return f.tunnelled("a", "e", 9000, "lenient")
		})},
		// checklist 34
		{name: "a service without capacity", from: "a", to: vip("idle", 80), want: noUpstream("idle", 80)},
		{name: "a service of plaintext hosts", from: "a", to: vip("plain", 80), want: one(func(f family) outcome {
			return f.plain("a", "h2", 9000, "h2", "plain")
		})},
		{name: "a headless service", from: "a", to: resolved("a", "headless"+domain, 9000), want: func(f family) []outcome {
			return []outcome{f.tunnelled("a", "c", 9000, ""), f.tunnelled("a", "d", 9000, "")}
		}},
		// checklist 35
		{name: "a service of IPv6 endpoints", from: "a", to: vip("six", 80), want: one(func(f family) outcome {
			o := f.only(false).tunnelled("a", "c", 9000, "six")
			o.hops[0].from = f.ip("a")
			return o
		})},
		{name: "a service of IPv4 endpoints", from: "a", to: vip("four", 80), want: one(func(f family) outcome {
			o := f.only(true).tunnelled("a", "c", 9000, "four")
			o.hops[0].from = f.ip("a")
			return o
		})},
		{name: "a range of addresses", from: "a", to: func(f family) string {
			return map[bool]string{true: "10.97.3.4:80", false: "[fd97::304]:80"}[f.v4]
		},
			want: one(func(f family) outcome { return f.tunnelled("a", "d", 9000, "range") })},
		// checklist 29
		{name: "a PASSTHROUGH service", from: "a", to: pod("x", 9000), want: one(func(f family) outcome {
			return f.plain("a", "x", 9000, "", "")
		})},
		{name: "a service of its namespace alone", from: "o", to: vip("secret", 80), want: one(func(f family) outcome {
			return f.tunnelled("o", "c", 9000, "secret")
		})},
		{name: "the same from another", from: "a", to: vip("secret", 80),
			want: noRoute("a", "ENETUNREACH", vip("secret", 80))},
		{name: "an address of two services, in the one's namespace", from: "a", to: vip("twin", 80),
			want: one(func(f family) outcome {
				return f.tunnelled("a", "c", 9001, "twin")
			})},
		{name: "in the other's", from: "o", to: vip("twin", 80), want: one(func(f family) outcome {
			return f.tunnelled("o", "d", 9002, "twin2")
		})},
		// checklist 15
		{name: "a service on the node's network", from: "a", to: vip("hostnet", 80), want: one(func(f family) outcome {
			return f.plain("a", "hostnet", 9000, "hostnet", "hostnet")
		})},
		// checklist 39
		{name: "a service that is a hostname", from: "a", to: vip("ext", 80), want: one(func(f family) outcome {
			o := f.plain("a", "x", 9000, "far", "ext")
			o.hops[0].lookup = "far.example.test"
			return o
		})},
		// checklist 40
		{name: "a service of another network without gateway", from: "a", to: vip("distant", 80),
			want: one(func(f family) outcome {
				return f.early("a", f.vip("distant", 80), "no valid routing destination for workload: lab//v1/Pod/default/abroad")
			})},

		// Locality, and back.
		{name: "the nearest endpoint", from: "a", to: vip("near", 80), want: one(func(f family) outcome {
			return f.tunnelled("a", "d", 9000, "near")
		})},
		{name: "the other one when it is ill", from: "a", to: vip("near", 80), world: unhealthy("d"),
			want: one(func(f family) outcome {
				return f.tunnelled("a", "c", 9000, "near")
			})},
		{name: "none when both are", from: "a", to: vip("near", 80), world: unhealthy("c", "d"),
			want: noUpstream("near", 80)},
		{name: "the nearest again", from: "a", to: vip("near", 80), want: one(func(f family) outcome {
			return f.tunnelled("a", "d", 9000, "near")
		})},
		// checklist 38
		{name: "no endpoint where it has to be", from: "a", to: vip("strict", 80), want: noUpstream("strict", 80)},
		{name: "an endpoint where it has to be", from: "a", to: vip("strict", 80), world: func(f *lab.WorldFile) {
			for i := range f.Workloads {
				if f.Workloads[i].Name == "c" {
					f.Workloads[i].Locality = &lab.Locality{Region: "r1", Zone: "z1"}
				}
			}
		}, want: one(func(f family) outcome { return f.tunnelled("a", "c", 9000, "strict") })},

		// Waypoints.
		// checklist 20, 48-52, 147; 2.3: the reference's family
		{name: "a waypoint by address", from: "a", to: vip("viaaddr", 80), want: one(func(f family) outcome {
			return f.throughWaypoint("a", f.vip("viaaddr", 80), "viaaddr", f.only(true), 15008)
		})},
		{name: "a waypoint on another port", from: "a", to: vip("viaport", 80), want: one(func(f family) outcome {
			return f.throughWaypoint("a", f.vip("viaport", 80), "viaport", f.only(true), 15019)
		})},
		{name: "a waypoint by service hostname", from: "a", to: vip("viahost", 80), want: one(func(f family) outcome {
			return f.throughWaypoint("a", f.vip("viahost", 80), "viahost", f, 15008)
		})},
		{name: "a port that only the waypoint knows", from: "a", to: vip("viahost", 4711), want: one(func(f family) outcome {
			return f.throughWaypoint("a", f.vip("viahost", 4711), "viahost", f, 15008)
		})},
		{name: "weights of waypoints", from: "a", to: vip("split", 80), want: one(func(f family) outcome { // checklist 27
			return f.throughWaypoint("a", f.vip("split", 80), "split", f, 15008)
		})},
		{name: "a workload's waypoint", from: "a", to: pod("walled", 9000), want: one(func(f family) outcome { // checklist 21
			return f.throughWaypoint("a", f.at("walled", 9000), "", f, 15008)
		})},
		// checklist 26
		{name: "a waypoint that nobody knows", from: "a", to: vip("lost", 80), want: one(func(f family) outcome {
			return f.early("a", f.vip("lost", 80), "unknown waypoint: default/gone"+domain)
		})},
		// checklist 56
		{name: "a waypoint that is not who it should be", from: "a", to: vip("impostor", 80),
			want: one(func(f family) outcome {
				out := f.outbound("a", "wp", f.vip("impostor", 80), "impostor")
				out.at = f.only(true).at("wp", 15018)
				return failed("ECONNREFUSED", out,
					"io error: identity verification error: peer did not present the expected SAN "+
						"(spiffe://cluster.local/ns/default/sa/wp), got spiffe://cluster.local/ns/default/sa/impostor", "CONNECT")
			})},
		// checklist 78
		{name: "a pod as a service's waypoint", from: "a", to: vip("viasand", 80), want: one(func(f family) outcome {
			return f.sandwich("a", "s", f.vip("viasand", 80), "viasand", f, 80, greeting("s", 80, f.ip("a"), ""))
		})},
		// checklist 24
		{name: "the waypoint calls its own service", from: "s", to: vip("viasand", 80), want: one(func(f family) outcome {
			return f.sandwich("s", "s", f.vip("viasand", 80), "viasand", f, 80, greeting("s", 80, f.ip("s"), ""))
		})},
		{name: "a pod as a workload's waypoint", from: "a", to: pod("e", 9000), want: one(func(f family) outcome {
			wp := f.only(true)
			o := f.sandwich("a", "s", f.at("e", 9000), "", wp, 9000, greeting("s", 9000, wp.ip("a"), ""))
			return o
		})},
		// checklist 23
		{name: "the waypoint calls its workload", from: "s", to: pod("e", 9000), want: one(func(f family) outcome {
			return f.tunnelled("s", "e", 9000, "")
		})},
		// checklist 100
		{name: "a PROXY tunnel on loopback", from: "a", to: vip("via-p", 80), want: proxied("p", loopback)},
		// checklist 101
		{name: "a PROXY tunnel on the pod's address", from: "a", to: vip("via-q", 80),
			want: proxied("q", func(f family) netip.Addr {
				return f.ip("a")
			})},
		{name: "a tunnel without PROXY", from: "a", to: vip("via-z", 80), want: one(func(f family) outcome { // checklist 102
			return f.sandwich("a", "z", f.vip("via-z", 80), "via-z", f, 15089, greeting("z", 15089, f.ip("a"), ""))
		})},
		// checklist 103
		{name: "a PROXY tunnel called by hostname", from: "wp", via: connect(text("tunnelled"+domain+":80"),
			`forwarded: for="192.0.2.1:1";host=tunnelled`+domain), to: pod("p", 15008), want: one(func(f family) outcome {
			header := " proxy unspecified "
			if f.v4 { // the service's IPv4 address is what it is called by; there are no headers of mixed families
				header = fmt.Sprintf(" proxy %v %s ", f.ip("wp"), f.vip("tunnelled", 80))
			}
			in := f.inbound("wp", "p", "tunnelled"+domain+":80", "tunnelled", 15088)
			in.named = true
			in.reply = greeting("p", 15088, loopback(f), header+identityOf(f.record("wp")))
			return outcome{says: in.reply, hops: []hop{in}}
		})},

		// checklist 104: what counts is the tunnel's port
		{name: "a denied port behind a tunnel", from: "a", to: vip("via-z", 80), world: func(f *lab.WorldFile) {
			f.Policies = append(slices.Clone(f.Policies), lab.Policy{Name: "deny-tunnel", Namespace: "default",
				Scope: "Namespace", Action: "Deny",
				Rules: [][][]map[string]any{{{{"destinationPorts": []int{15089}}}}}})
		}, want: one(func(f family) outcome {
			o := f.sandwich("a", "z", f.vip("via-z", 80), "via-z", f, 15089, "")
			o.hops[1].err, o.hops[1].flag = strings.ReplaceAll(denied, "deny-7777", "deny-tunnel"), "DENY"
			return failed("ECONNREFUSED", o.hops[0], status401, "CONNECT", o.hops[1])
		})},

		// CONNECT by others than ztun.
		byHostname("shop", "80", "81", 9000), byHostname("named", "80", "82", 9001),
		// checklist 80
		badCONNECT("a service that nobody knows", 503, text("gone"+domain+":80"),
			text("no service or workload for hostname: gone"+domain)),
		// checklist 83
		badCONNECT("a port that leads nowhere", 503, text("shop"+domain+":82"),
			text("requested service shop"+domain+":82 found, but cannot resolve port")),
		// checklist 77
		badCONNECT("the address of another pod", 400, pod("d", 9000), func(f family) string {
			return fmt.Sprintf("ip mismatch: %v != %v", f.ip("c"), f.ip("d"))
		}),
		// checklist 97; 10.3: then app is the workload's name
		{name: "a client known by its baggage alone", from: "x", to: pod("c", 15008),
			via: connect(pod("c", 9000),
				"baggage: k8s.cluster.name=far,k8s.namespace.name=there,k8s.job.name=batch,service.name=batch-app,service.version=v7,cloud.region=r9,cloud.availability_zone=z9"),
			want: one(func(f family) outcome {
				in := f.inbound("x", "c", f.at("c", 9000), "", 9000)
				in.src, in.reply = "", greeting("c", 9000, f.ip("x"), "")
				in.told = &lab.Workload{Name: "batch-app", Namespace: "there", ClusterID: "far", WorkloadName: "batch",
					CanonicalName: "batch-app", CanonicalRevision: "v7",
					Locality: &lab.Locality{Region: "r9", Zone: "z9"}}
				return outcome{says: in.reply, hops: []hop{in}}
			})},

		// Calls to oneself and to the proxy.
		// checklist 11
		{name: "itself through its service", from: "a", to: vip("own", 80), want: one(func(f family) outcome {
			return f.tunnelled("a", "a", 9000, "own")
		})},
		{name: "itself by its address", from: "a", to: pod("a", 9000), want: one(func(f family) outcome {
			return outcome{says: greeting("a", 9000, f.ip("a"), "")}
		})},
		{name: "its own loopback", from: "a", to: func(f family) string {
			return lab.HostPort(loopback(f), 15001)
		}, want: one(func(f family) outcome { return outcome{refused: "ECONNREFUSED"} })},
		selfCall(15001), selfCall(15006), selfCall(15008), selfCall(15080), // checklist 47, 84
		outsider(15001), outsider(15006), // checklist 109
		// checklist 91
		{name: "a host calls 15008 of a pod", from: "h1", to: pod("c", 15008), want: one(func(f family) outcome {
			return outcome{refused: "closed ECONNRESET",
				hops: []hop{{node: f.N2, inbound: true, early: true, from: f.ip("h1"), at: f.at("c", 15008),
					err: "tls handshake error: tls: first record does not look like a TLS handshake"}}}
		})},

		// Plaintext from outside.
		// checklist 107
		{name: "a host calls a pod", from: "h1", to: pod("c", 9000), want: one(func(f family) outcome {
			return f.plaintext("h1", "h1", 9000)
		})},
		{name: "a host that nobody knows calls a pod", from: "x", to: pod("c", 9000), want: one(func(f family) outcome {
			return f.plaintext("x", "", 9000)
		})},
		{name: "a host calls a denied port of a pod", from: "h1", to: pod("c", 7777), want: one(func(f family) outcome {
			o := f.plaintext("h1", "h1", 7777)
			return failed("ECONNREFUSED", o.hops[0], denied, "DENY")
		})},
		{name: "a host calls a closed port of a pod", from: "h1", to: pod("c", 9998), want: one(func(f family) outcome {
			o := f.plaintext("h1", "h1", 9998)
			return failed("ECONNREFUSED", o.hops[0], nobody, "CONNECT")
		})},

		// SOCKS5.
		{name: "SOCKS5 to a service", from: "a", via: socks, to: vip("named", 80), want: one(func(f family) outcome {
			return f.overSOCKS(f.tunnelled("a", "c", 9001, "named"), "")
		})},
		{name: "SOCKS5 to a service by name", from: "a", via: socks, to: func(family) string {
			return "named" + domain + ":80"
		},
			want: one(func(f family) outcome { return f.overSOCKS(f.tunnelled("a", "c", 9001, "named"), "") })},
		// checklist 113
		{name: "SOCKS5 to a name that is none", from: "a", via: socks, to: func(family) string {
			return "gone" + domain + ":80"
		}, want: one(func(f family) outcome { return outcome{refused: "socks-4"} })},
		// 112, but truthful
		{name: "SOCKS5 to a closed port", from: "a", via: socks, to: pod("c", 9998), want: one(func(f family) outcome {
			return f.overSOCKS(closedPort(f), "socks-5")
		})},
		{name: "SOCKS5 to a denied port", from: "a", via: socks, to: pod("c", 7777), want: one(func(f family) outcome {
			return f.overSOCKS(deniedPort(f), "socks-2")
		})},
		{name: "SOCKS5 to a pod that is not there", from: "a", via: socks, to: pod("ghost", 9000),
			want: one(func(f family) outcome {
				return f.overSOCKS(ghost(f), map[bool]string{true: "socks-4", false: "socks-3"}[f.v4])
			})},
		{name: "SOCKS5 to a service without endpoints", from: "a", via: socks, to: vip("empty", 80),
			want: one(func(f family) outcome {
				return f.overSOCKS(noUpstream("empty", 80)(f)[0], "socks-5")
			})},
		// checklist 46
		{name: "SOCKS5 to the proxy itself", from: "a", via: socks, to: func(f family) string {
			return lab.HostPort(loopback(f), 15001)
		}, want: one(func(f family) outcome {
			return f.overSOCKS(f.early("a", lab.HostPort(loopback(f), 15001), recursive), "socks-2")
		})},
	}
}

// weights opens 10,000 connections to a service whose endpoints have capacities 3 and 2: within 5 % of the weights,
// and counted as such.
func weights(t *testing.T, r *routing) {
	const n, workers = 10_000, 8
	r.t = t
	if r.changed {
		r.apply(nil)
	}
	f := family{r, true}
	to := f.vip("shop", 80)
	before := r.series(r.N2)
	var mu sync.Mutex
	who := map[string]int{}
	var work sync.WaitGroup
	start := time.Now()
	for range workers {
		work.Go(func() {
			// Sockets are made within, by this goroutine's own thread.
			err := f.places["a"].ns.Do(func() error {
				b := make([]byte, 1)
				for range n / workers {
					c, err := net.DialTimeout("tcp", to, 10*time.Second)
					if err != nil {
						return err
					}
					c.SetDeadline(time.Now().Add(10 * time.Second))
					_, err = c.Read(b)
					c.Close()
					if err != nil {
						return err
					}
					mu.Lock()
					who[string(b)]++
					mu.Unlock()
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	work.Wait()
	took := time.Since(start)
	counted := map[string]float64{}
	eventually(t, 10*time.Second, func() error {
		clear(counted)
		sum := 0.0
		for name, v := range r.series(r.N2) {
			if !strings.HasPrefix(name, "istio_tcp_connections_closed_total{") {
				continue
			}
			for _, pod := range []string{"c", "d"} {
				if strings.Contains(name, `destination_workload="`+pod+`-deploy"`) {
					counted[pod] += v - before[name]
					sum += v - before[name]
				}
			}
		}
		if sum != n {
			return fmt.Errorf("%v connections are counted", counted)
		}
		return nil
	})
	j, _ := json.Marshal(who)
	t.Logf("%d connections in %v: %s", n, took.Round(time.Millisecond), j)
	for pod, share := range map[string]float64{"c": 0.6, "d": 0.4} {
		if got := float64(who[pod]) / n; math.Abs(got-share) > 0.05*share {
			t.Errorf("%s has %.4f of the connections, want %v within 5 %%", pod, got, share)
		}
		if counted[pod] != float64(who[pod]) {
			t.Errorf("%s answered %d connections, %v are counted", pod, who[pod], counted[pod])
		}
	}
}
