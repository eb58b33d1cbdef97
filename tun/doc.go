// Package tun reads and writes IP packets at a TUN device that lives in a namespace of our choosing.
//
// What flows through it: packets, one per call, each with a virtio-net header (VNetHdr) that carries what the kernel
// and we leave undone: a checksum still to be filled in, or a super-packet of up to 64 KiB still to be cut into
// segments. On the fast path super-packets pass whole in both directions, scattered into and gathered from the
// caller's buffers by one readv or writev, with no copy and no allocation of ours.
//
// Who calls it: package netstack, with one reader and one writer goroutine per device; the composition root, which
// opens and destroys devices.
//
// What it never does: it looks into no packet beyond the TCP header length of a super-packet, starts no goroutine,
// assigns no address and brings no device up (that is tun/steer's work), and knows nothing of gVisor.
//
// The pieces: device.go has the interface and its errors; vnethdr.go the header codec (pure, fuzzed); open_linux.go
// makes the device and tells in words why it could not; probe_linux.go finds out whether the kernel takes
// super-packets; fast_linux.go and plain_linux.go are the two devices. Sub-packages: netns enters namespaces, steer
// brings traffic to the device, tuntest has devices in memory for tests of others.
//
// Decisions:
//   - 2026-11-23: the device is opened inside the namespace instead of being moved there: a moved device keeps its
//     link to the namespace it came from, is briefly visible there, and loses its queue length.
//   - 2026-11-23: the device file sits in Go's poller (nonblocking) and is read with readv through syscall.RawConn
//     with closures built once: a read or write costs no allocation, and Close unblocks a waiting reader.
//   - 2026-11-23: the probe writes packets that the kernel's IP layer must drop before it looks at addresses (a wrong
//     header checksum, a multicast source), so it may run on a live device. EINVAL means that the kernel refuses our
//     headers (tailscale#13041); EIO means that it took them and the device is down. The first leads to the plain
//     path, with the reason in Offload.Why.
//   - 2026-11-23: the plain path is golang.zx2c4.com/wireguard/tun's device. It lets the kernel hand over
//     super-packets where it can and splits them itself; its batch buffers (128 of 64 KiB) are mapped memory outside
//     the Go heap, of which only touched pages exist. They are that large because its splitter does not check the
//     room it has.
//   - 2026-11-23: errors of ReadPacket and WritePacket are bare errnos, which cost no allocation; Open's are sentences.
package tun
