package main

import (
	"context"
	"fmt"

	"ztun/test/bench/proc"
	"ztun/test/lab"
)

// troubles are the counters that say why a figure is bad, as the table calls them. They are shown only where they
// have moved.
func troubles() map[string][]string {
	return map[string][]string{
		"netstack retransmits": {"ztun_stack_retransmits_total"},
		"netstack timeouts":    {"ztun_stack_timeouts_total"},
		"packets dropped": {"ztun_device_tx_dropped_total", "ztun_device_tx_errors_total",
			"ztun_stack_segment_queue_dropped_total"},
		"packets refused": {"ztun_device_rx_malformed_total", "ztun_device_rx_bad_checksum_total"},
	}
}

// scrape sums up the troubles of all targets, each on its own port. Targets that do not answer count as without: the
// benchmark measures programs that have no such counters, too.
func scrape(ctx context.Context, ts []target, port int) map[string]float64 {
	sum := map[string]float64{}
	for _, t := range ts {
		body, err := getPort(ctx, t, port, "/metrics", 0)
		if err != nil {
			continue
		}
		m, err := lab.ParseMetrics(string(body))
		if err != nil {
			continue
		}
		for name, counters := range troubles() {
			for _, c := range counters {
				sum[name] += m.Sum(c)
			}
		}
	}
	return sum
}

// kernelTroubles sums up the same of the kernels' sockets and devices in the given namespaces; what cannot be read
// counts as without.
func kernelTroubles(nss []*lab.NS) map[string]float64 {
	sum := map[string]float64{}
	for _, ns := range nss {
		for _, file := range []string{"/proc/net/snmp", "/proc/net/netstat"} {
			b, err := ns.ReadFile(file)
			if err != nil {
				continue
			}
			c, err := proc.ParseNetstat(string(b))
			if err != nil {
				continue
			}
			sum["kernel retransmits"] += float64(c["Tcp.RetransSegs"])
			sum["kernel timeouts"] += float64(c["TcpExt.TCPTimeouts"])
			for _, drop := range []string{"RcvPruned", "OfoPruned", "TCPBacklogDrop", "TCPRcvQDrop", "TCPZeroWindowDrop",
				"TCPOFODrop"} {
				sum["kernel socket drops"] += float64(c["TcpExt."+drop])
			}
		}
		if b, err := ns.ReadFile("/proc/net/dev"); err == nil {
			for _, n := range proc.ParseDevDrops(string(b)) {
				sum["device drops"] += float64(n)
			}
		}
	}
	return sum
}

// watched runs work and adds to what it found the troubles that came up meanwhile.
func watched(ctx context.Context, ts []target, port int, nss []*lab.NS, work func() (outcome, error)) (outcome, error) {
	before, kernel := scrape(ctx, ts, port), kernelTroubles(nss)
	o, err := work()
	if err != nil {
		return o, err
	}
	add := func(after, before map[string]float64) {
		for name, v := range after {
			if d := v - before[name]; d > 0 {
				o[name] = d
			}
		}
	}
	add(scrape(ctx, ts, port), before)
	add(kernelTroubles(nss), kernel)
	return o, nil
}

// at is how a target is named in errors.
func (t target) at(port int, path string) string { return fmt.Sprintf("%s:%d%s", t.name, port, path) }
