package e2e

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"ztun/test/lab"
)

// routing is a world with every kind of destination that the mesh knows.
//
//	n1: pods a, o (namespace other), s (a waypoint that is a pod), p (PROXY tunnel on loopback), u (nobody knows
//	    it); host h1
//	n2: pods c, d, e (behind s), q (PROXY tunnel on the pod's address), z (tunnel NONE);
//	    hosts h2, x (nobody knows it), wp (a waypoint of its own)
//
// Everything that a name such as "c" needs is looked up in places; what the mesh knows of it, in file.
type routing struct {
	*mesh
	control *controlled // nil: both nodes read one workload file
	base    lab.WorldFile
	file    lab.WorldFile // in force
	changed bool
	gen     int
	places  map[string]place
	logs    map[*lab.Node]int                // bytes of the log that were looked at
	counted map[*lab.Node]map[string]float64 // series at the last look
	ca      *testCA
}

type place struct {
	ns   *lab.NS
	ips  []netip.Addr
	node *lab.Node
}

const domain = ".default.svc.cluster.local"

// newRouting starts the world, fed by a file or by `ztun control`.
func newRouting(t *testing.T, control bool) *routing {
	t.Helper()
	needTool(t, "unshare")
	r := &routing{mesh: newMesh(t, meshOptions{noStart: true}), places: map[string]place{}, logs: map[*lab.Node]int{},
		counted: map[*lab.Node]map[string]float64{}}
	add := func(n *lab.Node, p lab.Pod) {
		_, err := r.AddPod(n, p)
		must(t, err)
	}
	add(r.N1, lab.Pod{Name: "o", Namespace: "other"})
	for _, name := range []string{"s", "p", "u"} {
		add(r.N1, lab.Pod{Name: name})
	}
	for _, name := range []string{"d", "e", "q", "z"} {
		add(r.N2, lab.Pod{Name: name})
	}
	r.host(r.N2, "x")
	r.host(r.N2, "wp")
	for _, p := range r.Pods() {
		r.places[p.Name] = place{p.NS, p.IPs, p.Node}
	}
	for _, h := range r.Hosts() {
		r.places[h.Name] = place{h.NS, h.IPs, h.Node}
	}
	r.places["hostnet"] = place{r.N2.NS, []netip.Addr{r.N2.Addr4, r.N2.Addr6}, r.N2}
	addr := netip.MustParseAddr
	r.places["ghost"] = place{nil, []netip.Addr{addr("10.91.2.99"), addr("fd91:0:0:2::99")}, r.N2}
	r.places["walled"] = place{nil, []netip.Addr{addr("10.91.2.98"), addr("fd91:0:0:2::98")}, r.N2}
	r.base = r.routingWorld()

	if control {
		r.startControlled()
	} else {
		must(t, r.WriteWorld(r.base))
		_, err := r.CADir(r.ctx)
		must(t, err)
		r.ca = loadCA(t, r.Path("ca"))
		r.startNodes(nil)
	}
	for _, p := range r.Pods() {
		must(t, r.Attach(r.ctx, p))
	}
	r.apply(nil)
	r.startApps()
	for _, n := range r.Nodes() {
		r.counted[n] = r.series(n)
	}
	return r
}

func (r *routing) startControlled() {
	c := &controlled{mesh: r.mesh, dir: r.Path("control")}
	r.control = c
	_, err := c.Ztun(c.ctx, nil, "control", "init", c.dir)
	must(r.t, err)
	must(r.t, os.Remove(filepath.Join(c.dir, "mesh", "example.yaml")))
	c.write("world.yaml", r.base)
	c.startControl()
	r.ca = loadCA(r.t, filepath.Join(c.dir, "ca"))
	r.startNodes(func(n *lab.Node) map[string]string {
		cred, address := r.Path("cred-"+n.Name), fmt.Sprintf("https://%s:%d", r.N1.Addr4, controlPort)
		_, err := c.Ztun(c.ctx, nil, "control", "join", "--dir", c.dir, "--node", n.Name, "--out", cred)
		must(r.t, err)
		return map[string]string{"LOCAL_XDS_PATH": lab.Unset, "LOCAL_CA_DIR": lab.Unset, "XDS_ADDRESS": address,
			"CA_ADDRESS": address, "ZTUN_CONTROL_CREDENTIALS": cred}
	})
}

// startNodes starts both daemons, each in a mount namespace in which /etc/hosts knows where far.example.test is:
// workloads with a hostname are looked up by the daemon. What the mesh does not know is asked of a nameserver on h1,
// which knows nothing of it either.
func (r *routing) startNodes(more func(*lab.Node) map[string]string) {
	x := r.places["x"]
	hosts := "127.0.0.1 localhost\n"
	for _, ip := range x.ips {
		hosts += ip.String() + " far.example.test\n"
	}
	must(r.t, os.WriteFile(r.Path("hosts"), []byte(hosts), 0o644))
	newNameserver(r.t, r.h1.NS, r.h1.IPs)
	must(r.t, os.WriteFile(r.Path("resolv.conf"), fmt.Appendf(nil, "nameserver %s\n", r.h1.V4()), 0o644))
	bin := r.Path("ztun-with-etc")
	must(r.t, os.WriteFile(bin, fmt.Appendf(nil, `#!/bin/sh
exec unshare -m --propagation slave sh -c 'mount --bind %s /etc/hosts && mount --bind %s /etc/resolv.conf && exec %s "$@"' sh "$@"
`, r.Path("hosts"), r.Path("resolv.conf"), r.Bin()), 0o755))
	for i, n := range r.Nodes() {
		env := map[string]string{"UNSTABLE_ENABLE_SOCKS5": "true", "LOCALHOST_APP_TUNNEL": []string{"true", "false"}[i]}
		if more != nil {
			for k, v := range more(n) {
				env[k] = v
			}
		}
		_, err := r.StartDaemon(r.ctx, n, lab.DaemonOptions{Env: env, Bin: bin})
		must(r.t, err)
	}
}

// routingWorld is what the mesh is told. Nothing is left to defaults that file and control plane do not share.
func (r *routing) routingWorld() lab.WorldFile {
	t := r.t
	var f lab.WorldFile
	for _, w := range r.DefaultWorld().Workloads {
		if w.Name != "x" && w.Name != "u" {
			f.Workloads = append(f.Workloads, w)
		}
	}
	record := func(name, protocol string, ips bool) {
		w := lab.Workload{UID: "lab//v1/Pod/default/" + name, Name: name, Namespace: "default", ServiceAccount: name,
			Protocol: protocol, Node: "n2", Status: "Healthy"}
		if ips {
			for _, ip := range r.places[name].ips {
				w.WorkloadIPs = append(w.WorkloadIPs, ip.String())
			}
		}
		f.Workloads = append(f.Workloads, w)
	}
	record("hostnet", "TCP", true)
	record("ghost", "HBONE", true)
	record("walled", "HBONE", true)
	record("far", "TCP", false)
	record("abroad", "HBONE", false)
	s4 := "/" + pick(r.places["s"].ips, true).String()
	wp4 := "/" + pick(r.places["wp"].ips, true).String()
	at := func(destination string) *lab.Gateway { return &lab.Gateway{Destination: destination, Port: 15008} }
	none, two, three := uint32(0), uint32(2), uint32(3)
	for i := range f.Workloads {
		w := &f.Workloads[i]
		w.TrustDomain, w.ClusterID, w.Status, w.WorkloadType = "cluster.local", "Kubernetes", "Healthy", "deployment"
		w.WorkloadName, w.CanonicalName, w.CanonicalRevision, w.ServiceAccount = w.Name+"-deploy", w.Name+"-app", "v2", w.Name
		w.Services = map[string]map[uint16]uint16{}
		switch w.Name {
		case "a":
			w.Locality = &lab.Locality{Region: "r1", Zone: "z1", Subzone: "s1"}
		case "c":
			w.Locality, w.Capacity = &lab.Locality{Region: "r2", Zone: "z1", Subzone: "s1"}, &three
		case "d":
			w.Locality, w.Capacity = &lab.Locality{Region: "r1", Zone: "z2", Subzone: "s1"}, &two
		case "e":
			w.Waypoint, w.Status = at(s4), "Unhealthy"
		case "ghost":
			w.Capacity = &none
		case "walled":
			w.Waypoint = at("default/wp" + domain)
		case "wp":
			w.Protocol = "HBONE"
		case "far":
			w.Hostname = "far.example.test"
		case "hostnet":
			w.NetworkMode = "HostNetwork"
		case "abroad":
			w.Network, w.WorkloadIPs = "elsewhere", []string{"10.91.9.9"}
		case "p", "q":
			w.ApplicationTunnel = &lab.Tunnel{Protocol: "PROXY", Port: 15088}
		case "z":
			w.ApplicationTunnel = &lab.Tunnel{Protocol: "NONE", Port: 15089}
		}
	}
	type ports = map[uint16]uint16
	service := func(name string, p ports, endpoints map[string]ports, edit func(*lab.Service)) {
		n := len(f.Services) + 1
		s := lab.Service{Name: name, Namespace: "default", Hostname: name + domain, Ports: p,
			VIPs: []string{fmt.Sprintf("/10.96.1.%d", n), fmt.Sprintf("/fd96::1:%d", n)}}
		if edit != nil {
			edit(&s)
		}
		f.Services = append(f.Services, s)
		for e, p := range endpoints {
			i := slices.IndexFunc(f.Workloads, func(w lab.Workload) bool { return w.Name == e })
			if i < 0 {
				t.Fatal("no workload ", e)
			}
			if p == nil {
				p = ports{}
			}
			f.Workloads[i].Services[s.Namespace+"/"+s.Hostname] = p
		}
	}
	balance := func(mode, health string, prefs ...string) func(*lab.Service) {
		return func(s *lab.Service) {
			s.LoadBalancer = &lab.LoadBalancer{Mode: mode, HealthPolicy: health, Preferences: append([]string{}, prefs...)}
		}
	}
	through := func(g *lab.Gateway) func(*lab.Service) { return func(s *lab.Service) { s.Waypoint = g } }
	web := ports{80: 9000}
	service("shop", web, map[string]ports{"c": nil, "d": nil}, nil)
	service("named", ports{80: 0}, map[string]ports{"c": {80: 9001}, "d": nil}, nil)
	service("mapped", web, map[string]ports{"c": {80: 9001}, "d": {80: 9002}}, nil)
	service("empty", web, nil, nil)
	service("sick", web, map[string]ports{"e": nil}, nil)
	service("lenient", web, map[string]ports{"e": nil}, balance("Standard", "AllowAll"))
	service("idle", web, map[string]ports{"ghost": nil}, nil)
	service("near", web, map[string]ports{"c": nil, "d": nil}, balance("Failover", "OnlyHealthy", "Region", "Zone"))
	service("strict", web, map[string]ports{"c": nil, "d": nil}, balance("Strict", "OnlyHealthy", "Region", "Zone"))
	service("pass", ports{9000: 9000}, nil, func(s *lab.Service) {
		balance("Passthrough", "OnlyHealthy")(s)
		s.VIPs = nil
		for _, ip := range r.places["x"].ips {
			s.VIPs = append(s.VIPs, "/"+ip.String())
		}
	})
	service("secret", web, map[string]ports{"c": nil}, func(s *lab.Service) {
		s.Namespace, s.Hostname, s.Visibility = "other", "secret.other.svc.cluster.local", "Namespace"
	})
	service("twin", web, map[string]ports{"c": {80: 9001}}, nil)
	twins := f.Services[len(f.Services)-1].VIPs
	service("twin2", web, map[string]ports{"d": {80: 9002}}, func(s *lab.Service) {
		s.Namespace, s.Hostname, s.VIPs = "other", "twin2.other.svc.cluster.local", twins
	})
	service("hostnet", web, map[string]ports{"hostnet": nil}, nil)
	service("ext", web, map[string]ports{"far": nil}, nil)
	service("headless", web, map[string]ports{"c": nil, "d": nil}, func(s *lab.Service) { s.VIPs = nil })
	service("own", web, map[string]ports{"a": nil}, nil)
	service("plain", web, map[string]ports{"h2": nil}, nil)
	service("distant", web, map[string]ports{"abroad": nil}, nil)
	service("six", web, map[string]ports{"c": nil}, func(s *lab.Service) { s.IPFamilies = "IPv6" })
	service("four", web, map[string]ports{"c": nil}, func(s *lab.Service) { s.IPFamilies = "IPv4" })
	service("range", web, map[string]ports{"d": nil}, func(s *lab.Service) {
		s.VIPs, s.CIDRVIPs = nil, []lab.CIDR{{CIDR: "10.97.0.0/16"}, {CIDR: "fd97::/64"}}
	})
	service("wp", ports{15008: 15008}, map[string]ports{"wp": nil}, nil)
	service("sand", ports{15008: 15008}, map[string]ports{"s": nil}, nil)
	service("viaaddr", web, map[string]ports{"c": nil}, through(at(wp4)))
	service("viahost", web, map[string]ports{"c": nil}, through(at("default/wp"+domain)))
	service("viasand", web, map[string]ports{"c": nil}, through(at("default/sand"+domain)))
	for _, pod := range []string{"p", "q", "z"} {
		service("sand-"+pod, ports{15008: 15008}, map[string]ports{pod: nil}, nil)
		service("via-"+pod, web, map[string]ports{"c": nil}, through(at("default/sand-"+pod+domain)))
	}
	service("tunnelled", web, map[string]ports{"p": nil}, nil)
	service("lost", web, map[string]ports{"c": nil}, through(at("default/gone"+domain)))
	service("impostor", web, map[string]ports{"c": nil}, through(&lab.Gateway{Destination: wp4, Port: 15018}))
	service("viaport", web, map[string]ports{"c": nil}, through(&lab.Gateway{Destination: wp4, Port: 15019}))
	service("split", web, map[string]ports{"c": nil}, func(s *lab.Service) {
		s.Waypoint = at("default/gone" + domain)
		s.WeightedWaypoints = []lab.WeightedWaypoint{{Destination: *at("default/wp" + domain), Weight: 100},
			{Destination: *at("default/gone" + domain)}}
	})
	f.Policies = []lab.Policy{{Name: "deny-7777", Namespace: "default", Scope: "Namespace", Action: "Deny",
		Rules: [][][]map[string]any{{{{"destinationPorts": []int{7777}}}}}}}
	return f
}

// apply puts the base world, changed, into force, and waits until both nodes show it.
func (r *routing) apply(change func(*lab.WorldFile)) {
	r.t.Helper()
	r.gen++
	f := r.base
	f.Workloads, f.Services = slices.Clone(f.Workloads), slices.Clone(f.Services)
	if change != nil {
		change(&f)
	}
	marker := fmt.Sprintf("gen-%d"+domain, r.gen)
	f.Services = append(f.Services, lab.Service{Name: "gen", Namespace: "default", Hostname: marker,
		Ports: map[uint16]uint16{1: 1}})
	r.file, r.changed = f, change != nil
	if r.control != nil {
		r.control.write("world.yaml", f)
	} else {
		must(r.t, r.WriteWorld(f))
	}
	r.goneBy(20*time.Second, func(d inForce) error {
		for _, s := range d.Services {
			if s.Hostname == marker {
				return nil
			}
		}
		return fmt.Errorf("%s is not known", marker)
	})
}

// startApps starts what answers: every application says who it is and whom it sees, and then echoes.
func (r *routing) startApps() {
	for _, name := range []string{"a", "s", "c", "d", "e", "h2", "x", "hostnet"} {
		for _, port := range []uint16{9000, 9001, 9002, 7777, 80} {
			r.app(name, fmt.Sprintf(":%d", port), nil)
		}
	}
	r.app("p", "127.0.0.1:15088", readProxy)
	r.app("p", "[::1]:15088", readProxy)
	r.app("q", ":15088", readProxy)
	r.app("z", ":15089", nil)
	r.waypoint(15008, "wp")
	r.waypoint(15018, "impostor")
	r.waypoint(15019, "wp")
}

// greeting is what an application of a name says to whom it sees calling.
func greeting(name string, port uint16, src netip.Addr, header string) string {
	return fmt.Sprintf("%s:%d to %v%s\n", name, port, src, header)
}

func (r *routing) app(name, address string, header func(io.Reader) (string, error)) {
	r.t.Helper()
	l, err := r.places[name].ns.Listen("tcp", address)
	must(r.t, err)
	port := netip.MustParseAddrPort(l.Addr().String()).Port()
	var work sync.WaitGroup
	work.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			work.Go(func() {
				defer c.Close()
				said := ""
				if header != nil {
					h, err := header(c)
					if said = " " + h; err != nil {
						said = " " + err.Error()
					}
				}
				src := netip.MustParseAddrPort(c.RemoteAddr().String()).Addr().Unmap()
				if _, err := io.WriteString(c, greeting(name, port, src, said)); err != nil {
					return
				}
				if _, err := io.Copy(c, c); err == nil {
					c.(*net.TCPConn).CloseWrite()
				}
			})
		}
	})
	r.t.Cleanup(func() { l.Close(); work.Wait() })
}

// readProxy reads a PROXY protocol v2 header (haproxy's proxy-protocol.txt) that has exactly one TLV, 0xD0: "proxy
// SOURCE DESTINATION IDENTITY". The source's port, which is the tunnel's, only has to be one. Anything else is an
// error that shows the bytes.
func readProxy(c io.Reader) (string, error) {
	b := make([]byte, 16)
	if _, err := io.ReadFull(c, b); err != nil {
		return "", err
	}
	rest := make([]byte, binary.BigEndian.Uint16(b[14:]))
	if _, err := io.ReadFull(c, rest); err != nil {
		return "", err
	}
	bad := func(why string) (string, error) {
		return "", fmt.Errorf("%s: %s %s", why, hex.EncodeToString(b), hex.EncodeToString(rest))
	}
	if string(b[:13]) != "\r\n\r\n\x00\r\nQUIT\n\x21" {
		return bad("no PROXY v2 header")
	}
	size := map[byte]int{0x11: 4, 0x21: 16, 0x01: 0}[b[13]]
	text := "proxy unspecified"
	if size > 0 {
		if len(rest) < 2*size+4 {
			return bad("short")
		}
		src, _ := netip.AddrFromSlice(rest[:size])
		dst, _ := netip.AddrFromSlice(rest[size : 2*size])
		if binary.BigEndian.Uint16(rest[2*size:]) == 0 {
			return bad("no source port")
		}
		text = fmt.Sprintf("proxy %v %v", src, netip.AddrPortFrom(dst, binary.BigEndian.Uint16(rest[2*size+2:])))
		rest = rest[2*size+4:]
	} else if b[13] != 0x01 {
		return bad("unknown family")
	}
	if len(rest) < 3 || rest[0] != 0xd0 || int(binary.BigEndian.Uint16(rest[1:])) != len(rest)-3 {
		return bad("want one TLV 0xD0")
	}
	return text + " " + string(rest[3:]), nil
}

// record is what the mesh knows of a name, nil if nothing.
func (r *routing) record(name string) *lab.Workload {
	for i := range r.file.Workloads {
		if r.file.Workloads[i].Name == name {
			return &r.file.Workloads[i]
		}
	}
	return nil
}

func (r *routing) service(name string) *lab.Service {
	for i := range r.file.Services {
		if r.file.Services[i].Name == name {
			return &r.file.Services[i]
		}
	}
	return nil
}

func identityOf(w *lab.Workload) string {
	return strings.Join([]string{"spiffe:/", w.TrustDomain, "ns", w.Namespace, "sa", w.ServiceAccount}, "/")
}
