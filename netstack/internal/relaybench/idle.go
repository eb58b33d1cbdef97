package main

import (
	"fmt"
	"net"
	"sync"

	"ztun/tun/netns"
)

var bufs = sync.Pool{New: func() any { return make([]byte, *bufSize) }}

func getBuf() []byte  { return bufs.Get().([]byte) }
func putBuf(b []byte) { bufs.Put(b) } //nolint:staticcheck // a slice header per buffer is nothing here

// driveIdle opens connections through the relay to an echo server and asks for
// the worker's memory before and after.
func driveIdle(app string, ask func(string) (string, error)) error {
	before, err := ask("mem")
	if err != nil {
		return err
	}
	ns, err := netns.Open(app)
	if err != nil {
		return err
	}
	defer ns.Close()
	var conns []net.Conn
	err = ns.Do(func() error {
		for i := range *idle {
			c, err := net.Dial("tcp", net.JoinHostPort(target, "5201"))
			if err != nil {
				return fmt.Errorf("connection %d: %w", i, err)
			}
			conns = append(conns, c)
		}
		return nil
	})
	if err != nil {
		return err
	}
	after, err := ask("mem")
	if err != nil {
		return err
	}
	fmt.Printf("%d connections\nbefore: %s\nafter:  %s\n", len(conns), before, after)
	var a, b int
	fmt.Sscan(before, &b)
	fmt.Sscan(after, &a)
	fmt.Printf("%.1f KiB per connection (resident)\n", float64(a-b)/float64(len(conns)))
	for _, c := range conns {
		c.Close()
	}
	return nil
}
