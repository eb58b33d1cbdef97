package sandwich

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// Facts are what there was in the pod's namespace before the first step: all that Undo has to give back.
type Facts struct {
	Dev    string  `json:"dev"` // eth0
	Index  int     `json:"index"`
	MAC    string  `json:"mac"`
	MTU    int     `json:"mtu"` // in bytes
	Addrs  []Addr  `json:"addrs"`
	Routes []Route `json:"routes"` // by the device, in the kernel's order, all tables but local
	Neighs []Neigh `json:"neighs"` // permanent ones
	// Settings of the device, below /proc/sys, but for those that cannot be read.
	Settings []Sysctl `json:"settings"`
	// What matters where the device stays in the pod: settings of the whole namespace, other devices that are up, and
	// rules that are not the kernel's.
	Wide   []Sysctl `json:"wide,omitempty"`
	Others []string `json:"others,omitempty"`
	Rules  []string `json:"rules,omitempty"`
}

// Own are the pod's own addresses: those of global scope.
func (f Facts) Own() (out []netip.Addr) {
	for _, a := range f.Addrs {
		if ip := a.Prefix.Addr(); !ip.IsLinkLocalUnicast() {
			out = append(out, ip)
		}
	}
	return out
}

// ErrUnfit is what Read and New return (wrapped) for a pod that cannot be captured this way.
var ErrUnfit = errors.New("cannot be steered")

// check says why a plan cannot be made of these facts.
func (f Facts) check() error {
	own := f.Own()
	if len(own) == 0 {
		return fmt.Errorf("%w: device %s has no address: is its CNI done?", ErrUnfit, f.Dev)
	}
	for i, a := range own {
		for _, b := range own[:i] {
			if a.Is4() == b.Is4() {
				return fmt.Errorf("%w: device %s has two addresses of one family, %s and %s", ErrUnfit, f.Dev, b, a)
			}
		}
	}
	return nil
}

// Conn is a connection that was there before the pod was captured, as the pod sees it.
type Conn struct {
	Local  netip.AddrPort `json:"local"`
	Remote netip.AddrPort `json:"remote"`
	// Socket tells it from a later connection of the same addresses and ports: the number of the application's file; 0: it
	// has none (yet, or any more).
	Socket uint64 `json:"socket,omitempty"`
}

// Remain are those of kept that are among open still, as they are now. A later connection of the same addresses and
// ports is another one: whoever was connected before a pod was captured might go on for ever otherwise.
func Remain(kept, open []Conn) (out []Conn) {
	for _, k := range kept {
		i := slices.IndexFunc(open, func(o Conn) bool { return o.Local == k.Local && o.Remote == k.Remote })
		switch {
		case i < 0:
		case k.Socket == 0:
			out = append(out, open[i])
		case open[i].Socket == k.Socket || open[i].Socket == 0: // 0: the application has closed it, and not all is sent
			out = append(out, k)
		}
	}
	return out
}
