package resolve

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Lookup resolves a host; net.Resolver.LookupNetIP is one. network is "ip" or "ip4".
type Lookup func(ctx context.Context, network, host string) ([]netip.Addr, error)

// Options are what a Cache is made of; zero values mean the defaults given here.
type Options struct {
	Lookup   Lookup        // net.DefaultResolver's
	IPv4Only bool          // IPV6_ENABLED=false: A records only
	TTL      time.Duration // of answers with addresses (30 s)
	Negative time.Duration // of "there is no such host" (5 s)
	Max      int           // names kept (4096, as ztunnel's)
}

// Cache is a resolver with a memory. All methods may be called at the same time.
type Cache struct {
	o Options

	mu      sync.Mutex
	entries map[string]*entry
	flights map[string]*flight // look-ups under way

	lookups, hits, evicted atomic.Uint64
}

// flight is one look-up that several may wait for.
type flight struct {
	done  chan struct{}
	addrs []netip.Addr // after done
	err   error
	ended bool // the look-up came to an end of its own: not because its caller gave up
}

type entry struct {
	addrs []netip.Addr
	err   error
	until time.Time
}

// New makes an empty cache.
func New(o Options) *Cache {
	if o.Lookup == nil {
		o.Lookup = net.DefaultResolver.LookupNetIP
	}
	if o.TTL <= 0 {
		o.TTL = 30 * time.Second
	}
	if o.Negative <= 0 {
		o.Negative = 5 * time.Second
	}
	if o.Max <= 0 {
		o.Max = 4096
	}
	return &Cache{o: o, entries: map[string]*entry{}, flights: map[string]*flight{}}
}

// LookupNetIP returns the addresses of host; network is "ip", "ip4" or "ip6". The error is net.Resolver's, or
// ctx's. The result is shared: do not change it.
func (c *Cache) LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error) {
	addrs, err := c.both(ctx, strings.ToLower(host))
	if network == "ip" || err != nil {
		return addrs, err
	}
	var some []netip.Addr
	for _, a := range addrs {
		if a.Is4() == (network == "ip4") {
			some = append(some, a)
		}
	}
	return some, nil
}

func (c *Cache) both(ctx context.Context, host string) ([]netip.Addr, error) {
	for {
		c.mu.Lock()
		if e := c.entries[host]; e != nil && time.Now().Before(e.until) {
			c.mu.Unlock()
			c.hits.Add(1)
			return e.addrs, e.err
		}
		f := c.flights[host]
		if f == nil {
			f = &flight{done: make(chan struct{})}
			c.flights[host] = f
			c.mu.Unlock()
			c.look(ctx, host, f)
			return f.addrs, f.err
		}
		c.mu.Unlock()
		select {
		case <-f.done:
			if f.ended {
				return f.addrs, f.err
			} // else whoever made it gave up: we are next
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// look makes the look-up that f stands for.
func (c *Cache) look(ctx context.Context, host string, f *flight) {
	defer func() { // also if Lookup panics: nobody may wait for ever
		c.mu.Lock()
		delete(c.flights, host)
		c.mu.Unlock()
		close(f.done)
	}()
	c.lookups.Add(1)
	network := "ip"
	if c.o.IPv4Only {
		network = "ip4"
	}
	found, err := c.o.Lookup(ctx, network, host)
	for _, a := range found {
		f.addrs = append(f.addrs, a.Unmap())
	}
	f.err, f.ended = err, err == nil || ctx.Err() == nil
	var keep time.Duration
	var dns *net.DNSError
	switch {
	case err == nil && len(f.addrs) > 0:
		keep = c.o.TTL
	case err == nil, errors.As(err, &dns) && dns.IsNotFound:
		keep = c.o.Negative
	default:
		return // may be over in a moment: the next one tries again
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.makeRoom(host)
	c.entries[host] = &entry{f.addrs, f.err, time.Now().Add(keep)}
}

// makeRoom drops, of a few entries, the one that ends first, if there is no room for host's. mu is held.
func (c *Cache) makeRoom(host string) {
	if _, there := c.entries[host]; there || len(c.entries) < c.o.Max {
		return
	}
	victim, tries := "", 0
	for h, e := range c.entries { // in random order
		if victim == "" || e.until.Before(c.entries[victim].until) {
			victim = h
		}
		if tries++; tries == 16 {
			break
		}
	}
	delete(c.entries, victim)
	c.evicted.Add(1)
}

// Stats are figures of one cache.
type Stats struct {
	Names                  int // kept, some of them past their time
	Lookups, Hits, Evicted uint64
}

// Stats returns the figures of this moment.
func (c *Cache) Stats() Stats {
	c.mu.Lock()
	n := len(c.entries)
	c.mu.Unlock()
	return Stats{n, c.lookups.Load(), c.hits.Load(), c.evicted.Load()}
}
