package netns

import (
	"fmt"
	"net"
	"net/netip"
)

// Addr is an address of a namespace, with the device that has it.
type Addr struct {
	Device string
	MTU    int // of the device, in bytes
	Prefix netip.Prefix
}

// Addrs lists the addresses by which the namespace can be reached from outside: those of its devices that are up, but
// for loopback and link-local ones. They come device by device in the kernel's order, and within one as the kernel
// has them: the primary one first.
func (n *NS) Addrs() ([]Addr, error) {
	var all []Addr
	err := n.Do(func() error {
		devices, err := net.Interfaces()
		if err != nil {
			return err
		}
		for _, d := range devices {
			if d.Flags&net.FlagUp == 0 || d.Flags&net.FlagLoopback != 0 {
				continue
			}
			addrs, err := d.Addrs()
			if err != nil {
				return fmt.Errorf("device %s: %w", d.Name, err)
			}
			for _, a := range addrs {
				in, ok := a.(*net.IPNet)
				if !ok {
					continue
				}
				ip, ok := netip.AddrFromSlice(in.IP)
				if ip = ip.Unmap(); !ok || !ip.IsGlobalUnicast() {
					continue
				}
				bits, _ := in.Mask.Size()
				all = append(all, Addr{Device: d.Name, MTU: d.MTU, Prefix: netip.PrefixFrom(ip, bits)})
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("cannot read the addresses of network namespace %s: %w", n, err)
	}
	return all, nil
}
