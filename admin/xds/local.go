package xds

import (
	"bytes"
	"errors"
	"io"
	"regexp"
	"sort"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"ztun/proxy/rbac"
	"ztun/proxy/state"
)

// Local is what a local file says, in its order.
type Local struct {
	Workloads []*state.Workload
	Services  []*state.Service
	Policies  []*rbac.Policy
}

// Insert puts everything into a Builder.
func (l *Local) Insert(b *state.Builder) {
	for _, p := range l.Policies {
		b.InsertPolicy(p)
	}
	for _, s := range l.Services {
		b.InsertService(s)
	}
	for _, w := range l.Workloads {
		b.InsertWorkload(w)
	}
}

// View makes a View of the file alone, for the given node ("": all).
func (l *Local) View(node string) *state.View {
	b := state.NewBuilder(node)
	l.Insert(b)
	return b.Build()
}

// ParseLocal reads a file in ztunnel's LOCAL_XDS schema, YAML or JSON. The
// error is a *FileError that names lines and keys.
//
// The defaults that xDS applies to omitted fields (trust domain, service
// account, cluster, workload type) are not applied: omitted is empty, as in
// ztunnel. The trust domain's is added by who reads a file, since it is the
// CA's (File, package control). Workloads are state.Workload.Unlisted.
func ParseLocal(data []byte) (l *Local, err error) {
	doc, err := parseYAML(data)
	if err != nil {
		return nil, err
	}
	r := &reader{budget: 100_000 + 4*len(data), interned: make(map[string]string)}
	defer func() {
		switch p := recover(); {
		case p == nil:
		case p == errBudget:
			l, err = nil, &FileError{append(r.problems, Problem{Text: errBudget.Error()})}
		default:
			panic(p)
		}
	}()
	l = &Local{}
	root := &value{r: r, n: doc}
	root.object(&fileObject, func(key string, x *value) {
		switch key {
		case "workloads":
			x.list(func(x *value) { l.Workloads = append(l.Workloads, readWorkload(x)) })
			unique(x, l.Workloads, "uid", func(w *state.Workload) string { return w.UID })
		case "services":
			x.list(func(x *value) { l.Services = append(l.Services, readService(x)) })
			unique(x, l.Services, "namespace and hostname", func(s *state.Service) string { return s.Key().String() })
		case "policies":
			x.list(func(x *value) { l.Policies = append(l.Policies, readPolicy(x)) })
			unique(x, l.Policies, "namespace and name", func(p *rbac.Policy) string { return p.Key })
		}
	})
	if len(r.problems) > 0 {
		return nil, &FileError{r.problems}
	}
	return l, nil
}

// yamlLine finds the line in the texts of the YAML library.
var yamlLine = regexp.MustCompile(`^yaml: line (\d+): `)

// parseYAML reads exactly one document.
func parseYAML(data []byte) (*yaml.Node, error) {
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc, second yaml.Node
	err := dec.Decode(&doc)
	if errors.Is(err, io.EOF) || err == nil && len(doc.Content) == 0 {
		return nil, &FileError{[]Problem{{Text: `the file is empty ("{}" says that nothing exists)`}}}
	}
	if err == nil {
		if err = dec.Decode(&second); errors.Is(err, io.EOF) {
			return doc.Content[0], nil
		} else if err == nil {
			return nil, &FileError{[]Problem{{Line: second.Line, Text: "a second document starts here; only one is read"}}}
		}
	}
	text, line := syntaxText(err)
	if len(data) <= maxSearch {
		line = syntaxLine(data, text)
	}
	return nil, &FileError{[]Problem{{Line: line, Text: "not YAML: " + text}}}
}

// maxSearch is the size up to which the line of a syntax error is searched for;
// the search parses the file up to some twenty times.
const maxSearch = 4 << 20

// syntaxText splits an error of the YAML library.
func syntaxText(err error) (text string, line int) {
	text = err.Error()
	if m := yamlLine.FindStringSubmatch(text); m != nil {
		line, _ = strconv.Atoi(m[1])
		text = strings.TrimPrefix(text, m[0])
	}
	return strings.TrimPrefix(text, "yaml: "), line
}

// syntaxLine finds the line of a syntax error. The library names the line on
// which the surrounding block begins, which may be hundreds of lines above; the
// error lies where the file, cut off after a line, begins to fail in the same
// way.
func syntaxLine(data []byte, text string) int {
	ends := []int{}
	for i, c := range data {
		if c == '\n' || i == len(data)-1 {
			ends = append(ends, i+1)
		}
	}
	return 1 + sort.Search(len(ends)-1, func(i int) bool {
		var n yaml.Node
		dec := yaml.NewDecoder(bytes.NewReader(data[:ends[i]]))
		err := dec.Decode(&n)
		if err == nil {
			err = dec.Decode(&n) // the error may be after the document
		}
		if err == nil || errors.Is(err, io.EOF) {
			return false
		}
		t, _ := syntaxText(err)
		return t == text
	})
}

// unique reports entries of a list with the same key.
func unique[T any](x *value, l []T, what string, key func(T) string) {
	seen := make(map[string]int, len(l))
	for i, e := range l {
		k := key(e)
		if first, ok := seen[k]; ok {
			x.child(x.n.Content[i], "", i).fail("%s %q already used on line %d", what, k, x.n.Content[first].Line)
			continue
		}
		seen[k] = i
	}
}

func readWorkload(v *value) *state.Workload {
	w := &state.Workload{Capacity: 1, Unlisted: true}
	v.object(&workloadObject, func(key string, x *value) {
		switch key {
		case "uid":
			w.UID = x.str()
		case "name":
			w.Name = x.str()
		case "namespace":
			w.Namespace = x.str()
		case "trustDomain":
			w.TrustDomain = x.str()
		case "serviceAccount":
			w.ServiceAccount = x.str()
		case "network":
			w.Network = x.str()
		case "workloadName":
			w.WorkloadName = x.str()
		case "workloadType":
			w.WorkloadType = x.str()
		case "canonicalName":
			w.CanonicalName = x.str()
		case "canonicalRevision":
			w.CanonicalRevision = x.str()
		case "hostname":
			w.Hostname = x.str()
		case "node":
			w.Node = x.str()
		case "clusterId":
			w.ClusterID = x.str()
		case "workloadIps":
			x.list(func(x *value) { w.Addresses = append(w.Addresses, x.addr()) })
		case "protocol":
			w.Protocol = enum(x, state.TCP, state.HBONE)
		case "networkMode":
			w.NetworkMode = enum(x, state.StandardNetwork, state.HostNetwork)
		case "status":
			w.Status = enum(x, state.Healthy, state.Unhealthy)
		case "nativeTunnel":
			w.NativeTunnel = x.boolean()
		case "capacity":
			if !x.null() {
				w.Capacity = uint32(x.uint(1<<32 - 1))
			}
		case "waypoint":
			w.Waypoint = readGateway(x)
		case "networkGateway":
			w.NetworkGateway = readGateway(x)
		case "meshAddresses":
			x.list(func(x *value) { w.MeshAddresses = append(w.MeshAddresses, x.addrPort()) })
			if !state.OneOfEachFamily(w.MeshAddresses) {
				x.fail("want one address of each family at most")
			}
		case "applicationTunnel":
			w.Tunnel = readTunnel(x)
		case "authorizationPolicies":
			w.AuthorizationPolicies = x.strs()
		case "locality":
			w.Locality = readLocality(x)
		case "services":
			x.table(func(key string, x *value) {
				k, ok := state.ParseServiceKey(v.r.intern(key))
				if !ok {
					x.fail("want namespace/hostname as key")
					return
				}
				w.Services = append(w.Services, state.WorkloadService{Service: k, Ports: readPorts(x)})
			})
		}
	})
	return w
}

func readLocality(v *value) (l state.Locality) {
	if v.null() {
		return l
	}
	v.object(&localityObject, func(key string, x *value) {
		switch key {
		case "region":
			l.Region = x.str()
		case "zone":
			l.Zone = x.str()
		case "subzone":
			l.Subzone = x.str()
		}
	})
	return l
}

func readTunnel(v *value) (t state.ApplicationTunnel) {
	if v.null() {
		return t
	}
	v.object(&tunnelObject, func(key string, x *value) {
		switch key {
		case "protocol":
			t.Protocol = enum(x, state.TunnelNone, state.TunnelProxy)
		case "port":
			t.Port = x.port()
		}
	})
	return t
}

// readGateway reads a reference whose destination is network/ip or else
// namespace/hostname.
func readGateway(v *value) *state.GatewayAddress {
	if v.null() {
		return nil
	}
	g := &state.GatewayAddress{}
	v.object(&gatewayObject, func(key string, x *value) {
		switch key {
		case "destination":
			s := x.str()
			k, ok := state.ParseServiceKey(s)
			if !ok || k.Hostname == "" {
				x.fail("want network/ip or namespace/hostname, found %s", x.describe())
				break
			}
			if a, ok := parseIP(k.Hostname); ok {
				g.Addr = state.NetworkAddress{Network: v.r.intern(k.Namespace), Addr: a}
			} else {
				g.Host = k
			}
		case "hboneMtlsPort":
			g.Port = x.port()
		}
	})
	return g
}

// readPorts reads a map of service port to target port.
func readPorts(v *value) state.PortMap {
	var l []state.PortPair
	v.table(func(key string, x *value) {
		n, err := strconv.ParseUint(key, 10, 16)
		if err != nil {
			x.fail("want a port number as key")
			return
		}
		l = append(l, state.PortPair{Service: uint16(n), Target: x.port()})
	})
	before := len(l)
	m := state.SortPorts(l)
	if len(m) != before {
		v.fail("a port is given twice")
	}
	return m
}

func readService(v *value) *state.Service {
	s := &state.Service{}
	v.object(&serviceObject, func(key string, x *value) {
		switch key {
		case "name":
			s.Name = x.str()
		case "namespace":
			s.Namespace = x.str()
		case "hostname":
			s.Hostname = x.str()
		case "vips":
			x.list(func(x *value) {
				network, ip := x.networkAddr()
				s.VIPs = append(s.VIPs, state.NetworkAddress{Network: network, Addr: ip})
			})
		case "cidrVips":
			x.list(func(x *value) {
				var p state.NetworkPrefix
				x.object(&cidrObject, func(key string, x *value) {
					switch key {
					case "network":
						p.Network = x.str()
					case "cidr":
						p.Prefix = x.prefix()
					}
				})
				s.CIDRVIPs = append(s.CIDRVIPs, p)
			})
		case "ports":
			s.Ports = readPorts(x)
		case "endpoints":
			x.table(func(key string, x *value) { s.Endpoints = append(s.Endpoints, readEndpoint(key, x)) })
		case "subjectAltNames":
			s.SubjectAltNames = x.strs()
		case "waypoint":
			s.Waypoint = readGateway(x)
		case "weightedWaypoints":
			x.list(func(x *value) { s.WeightedWaypoints = append(s.WeightedWaypoints, readWeighted(x)) })
		case "loadBalancer":
			s.LoadBalancer = readLoadBalancer(x)
		case "ipFamilies":
			if !x.null() {
				s.IPFamilies = enum(x, state.FamiliesDual, state.FamiliesIPv4, state.FamiliesIPv6)
			}
		case "canonical":
			s.Canonical = x.boolean()
		case "visibility":
			s.Visibility = enum(x, state.Public, state.NamespaceOnly)
		}
	})
	return s
}

func readEndpoint(uid string, v *value) state.Endpoint {
	e := state.Endpoint{UID: v.r.intern(uid)}
	v.object(&endpointObject, func(key string, x *value) {
		switch key {
		case "workloadUid":
			if s := x.str(); s != uid {
				x.fail("want the same uid as the key, %q", uid)
			}
		case "port":
			e.Ports = readPorts(x)
		case "status":
			e.Status = enum(x, state.Healthy, state.Unhealthy)
		}
	})
	return e
}

func readWeighted(v *value) (w state.WeightedWaypoint) {
	v.object(&weightedObject, func(key string, x *value) {
		switch key {
		case "destination":
			if g := readGateway(x); g != nil {
				w.Destination = *g
			}
		case "weight":
			w.Weight = uint32(x.uint(1<<32 - 1))
		}
	})
	return w
}

func readLoadBalancer(v *value) *state.LoadBalancer {
	if v.null() {
		return nil
	}
	lb := &state.LoadBalancer{}
	v.object(&balancerObject, func(key string, x *value) {
		switch key {
		case "routingPreferences":
			x.list(func(x *value) {
				lb.Preferences = append(lb.Preferences, enum(x, state.ScopeRegion, state.ScopeZone, state.ScopeSubzone,
					state.ScopeNode, state.ScopeCluster, state.ScopeNetwork))
			})
		case "mode":
			lb.Mode = enum(x, state.LBStandard, state.LBStrict, state.LBFailover, state.LBPassthrough)
		case "healthPolicy":
			lb.HealthPolicy = enum(x, state.OnlyHealthy, state.AllowAll)
		}
	})
	return lb
}
