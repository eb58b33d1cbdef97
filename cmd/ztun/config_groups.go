package main

import (
	"encoding/json"
	"time"

	"ztun/admin/istiod"
	"ztun/proxy"
	"ztun/proxy/identity"
	"ztun/proxy/state"
)

// The parts of Config, one for each subsystem. Where a subsystem's package has a Config of its own, that is the part,
// and what is not of the environment is filled in by who makes the subsystem.

// nodeConfig is which node of which mesh this is.
type nodeConfig struct {
	Name, Network, ClusterID, ClusterDomain string
}

// selfConfig is who this proxy itself is, to the control plane and in the mesh.
type selfConfig struct {
	InstanceIP, Pod, Namespace, ServiceAccount, TrustDomain string

	Identity     identity.ID // zero if the pod is not told
	Metadata     map[string]string
	MetaJSON     map[string]json.RawMessage // by name, without ISTIO_METAJSON_
	IstioVersion string
	Args         string // the command line after the program's name
}

// modeConfig is whom the process serves: a node's pods, or one workload.
type modeConfig struct {
	Rootless bool // `ztun run`: the daemon of one workload, in a user namespace
	// Dedicated is PROXY_MODE: this is the proxy of Workload alone, and the CA is told by our token who that is.
	Dedicated bool
	// Workload is the only one that this process serves and holds a certificate for; zero: any.
	Workload state.WorkloadInfo
}

// upstream is a server of the control plane.
type upstream struct {
	Address     string // a URI; "" = off
	Roots       istiod.Roots
	AltHostname string
	Headers     [][2]string
}

// xdsConfig is where workloads, services and policies come from.
type xdsConfig struct {
	upstream
	OnDemand               bool
	LocalPath, LocalInline string

	guessed bool // nothing says where they come from: Address is the default of no particular environment
}

// caConfig is where certificates come from, and what revokes them.
type caConfig struct {
	upstream
	LocalDir string
	Fake     bool
	TTL      time.Duration
	CRLPath  string
}

// controlConfig is what we show to XDS and CA, in both cases the same.
type controlConfig struct {
	Token     istiod.Token // neither file nor literal: no authorization is sent
	Cert, Key string       // client certificate towards `ztun control`, files
	Dir       string
}

// trafficConfig is what all pods' proxies have in common.
type trafficConfig struct {
	proxy.Config
	DenyUnknownPolicy bool
	LocalRelay        bool  // between pods of this daemon, in memory
	Shortcuts         bool  // packets of what needs no tunnel pass from device to device
	OriginalSource    *bool // nil = as the situation allows
}

// netConfig is what sockets towards the network are like.
type netConfig struct {
	IPv6                             bool
	PacketMark                       uint32
	KeepaliveEnabled, UserTimeout    bool
	KeepaliveTime, KeepaliveInterval time.Duration
	KeepaliveRetries                 uint32
}

type dnsConfig struct {
	Proxy              bool
	Addr               string // localhost:PORT (both loopback addresses) or IP:PORT
	PreferredNamespace string
	Search             []string
}

// udpConfig is what becomes of the pods' UDP and ICMP.
type udpConfig struct {
	Mode     udpMode
	MaxFlows int
}

type adminConfig struct {
	Port, StatsPort, ReadinessPort uint16
	TokenFile                      string
	// Own is in the place of the ports where it is not nil: `ztun run` has the servers that its flags name.
	Own *ownServers
}

type logConfig struct {
	Filter, Format string
}

// attachConfig is how pods are attached.
type attachConfig struct {
	NodeTUN string
	MTU     int // bytes
	Plain   bool
	Native  bool // UDP and ICMP of steered pods are the kernel's, where it can

	Steering  steering
	NodeAgent bool // one says at InpodUDS which pods there are
	InpodUDS  string
	PortReuse bool // in the pods
}

// stateConfig is where the daemon keeps what outlives it, and is spoken to.
type stateConfig struct {
	Dir, Socket string
}

// processConfig is how the process runs and ends.
type processConfig struct {
	TerminationDeadline time.Duration
	WorkerThreads       int
	AdaptiveProcessors  bool
	GCSet               bool          // GOGC is the operator's
	Supervise           *bool         // whether a parent holds the listeners (cmd/supervise), which has started us then
	RunWait             time.Duration // of a run's command, for a control plane that does not answer; 0: it does not wait
}

// memoryConfig is in bytes; 0: not set.
type memoryConfig struct {
	Limit, Pod int64
}

type privilegesConfig struct {
	Drop    bool
	Held    capSet // what is left of the capabilities
	ShutOut string // a path for which CAP_DAC_OVERRIDE is among them
}
