package attach

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"ztun/admin"
	"ztun/tun/netns"
	"ztun/tun/steer"
)

// Place says in which network namespace a pod lives. The path alone does not do: it may name another namespace by the
// time of a restart, a pid all the more.
type Place struct {
	Path     string // "" where the namespace came as a descriptor
	Dev, Ino uint64 // of the namespace's file; both zero: not known
}

// Locate fills in where p lives, without a descriptor of its own: also when the process has none left.
func Locate(p *Pod) error {
	if p.File != nil {
		ns, err := netns.FromFile(p.File)
		if err != nil {
			return NamespaceError(err)
		}
		defer ns.Close()
		p.Place.Dev, p.Place.Ino = ns.ID()
		return nil
	}
	dev, ino, err := netns.Identify(p.NetNS)
	if err != nil {
		return NamespaceError(err)
	}
	p.Place = Place{p.NetNS, dev, ino}
	return nil
}

// ErrNoAddress is what LocateAddrs returns (wrapped) for a namespace that cannot be reached from outside.
var ErrNoAddress = errors.New("has no address to be reached by: is its CNI done?")

// LocateAddrs is Locate for the kinds whose pods have their addresses before they are attached: where none are given
// they are read from the namespace, one of each family. With several devices (Multus) those of eth0 count, which is
// how a CNI calls the one that the cluster knows the pod by.
func LocateAddrs(p *Pod) error {
	if err := Locate(p); err != nil {
		return err
	}
	if len(p.IPs) > 0 {
		return nil
	}
	ns, err := Open(*p)
	if err != nil {
		return err
	}
	defer ns.Close()
	all, err := ns.Addrs()
	if err != nil {
		return fmt.Errorf("%w: %w", admin.ErrPodUnavailable, err)
	}
	if p.IPs = chooseAddrs(all); len(p.IPs) == 0 {
		return fmt.Errorf("%w: network namespace %s %w", admin.ErrPodUnavailable, ns, ErrNoAddress)
	}
	return nil
}

// chooseAddrs takes the first address of each family: of eth0, else of the first device that has any.
func chooseAddrs(all []netns.Addr) (ips []netip.Addr) {
	if len(all) == 0 {
		return nil
	}
	device := all[0].Device
	if slices.ContainsFunc(all, func(a netns.Addr) bool { return a.Device == podDevice }) {
		device = podDevice
	}
	for _, v4 := range []bool{true, false} {
		for _, a := range all {
			if ip := a.Prefix.Addr(); a.Device == device && ip.Is4() == v4 {
				ips = append(ips, ip)
				break
			}
		}
	}
	return ips
}

// podDevice is what every CNI calls a pod's first device: the runtime asks for it by this name.
const podDevice = "eth0"

// Open opens the namespace of p.
func Open(p Pod) (*netns.NS, error) {
	open := func() (*netns.NS, error) { return netns.Open(p.NetNS) }
	if p.File != nil {
		open = func() (*netns.NS, error) { return netns.FromFile(p.File) }
	}
	ns, err := open()
	if err != nil {
		return nil, NamespaceError(err)
	}
	return ns, nil
}

// OpenApart is Open for a pod that must not live in the daemon's own namespace.
func OpenApart(p Pod, own *netns.NS) (*netns.NS, error) {
	ns, err := Open(p)
	if err != nil {
		return nil, err
	}
	if ns.Same(own) {
		err = fmt.Errorf("%w: %s is the daemon's own network namespace, not a pod's", admin.ErrPodInvalid, ns)
		ns.Close()
		return nil, err
	}
	return ns, nil
}

// PlaceOf is where an attached pod lives whose namespace is ns. Kept by path: a pid or a name may mean something else
// after a restart.
func PlaceOf(p Pod, ns *netns.NS) (at Place) {
	if p.File == nil {
		at.Path = ns.Path()
	}
	at.Dev, at.Ino = ns.ID()
	return at
}

// Namespace is the node's, open.
func (o *Options) Namespace() (*netns.NS, error) {
	if o.NetNS != nil {
		return o.NetNS, nil
	}
	return netns.Current()
}

// Gone says why there surely is no namespace any more that is the one meant; nil if there is, and nil if that cannot
// be told: a pod is not given up for a shortage of the daemon's. One that came as a descriptor is held by it.
func (p Place) Gone() error {
	if p.Path == "" {
		return nil
	}
	dev, ino, err := netns.Identify(p.Path)
	switch {
	case errors.Is(err, netns.ErrNotExist), errors.Is(err, netns.ErrNotNamespace):
		return err
	case err == nil && p.Ino != 0 && (dev != p.Dev || ino != p.Ino):
		return fmt.Errorf("%s is another network namespace now", p.Path)
	}
	return nil
}

// Same says whether both surely are the same namespace, whatever their paths.
func (p Place) Same(o Place) bool { return p.Ino != 0 && p.Dev == o.Dev && p.Ino == o.Ino }

// NamespaceError says whose fault it is that a namespace could not be found or entered: the request's only if there
// surely is none.
func NamespaceError(err error) error {
	if errors.Is(err, netns.ErrNotExist) || errors.Is(err, netns.ErrNotNamespace) {
		return fmt.Errorf("%w: %w", admin.ErrPodInvalid, err)
	}
	return fmt.Errorf("%w: %w", admin.ErrPodUnavailable, err)
}

// CheckAddrs says why a pod of these addresses cannot be attached beside others: an address that no pod can have, two
// of a family, or one that another pod has. others are those of each attached pod, by its label.
func CheckAddrs(label string, addrs []netip.Addr, others map[string][]netip.Addr) error {
	var attached []steer.PodConfig
	for name, a := range others {
		attached = append(attached, steer.PodConfig{Name: name, Addrs: a})
	}
	if err := steer.CheckPod(attached, steer.PodConfig{Name: label, Addrs: addrs}); err != nil {
		return fmt.Errorf("%w: %w", admin.ErrPodConflict, err)
	}
	return nil
}
