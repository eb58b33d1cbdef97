package doctor

import (
	"crypto/x509"
	"net/netip"
	"time"

	"ztun/tun/sandwich"
	"ztun/tun/steer"
)

// Facts are what was seen. Zero values mean that all is well or that there was nothing to see, so that tests state
// only what is wrong.
type Facts struct {
	Now     time.Time
	Host    Host
	Daemon  Daemon
	Control []Upstream
	Certs   []Cert
	Peers   []Peer
	Pods    []Pod
	Blind   []Blind
}

// Blind is something that could not be looked at.
type Blind struct {
	What string `json:"what"`
	Why  string `json:"why"`
}

// Host is the node's kernel and network namespace.
type Host struct {
	// Redirected pods are captured by istio-cni's rules in them.
	Redirected bool
	Kernel     string            // its release, "6.1.0-13-amd64"
	TUN        string            // why /dev/net/tun cannot be used; "" it can
	Sysctls    map[string]string // by path below /proc/sys; what is not there is not in it
	NodeTUN    string            // the name of the node's device; "": there is none, nor a rule of ztun's
	TUNFlags   uint64            // of the node's device (/sys/class/net/NAME/tun_flags); 0: there is none
	PlainTUN   bool              // offloads are turned off by configuration
	Seen       steer.Seen
	Missing    []steer.Step // of the node's plan; only while the daemon runs
	// lines of packet filters' rules, each with the program that printed it in front ("iptables-save: -A ...")
	Filters   []string
	Taken     []uint16 // ports of ours that somebody listens on, while the daemon does not run
	Conntrack [2]int   // entries and their bound; zero without connection tracking
}

// Daemon is what answers at the control socket.
type Daemon struct {
	Error string // why it does not; "" it does
	Ready string // why it is not ready (15021); "" it is, or is not known to be
}

// Upstream is a control plane: the source of workloads, or the certificate authority.
type Upstream struct {
	Variable string // that names it
	Address  string
	Error    string // of connecting and proving who it is; "" none
	Roots    string // why there are no roots to prove it with; "" there are
	Token    Token
}

// Token is the file with the service account's token; Path is "" where none is used.
type Token struct {
	Path    string
	Error   string
	Expires time.Time // zero: it does not say
}

// Cert is one identity's certificate, as the daemon has it.
type Cert struct {
	Identity string
	State    string // Available, Initializing, or Unavailable: and why
	Chain    []*x509.Certificate
	Roots    []*x509.Certificate
	Domain   string // the trust domain that the identity is to have; "" any
}

// Peer is another node, by a pod of it that takes HBONE; or a workload that takes it at an address of its host's.
type Peer struct {
	Node     string
	Workload string // namespace/name; "": a node
	Addr     netip.AddrPort
	Error    string // of a TCP handshake; "" none
	MTU      int    // of the way to it, in bytes; 0: not known
}

// String names it in findings.
func (p Peer) String() string {
	if p.Workload != "" {
		return "workload " + p.Workload
	}
	return "node " + p.Node
}

// Pod is a captured pod.
type Pod struct {
	Name    string // namespace/name
	State   string
	Error   string // the daemon's
	NetNS   string // why its namespace cannot be opened; "" it can
	Ref     string // its namespace, as the daemon was told it
	Missing []steer.Step
	// Between is the namespace between a steered pod, which has a CNI's eth0, and the network; "": it has none
	Between string
	Lost    bool            // that namespace is gone
	Lacks   []sandwich.Step // of a steered pod's plan
	DNS     string          // why a query got no answer; "" it did, or was not asked
	Slow    string          // why its device is without offloads; "" it has them
}
