package admin

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"unicode"
	"unicode/utf8"
)

// What a PodManager's errors mean to its caller; wrap one of them with what is the matter. They survive
// the control socket: PodClient returns errors for which errors.Is holds as well.
var (
	ErrPodInvalid     = errors.New("invalid pod")        // 400: the request is at fault
	ErrPodNotFound    = errors.New("no such pod")        // 404
	ErrPodConflict    = errors.New("conflict")           // 409: the pod, its address or its namespace is taken
	ErrPodUnavailable = errors.New("not available")      // 503: shutting down, or not started yet
	ErrPodTimeout     = errors.New("took too long")      // 504
	ErrPodInternal    = errors.New("internal error")     // 500: anything else
	ErrPodRequest     = errors.New("malformed request")  // 400: not even a pod
	errPodMethod      = errors.New("method not allowed") // 405
	errPodPath        = errors.New("no such path")       // 404
)

// PodManager starts and stops pods' data planes. Its methods are called concurrently.
type PodManager interface {
	// Add returns when the pod's traffic is captured, or with an error and nothing left behind.
	Add(ctx context.Context, p PodSpec) error
	// Delete returns when nothing of the pod is left.
	Delete(ctx context.Context, namespace, name string) error
	// DeleteUID is Delete where a name does not tell which pod is meant, or is not known.
	DeleteUID(ctx context.Context, uid string) error
	// List returns all pods in any order.
	List() []PodStatus
}

// PodSpec is what is asked for.
type PodSpec struct {
	// what the pod is known by; "" where nobody gave it one: namespace/name
	UID            string       `json:"uid,omitempty"`
	Name           string       `json:"name"`
	Namespace      string       `json:"namespace"`
	ServiceAccount string       `json:"serviceAccount"`
	NetNS          string       `json:"netns"` // path, name of `ip netns`, or process id
	IPs            []netip.Addr `json:"ips"`   // at most one per family; none: those that the namespace has
	MTU            int          `json:"mtu,omitempty"`
}

// PodStatus is a pod as it is.
type PodStatus struct {
	PodSpec
	State       string         `json:"state"` // "Pending", "Up", "Failed", "Stopping"
	Error       string         `json:"error,omitempty"`
	Device      string         `json:"device,omitempty"`
	Offload     PodOffload     `json:"offload"`
	Connections PodConnections `json:"connections"`
}

// PodOffload is what the pod's device does for us; Why is the reason of a fallback.
type PodOffload struct {
	VNetHdr bool   `json:"vnetHdr"`
	CSum    bool   `json:"csum"`
	TSO4    bool   `json:"tso4"`
	TSO6    bool   `json:"tso6"`
	USO     bool   `json:"uso"`
	Why     string `json:"why,omitempty"`
}

// String lists what is on, or says why nothing is.
func (o PodOffload) String() string {
	var on []string
	for _, f := range []struct {
		name string
		on   bool
	}{{"vnet", o.VNetHdr}, {"csum", o.CSum}, {"tso4", o.TSO4}, {"tso6", o.TSO6}, {"uso", o.USO}} {
		if f.on {
			on = append(on, f.name)
		}
	}
	if len(on) == 0 {
		if o.Why != "" {
			return "none (" + o.Why + ")"
		}
		return "none"
	}
	return strings.Join(on, ",")
}

// PodConnections are numbers of connections open now.
type PodConnections struct {
	Inbound  int `json:"inbound"`
	Outbound int `json:"outbound"`
}

// Bounds of MTU: IPv6 needs 1280, TUN ends at 65535.
const (
	minMTU = 1280
	maxMTU = 65535
)

// Validate checks of a whole pod what can be checked without looking at the machine. The error wraps ErrPodInvalid and
// names every field at fault.
func (p *PodSpec) Validate() error { return p.validate(true) }

// validate is Validate; addressed: addresses must be there, and are not to be read from the namespace.
func (p *PodSpec) validate(addressed bool) error {
	var bad []string
	add := func(format string, a ...any) { bad = append(bad, fmt.Sprintf(format, a...)) }
	for _, f := range []struct {
		field, value string
		max          int
	}{{"name", p.Name, 253}, {"namespace", p.Namespace, 63}, {"serviceAccount", p.ServiceAccount, 253}} {
		if err := kubeName(f.value, f.max); err != nil {
			add("%s %v", f.field, err)
		}
	}
	switch {
	case p.NetNS == "":
		add("netns is missing: give a path, a name of `ip netns list`, or a process id")
	case len(p.NetNS) > 4095 || strings.ContainsAny(p.NetNS, "\x00\n"):
		add("netns is not a path, a name or a process id")
	}
	if err := checkUID(p.UID); err != nil {
		add("uid %v", err)
	}
	if len(p.IPs) == 0 && addressed {
		add("ips is empty: a pod needs one address, or one of each family")
	}
	seen := map[bool]netip.Addr{}
	for _, ip := range p.IPs {
		ip = ip.Unmap()
		switch {
		case !ip.IsValid():
			add("ips has an invalid address")
			continue
		case ip.Zone() != "":
			add("address %s has a zone", ip)
		case ip.IsUnspecified(), ip.IsLoopback(), ip.IsMulticast(), ip.IsLinkLocalUnicast(),
			ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
			add("address %s cannot be a pod's: it is not a routable unicast address", ip)
		}
		if other, ok := seen[ip.Is4()]; ok {
			add("addresses %s and %s are of one family: at most one each", other, ip)
		}
		seen[ip.Is4()] = ip
	}
	if p.MTU != 0 && (p.MTU < minMTU || p.MTU > maxMTU) {
		add("mtu %d is not between %d and %d", p.MTU, minMTU, maxMTU)
	}
	if bad == nil {
		return nil
	}
	return fmt.Errorf("%w: %s", ErrPodInvalid, strings.Join(bad, "; "))
}

// maxUID bounds a uid, in bytes: those of Kubernetes have 36, namespace/name has 317.
const maxUID = 320

// checkUID takes any text of one word, since a uid is whatever a node agent knows pods by.
func checkUID(s string) error {
	if len(s) > maxUID {
		return fmt.Errorf("is longer than %d characters", maxUID)
	}
	if strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r == utf8.RuneError || !unicode.IsPrint(r) }) {
		return fmt.Errorf("%q is not one word of printable characters", clip(s, 64))
	}
	return nil
}

// kubeName checks a Kubernetes object name (lower-case DNS labels joined by dots, RFC 1123).
func kubeName(s string, limit int) error {
	if s == "" {
		return errors.New("is missing")
	}
	if len(s) > limit {
		return fmt.Errorf("is longer than %d characters", limit)
	}
	for label := range strings.SplitSeq(s, ".") {
		ok := label != "" && label[0] != '-' && label[len(label)-1] != '-'
		for _, c := range []byte(label) {
			ok = ok && (c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-')
		}
		if !ok {
			return fmt.Errorf("%q is not a Kubernetes name (a-z, 0-9, '-' and '.')", clip(s, 64))
		}
	}
	return nil
}
