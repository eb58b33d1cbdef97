package main

import (
	"fmt"
	"math"
	"strings"
	"text/tabwriter"

	"ztun/cmd/attach/isolated"
)

// variable is one row of the table: how a value is read, and what it means.
type variable struct {
	name, def, help string
	set             func(value string) error
}

// pattern is a family of variables: those whose names begin with prefix.
type pattern struct {
	prefix, help string
	set          func(key, value string) error // key is the name without the prefix
}

// variables is the table: every variable that the daemon reads, in the order of its help. A default of ""
// means that set is called only if the variable is set.
func variables(c *Config, l *loader) []variable {
	none := func(string) error { return nil } // read as metadata
	return []variable{
		{"NODE_NAME", "", "name of this node; only its workloads are served", str(&c.Node.Name)},
		{"NETWORK", "", "network of this node", str(&c.Node.Network)},
		{"CLUSTER_ID", "Kubernetes", "cluster of this node (ISTIO_META_CLUSTER_ID wins)", str(&c.Node.ClusterID)},
		{"ISTIO_META_CLUSTER_ID", "", "cluster of this node", str(&c.Node.ClusterID)},
		{"CLUSTER_DOMAIN", "cluster.local", "DNS suffix of the cluster", str(&c.Node.ClusterDomain)},
		{"INSTANCE_IP", "", "address of this proxy, as the control plane is told (1.1.1.1 if not set)",
			str(&c.Self.InstanceIP)},
		{"POD_NAME", "", "name of this proxy's own pod", str(&c.Self.Pod)},
		{"POD_NAMESPACE", "", "its namespace", str(&c.Self.Namespace)},
		{"SERVICE_ACCOUNT", "", "its service account; with the two above it is this proxy's own identity",
			str(&c.Self.ServiceAccount)},
		{"TRUST_DOMAIN", "cluster.local", "trust domain of this proxy's own identity", str(&c.Self.TrustDomain)},
		{"PROXY_MODE", "shared", "shared: one daemon for all pods of the node; dedicated: the proxy of the one workload " +
			"that PROXY_WORKLOAD_INFO names, in its own network namespace, with or without root (of `ztun run`, too)",
			proxyMode(&c.Mode.Dedicated)},
		{"PROXY_WORKLOAD_INFO", "", "the workload of dedicated mode: NAMESPACE/NAME/SERVICE_ACCOUNT of its record; the " +
			"CA knows by AUTH_TOKEN or the client certificate whose certificate we get, and we hold no other",
			proxyWorkloadInfo(&c.Mode.Workload)},
		{"ENABLE_PROXY", "true", "the HBONE proxy; must be on",
			onlyBool(true, "a TUN device is the pods' only way out: without the proxy their connections would end there")},

		{"ZTUN_MESH_CONFIG", "./etc/istio/config/mesh",
			"Istio MeshConfig file (path fixed in ztunnel): its defaultConfig is a ProxyConfig; only a file named here must " +
				"exist", l.setMeshConfig},
		{"PROXY_CONFIG", "", "Istio ProxyConfig (YAML or JSON): discoveryAddress, proxyAdminPort, statsPort, concurrency, " +
			"proxyMetadata; wins over the mesh's", l.setProxyConfig},

		{"KUBERNETES_SERVICE_HOST", "", "set in a pod: the default control plane is then istiod.istio-system.svc",
			func(string) error {
				l.kubernetes = true
				return nil
			}},
		{"XDS_ADDRESS", "",
			"control plane (default: ProxyConfig's discoveryAddress, else https://istiod.istio-system.svc:15012 in " +
				"Kubernetes, https://localhost:15012 elsewhere); set to nothing: none", optional(&l.xds, parseAddress)},
		{"XDS_ROOT_CA", defaultRoots, "who certifies the control plane: a file, SYSTEM, or PEM", roots(&c.XDS.Roots)},
		{"ALT_XDS_HOSTNAME", "", "another name that the control plane's certificate may have", str(&c.XDS.AltHostname)},
		{"XDS_ON_DEMAND", "false", "ask for workloads when they are needed; not with the DNS proxy",
			boolean(&c.XDS.OnDemand)},
		{"AUTH_TOKEN", defaultToken,
			"token for control plane and CA: a file (read at each call), else the token itself; set to nothing: none",
			l.setToken},
		{"LOCAL_XDS_PATH", "",
			"workload file (ztunnel's local schema), reloaded when it changes; may stand beside a control plane",
			str(&c.XDS.LocalPath)},
		{"LOCAL_XDS", "", "the same, inline", str(&c.XDS.LocalInline)},
		{"CA_ADDRESS", "", "where workload certificates come from (default as XDS_ADDRESS, without discoveryAddress), " +
			"unless LOCAL_CA_DIR or FAKE_CA is set", optional(&l.ca, parseAddress)},
		{"CA_ROOT_CA", defaultRoots, "who certifies the CA's server: a file, SYSTEM, or PEM", roots(&c.CA.Roots)},
		{"ALT_CA_HOSTNAME", "", "another name that the CA server's certificate may have", str(&c.CA.AltHostname)},
		{"LOCAL_CA_DIR", "", "directory of the local CA (see `ztun ca init`), in place of CA_ADDRESS", str(&c.CA.LocalDir)},
		{"FAKE_CA", "false", "use the built-in test CA, which every copy of this program knows: for tests only",
			boolean(&c.CA.Fake)},
		{"ZTUN_CONTROL_CREDENTIALS", "",
			"directory that `ztun control join` has written: roots, token and client certificate for control plane and CA, " +
				"where no other variable names them", str(&c.Control.Dir)},
		{"ZTUN_CONTROL_CERT", "", "client certificate for control plane and CA, PEM file", str(&c.Control.Cert)},
		{"ZTUN_CONTROL_KEY", "", "its key, PEM file", str(&c.Control.Key)},
		{"SECRET_TTL", "24h", "lifetime of a workload certificate", duration(&c.CA.TTL)},
		{"CRL_PATH", "", "certificate revocation lists, PEM or DER file", str(&c.CA.CRLPath)},
		{"TLS12_ENABLED", "false", "accept TLS 1.2, too", c.exactly(&c.Proxy.TLS.TLS12, "TLS12_ENABLED")},
		{"COMPLIANCE_POLICY", "", "pqc: X25519MLKEM768 is the only key exchange", compliancePolicy(&c.Proxy.TLS.PQC)},

		{"ISTIO_META_DNS_CAPTURE", "true", "answer the pods' DNS queries (also ProxyConfig's proxyMetadata)", none},
		{"ISTIO_META_DNS_PROXY_ADDR", "localhost:15053",
			"where the DNS proxy listens in a pod: localhost:PORT or IP:PORT (also proxyMetadata)", none},
		{"PREFERED_SERVICE_NAMESPACE", "", "namespace that DNS prefers among services of one name (ztunnel's spelling)",
			str(&c.DNS.PreferredNamespace)},
		{"UNSTABLE_ENABLE_SOCKS5", "false", "SOCKS5 on 127.0.0.1:15080 in each pod", boolean(&c.Proxy.SOCKS5)},

		{"HTTP2_STREAM_WINDOW_SIZE", "4194304", "HTTP/2 window of a stream, bytes; the largest one when readers are slow",
			uint32v(&c.Proxy.HBONE.StreamWindow, 65535, math.MaxInt32)},
		{"HTTP2_CONNECTION_WINDOW_SIZE", "16777216", "HTTP/2 window of a connection, bytes",
			uint32v(&c.Proxy.HBONE.ConnWindow, 65535, math.MaxInt32)},
		{"HTTP2_FRAME_SIZE", "1048576", "largest HTTP/2 frame accepted, bytes",
			uint32v(&c.Proxy.HBONE.FrameSize, 16384, 1<<24-1)},
		{"POOL_MAX_STREAMS_PER_CONNECTION", "100", "streams that one tunnel carries at most",
			uint16v(&c.Proxy.PoolMaxStreams, 1)},
		{"POOL_UNUSED_RELEASE_TIMEOUT", "5m", "an unused tunnel is closed after this", duration(&c.Proxy.PoolUnused)},
		{"ENABLE_RESPONSE_BAGGAGE", "true", "send and read baggage in answers", boolean(&c.Proxy.ResponseBaggage)},
		{"LOCALHOST_APP_TUNNEL", "true", "an application tunnel's PROXY protocol is spoken to the pod's loopback address",
			boolean(&c.Proxy.LocalhostAppTunnel)},
		{"ENABLE_ORIG_SRC", "", "connections reach applications from the client's own address: always, so false is refused " +
			"but with ZTUN_STEERING=redirected", optionalBool(&c.Proxy.OriginalSource)},

		{"KEEPALIVE_ENABLED", "true", "TCP keepalive", boolean(&c.Net.KeepaliveEnabled)},
		{"KEEPALIVE_TIME", "180s", "idle time before the first probe", duration(&c.Net.KeepaliveTime)},
		{"KEEPALIVE_INTERVAL", "180s", "time between probes", duration(&c.Net.KeepaliveInterval)},
		{"KEEPALIVE_RETRIES", "9", "probes before a connection is given up", uint32v(&c.Net.KeepaliveRetries, 1, 127)},
		{"USER_TIMEOUT_ENABLED", "false", "TCP_USER_TIMEOUT of time + retries x interval", boolean(&c.Net.UserTimeout)},
		{"IPV6_ENABLED", "true", "listen on and route IPv6, too", boolean(&c.Net.IPv6)},
		{"PACKET_MARK", "", "SO_MARK of the sockets towards the network, 0 for none (default 1337 with " +
			"ZTUN_STEERING=redirected, whose rules know ours by it, else 0)", l.setMark},
		{"INPOD_ENABLED", "", "a node agent (istio-cni's) says at INPOD_UDS which pods there are, as in ztunnel's DaemonSet " +
			"(default: whether INPOD_UDS is set, or ZTUN_STEERING=redirected)", optionalBool(&l.inpod)},
		{"INPOD_UDS", "/var/run/ztunnel/ztunnel.sock", "the node agent's socket (ZDS)", str(&c.Attach.InpodUDS)},
		{"INPOD_PORT_REUSE", "true", "SO_REUSEPORT in the pods, by which a daemon may be replaced by another that runs " +
			"beside it; false only with ZTUN_STEERING=redirected: else no port is bound there", boolean(&c.Attach.PortReuse)},

		{"CONNECTION_TERMINATION_DEADLINE", "", "how long connections may finish after SIGTERM (default 5s)", l.setDeadline},
		{"TERMINATION_GRACE_PERIOD_SECONDS", "", "the same, from the pod: N>10: N-5, else N-1 seconds, at least 1",
			l.setGrace},
		{"ZTUNNEL_CPU_LIMIT", "", "processors of this machine, as the worker count sees them",
			ranged(&l.cpuLimit, 1, maxCPUs)},
		{"ZTUNNEL_RESOURCE_CPU_LIMIT", "", "CPU limit of the daemon (Kubernetes quantity)", quantity(&l.limit)},
		{"ZTUNNEL_RESOURCE_CPU_REQUEST", "", "CPU request of the daemon (Kubernetes quantity)", quantity(&l.request)},
		{"ZTUNNEL_WORKER_THREADS", "", "worker threads: N, N%, 0 = all; default a quarter of the processors, at least 2",
			l.setWorkers},
		{"RUST_LOG", "info", "log filter: level or target=level, comma separated", str(&c.Log.Filter)},
		{"LOG_FORMAT", "plain", "json, or anything else for text", str(&c.Log.Format)},
		{"AUTHZ_POLICY_INFO_LOGGING", "false", "log decisions of policies at info, not at debug",
			c.exactly(&c.Proxy.PolicyInfoLogging, "AUTHZ_POLICY_INFO_LOGGING")},
		{"ZTUN_UNKNOWN_POLICY", "skip",
			"a policy that a workload lists and that does not arrive within seconds: skip decides without it (as ztunnel), " +
				"deny refuses", unknownPolicy(&c.Proxy.DenyUnknownPolicy)},
		{"ISTIO_META_ISTIO_VERSION", "unknown", "version shown by the istio_build metric", str(&c.Self.IstioVersion)},

		{"ZTUN_STATE_DIR", "/var/run/ztun", "where the daemon keeps its socket and the list of pods (default where " +
			"that is on a read-only file system: /tmp/ztun)", str(&c.State.Dir)},
		{"ZTUN_SOCKET", "", "control socket of `ztun pod` (default ZTUN_STATE_DIR/ztun.sock)", str(&c.State.Socket)},
		{"ZTUN_NODE_TUN", isolated.DefaultTUN, "name of the node's TUN device", deviceName(&c.Attach.NodeTUN)},
		{"ZTUN_MTU", "1500", "MTU of the TUN devices, bytes", ranged(&c.Attach.MTU, 1280, 65535)},
		{"ZTUN_MAX_INFLIGHT", "4096",
			"connections of one pod that may wait for their verdict, in each direction; half of them for who has answered " +
				"lately", ranged(&c.Stack.MaxInFlight, 2, 1<<20)},
		{"ZTUN_MAX_INFLIGHT_PER_DESTINATION", "2048", "the same, to one destination or from one client",
			ranged(&c.Stack.MaxInFlightPerDst, 1, 1<<20)},
		{"ZTUN_FLOWS", "256", "ended connections of one pod that are remembered for `ztun flows`, and as many that were " +
			"turned down; 0 for none", ranged(&c.Proxy.Remember, 0, 1<<16)},
		{"ZTUN_SEND_REASON", "true",
			"tell a peer of the mesh why its connection is refused (header x-ztun-reason): the name of a policy, the " +
				"application's error", boolean(&c.Proxy.SendReason)},
		{"ZTUN_DNS_RATE", "1000", "DNS queries of one pod per second; twice as many at once",
			ranged(&c.Stack.DNSRate, 1, 1<<20)},
		{"ZTUN_UDP", "policy", "UDP and ICMP of the pods: policy carries them, in the clear, but for UDP that a policy of " +
			"its destination would refuse as plaintext; all carries that, too (as under ztunnel, which captures no UDP); off " +
			"drops everything but DNS queries", udpModes(&c.UDP.Mode)},
		{"ZTUN_STEERING", "", "how pods are captured. isolated: a TUN is their only device; steered: the same, and pods " +
			"that have an eth0 of a CNI's by a namespace of ours between pod and network; rules: the same, with eth0 left where " +
			"it is and rules of ours in the pod; redirected: by the rules of istio-cni in the pod, as ztunnel (default: " +
			"redirected where a node agent says which pods there are, else isolated)",
			l.setSteering},
		{"ZTUN_MAX_UDP_FLOWS", "16384", "UDP and ICMP flows of one pod, at most; the node has 65536",
			ranged(&c.UDP.MaxFlows, 16, 65536)},
		{"ZTUN_DNS_SEARCH", "", "search domains of pods beside the cluster's three, comma separated (default: those of the " +
			"daemon's resolv.conf, as kubelet has it)", domains(&c.DNS.Search)},
		{"ZTUN_MEMORY_LIMIT", "",
			"memory of the daemon (default the cgroup's limit): half of it is for bytes under way, and GOMEMLIMIT is nine " +
				"tenths of it unless set", size(&c.Memory.Limit, 32<<20)},
		{"ZTUN_POD_MEMORY", "", "bytes that may be under way for one pod (default half of what all have); nearing it, its " +
			"buffers and windows stay small", size(&c.Memory.Pod, 1<<20)},
		{"ZTUN_TUN_PLAIN", "false", "use the portable TUN path without offload", boolean(&c.Attach.Plain)},
		{"ZTUN_STEERED_NATIVE", "true", "UDP and ICMP of steered pods are forwarded by the kernel, where it has what that " +
			"takes (tc's cls_u32 and act_mirred), and not judged by policy; false: they go by netstack, and UDP is judged",
			boolean(&c.Attach.Native)},
		{"ZTUN_ADAPTIVE_PROCESSORS", "true",
			"use as many processors as the work needs, from one (a quarter of the machine's, where that is more) up to the " +
				"worker threads plus one; false: always that many",
			boolean(&c.Process.AdaptiveProcessors)},
		{"ZTUN_LOCAL_RELAY", "",
			"connections between two pods of this daemon stay in its memory: no TLS, no TCP to port 15008, and so nothing " +
				"that a NetworkPolicy could judge; false: they take the wire as those to other nodes do (default true, and " +
				"false where pods have a CNI: ZTUN_STEERING=steered, rules or redirected)",
			optionalBool(&l.localRelay)},
		{"ZTUN_SHORTCUTS", "true",
			"of an isolated pod's connections that need no tunnel, to pods of this daemon and to what is not in the mesh, the " +
				"packets pass from device to device once they have been judged; false: their bytes are copied from one TCP " +
				"connection to another", boolean(&c.Proxy.Shortcuts)},
		{"ZTUN_DROP_CAPABILITIES", "true",
			"keep only the capabilities that the configuration needs, and never get new ones; the process executes itself " +
				"once for it", boolean(&c.Privileges.Drop)},
		{"ZTUN_SUPERVISE", "", "a small parent of the same program holds the listening sockets of `ztun proxy` and starts it " +
			"again at once when it is killed or fails (five times a minute): who connects meanwhile waits and is not refused " +
			"(default: whether it is process 1, as in a container; not in dedicated mode). Under systemd it is not needed: " +
			"FileDescriptorStoreMax does it", optionalBool(&c.Process.Supervise)},
		{"ZTUN_ADMIN_TOKEN_FILE", "",
			"file with a token (read at each request): /quitquitquit and /logging then want it as Authorization: Bearer",
			tokenFile(&c.Admin.TokenFile)},
		{"ZTUN_RUN_WAIT", "30s",
			"how long `ztun run` waits with its command for a control plane or a CA that does not answer, or that does not " +
				"know the workload, before it gives up (one that answers is waited for); 0: the command starts at once, and " +
				"what it calls meanwhile gets no answer", duration(&c.Process.RunWait)},
		{"ZTUN_READINESS_PORT", "15021", "readiness port (fixed in ztunnel; for several daemons in one namespace)",
			uint16v(&c.Admin.ReadinessPort, 0)},
	}
}

// patterns are the families of variables, in the order of the help.
func patterns(c *Config, l *loader) []pattern {
	return []pattern{
		{"XDS_HEADER_", "gRPC metadata for the control plane: XDS_HEADER_FOO=v sends foo: v", header(&c.XDS.Headers)},
		{"CA_HEADER_", "the same for the CA", header(&c.CA.Headers)},
		{"ISTIO_META_", "metadata for the control plane, by the name after the prefix; wins over proxyMetadata", l.setMeta},
		{"ISTIO_METAJSON_", "the same, as JSON", l.setMetaJSON},
	}
}

// helpTable renders the table of variables for `ztun proxy --help`.
func helpTable() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 4, 2, ' ', 0)
	c := &Config{}
	l := &loader{c: c}
	for _, v := range variables(c, l) {
		fmt.Fprintf(w, "  %s\t%s\t%s\n", v.name, v.def, v.help)
	}
	for _, p := range patterns(c, l) {
		fmt.Fprintf(w, "  %s*\t\t%s\n", p.prefix, p.help)
	}
	w.Flush()
	return b.String()
}
