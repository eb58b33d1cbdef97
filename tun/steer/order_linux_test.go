package steer

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ztun/tun/rtnl"
)

// TestLeftovers: what a sweep removes, and that a pod's captured traffic loses its way in before its other routes,
// and the route that holds back what would leave the node goes last, in whatever order the kernel lists them.
func TestLeftovers(t *testing.T) {
	route := func(dst string, table, metric, typ int, protocol netlink.RouteProtocol) netlink.Route {
		p := netip.MustParsePrefix(dst)
		return netlink.Route{Dst: rtnl.IPNet(p), Table: table, Priority: metric, Type: typ, Protocol: protocol,
			Family: rtnl.Family(p.Addr())}
	}
	for _, c := range []struct {
		dst, kept, net string
		metric         int
	}{{"10.1.0.2/32", "10.1.0.3/32", "10.9.0.0/16", 0}, {"fd01::2/128", "fd01::3/128", "fd09::/64", 1024}} {
		want := []netlink.Route{
			route(c.dst, TableHBONE, c.metric, unix.RTN_LOCAL, Protocol),
			route(c.dst, TableMain, c.metric, unix.RTN_UNICAST, Protocol),
			route(c.dst, TableMain, FallbackMetric, unix.RTN_UNREACHABLE, Protocol),
		}
		all := slices.Concat(want, []netlink.Route{
			route(c.kept, TableHBONE, c.metric, unix.RTN_LOCAL, Protocol),
			route(c.kept, TableMain, FallbackMetric, unix.RTN_UNREACHABLE, Protocol),
			route(c.dst, TableMain, 7, unix.RTN_UNICAST, unix.RTPROT_BOOT), route(c.net, TableMain, c.metric, unix.RTN_UNICAST,
				Protocol),
		})
		for range 20 {
			rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
			got := leftovers(all, []netip.Addr{netip.MustParsePrefix(c.kept).Addr()})
			if !slices.EqualFunc(got, want, func(a, b netlink.Route) bool {
				return a.Table == b.Table && a.Priority == b.Priority && a.Type == b.Type && a.Protocol == b.Protocol &&
					rtnl.Dst(a) == rtnl.Dst(b)
			}) {
				t.Fatalf("got %v\nwant %v", got, want)
			}
		}
	}
}

// TestRetry: a list that a change at the same time has torn is asked for again, a few times; other errors, and
// answers, end it.
func TestRetry(t *testing.T) {
	for _, c := range []struct {
		torn  int // times
		then  error
		asked int
		want  error
	}{
		{0, nil, 1, nil},
		{0, unix.EPERM, 1, unix.EPERM},
		{2, nil, 3, nil},
		{2, unix.EPERM, 3, unix.EPERM},
		{100, nil, 5, netlink.ErrDumpInterrupted},
	} {
		asked := 0
		v, err := rtnl.Retry(func() (int, error) {
			if asked++; asked <= c.torn {
				return 0, fmt.Errorf("routes: %w", netlink.ErrDumpInterrupted)
			}
			return asked, c.then
		})
		if asked != c.asked || !errors.Is(err, c.want) || (c.want == nil) != (err == nil) || err == nil && v != asked {
			t.Errorf("torn %d times, then %v: asked %d times, got %d, %v", c.torn, c.then, asked, v, err)
		}
	}
}
