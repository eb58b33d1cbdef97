package main

import (
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"ztun/admin/ca"
	"ztun/admin/zds"
	"ztun/netstack"
	"ztun/proxy"
	"ztun/proxy/hbone"
	"ztun/proxy/identity"
	"ztun/proxy/resolve"
)

// The counters of our parts, under the names by which dashboards and alerts know them: an interface, to be changed
// like one. A test compares the tables with docs/metrics.md, and finds fields of the parts' Stats that have no name
// here.

// family is one metric: where in an S its value is found. A name that ends in _total is a counter's, any other a
// gauge's.
type family[S any] struct {
	name, help string
	get        func(*S) float64
	desc       *prometheus.Desc
}

// count is a family of a field that counts, amount one of a field that goes up and down.
func count[S any](name, help string, get func(*S) uint64) family[S] {
	return family[S]{name: name, help: help, get: func(s *S) float64 { return float64(get(s)) }}
}

func amount[S any](name, help string, get func(*S) int) family[S] {
	return family[S]{name: name, help: help, get: func(s *S) float64 { return float64(get(s)) }}
}

func (f family[S]) kind() prometheus.ValueType {
	if strings.HasSuffix(f.name, "_total") {
		return prometheus.CounterValue
	}
	return prometheus.GaugeValue
}

// families is a table whose metrics have the same labels.
type families[S any] struct {
	labels []string
	list   []family[S]
}

func table[S any](labels []string, list ...family[S]) families[S] {
	for i := range list {
		list[i].desc = prometheus.NewDesc(list[i].name, list[i].help, labels, nil)
	}
	return families[S]{labels, list}
}

// emit exports what s says, with the values of the table's labels.
func (t families[S]) emit(ch chan<- prometheus.Metric, s S, values ...string) {
	for _, f := range t.list {
		ch <- prometheus.MustNewConstMetric(f.desc, f.kind(), f.get(&s), values...)
	}
}

// metricTables are all of them. They are made once, in build order of a packet's way.
type metricTables struct {
	device       families[netstack.LinkStats]
	stack        families[netstack.Stats]
	proxy        families[proxy.Stats]
	pool         families[hbone.PoolStats]
	tunnel       families[hbone.Counts]
	certificates families[ca.Stats]
	policies     families[proxy.UnknownPolicyStats]
	hostnames    families[resolve.Stats]
	authority    families[ca.RemoteStats]
	crl          families[ca.CRLStats]
	revocation   families[identity.RevocationStats]
	agent        families[zds.Stats]
}

func newMetricTables() *metricTables {
	pod := []string{"pod"}
	type link = netstack.LinkStats
	type stack = netstack.Stats
	return &metricTables{
		device: table(pod, // pod is empty for the node's device
			count("ztun_device_rx_packets_total", "Packets read from the device.", func(s *link) uint64 { return s.RxPackets }),
			count("ztun_device_rx_bytes_total", "Bytes read from the device.", func(s *link) uint64 { return s.RxBytes }),
			count("ztun_device_rx_malformed_total", "Packets dropped: not IP, or with lengths that contradict each other.",
				func(s *link) uint64 {
					return s.RxMalformed
				}),
			count("ztun_device_rx_not_tcp_total",
				"Packets dropped: neither TCP nor ICMP, nor UDP that somebody waits for or carries.", func(s *link) uint64 {
					return s.RxNotTCP
				}),
			count("ztun_device_rx_bad_checksum_total", "Packets dropped: wrong TCP checksum.", func(s *link) uint64 {
				return s.RxBadChecksum
			}),
			count("ztun_device_rx_unknown_dst_total",
				"Packets dropped: to an address that no attached pod has (the node's device only).", func(s *link) uint64 {
					return s.RxUnknownDst
				}),
			count("ztun_device_rx_returned_total",
				"ICMP errors about the kernel's own connections, written back for it (the node's device only).",
				func(s *link) uint64 {
					return s.RxReturned
				}),
			count("ztun_device_rx_over_fragments_total",
				"Fragments dropped: beyond what a pod, or all of them, may get in a second (the node's device only).",
				func(s *link) uint64 {
					return s.RxOverFragments
				}),
			count("ztun_device_tx_packets_total", "Packets written to the device.", func(s *link) uint64 { return s.TxPackets }),
			count("ztun_device_tx_bytes_total", "Bytes written to the device.", func(s *link) uint64 { return s.TxBytes }),
			count("ztun_device_tx_dropped_total", "Packets dropped: the transmit queue was full or closed.",
				func(s *link) uint64 {
					return s.TxDropped
				}),
			count("ztun_device_tx_errors_total", "Packets that the device refused.", func(s *link) uint64 { return s.TxErrors }),
			count("ztun_device_tx_merged_total",
				"TCP packets not written by themselves: another one of their connection says what they do.", func(s *link) uint64 {
					return s.TxMerged
				}),
			family[link]{name: "ztun_device_offload", help: "1: super-packets and checksums are left to the kernel.",
				get: func(s *link) float64 {
					return truth(s.Offload)
				}},
		),
		stack: table(pod,
			count("ztun_stack_flows_total", "Connections whose SYN was held for a verdict.", func(s *stack) uint64 {
				return s.Flows
			}),
			count("ztun_stack_duplicates_total", "SYNs sent again while their connection awaits its verdict.",
				func(s *stack) uint64 {
					return s.Duplicates
				}),
			count("ztun_stack_accepted_total", "Connections accepted.", func(s *stack) uint64 { return s.Accepted }),
			count("ztun_stack_accept_failed_total", "Connections accepted whose client had given up.", func(s *stack) uint64 {
				return s.AcceptFailed
			}),
			count("ztun_stack_refused_total", "Connections refused.", func(s *stack) uint64 { return s.Refused }),
			count("ztun_stack_evicted_total", "Connections that lost their place among those that await a verdict.",
				func(s *stack) uint64 {
					return s.Evicted
				}),
			count("ztun_stack_over_total", "SYNs ignored: no place for them.", func(s *stack) uint64 { return s.Over }),
			count("ztun_stack_foreign_total",
				"SYNs, DNS queries and other datagrams dropped: from an address that is not the pod's own.", func(s *stack) uint64 {
					return s.Foreign
				}),
			count("ztun_stack_delayed_total", "SYNs that waited for an older connection of the same ports to go.",
				func(s *stack) uint64 {
					return s.Delayed
				}),
			amount("ztun_stack_in_flight", "Connections that await a verdict.", func(s *stack) int { return s.InFlight }),
			amount("ztun_stack_conns", "Connections of the stack.", func(s *stack) int { return s.Conns }),
			amount("ztun_stack_shortcuts", "Connections whose packets pass between this pod's device and another.",
				func(s *stack) int { return s.Shortcuts }),
			count("ztun_stack_shortcuts_begun_total", "The same that this pod has opened, ended ones included.", func(s *stack) uint64 {
				return s.ShortcutsBegun
			}),
			count("ztun_stack_shortcuts_over_total", "Connections copied because too many pass already.",
				func(s *stack) uint64 { return s.ShortcutsOver }),
			count("ztun_stack_dns_queries_total", "UDP packets to port 53 handed to the DNS proxy.", func(s *stack) uint64 {
				return s.DNSQueries
			}),
			count("ztun_stack_dns_over_total", "UDP packets to port 53 dropped: beyond the pod's bounds.",
				func(s *stack) uint64 {
					return s.DNSOver
				}),
			count("ztun_stack_dns_malformed_total",
				"UDP packets to port 53 dropped: they contradict themselves or cannot be answered.", func(s *stack) uint64 {
					return s.DNSMalformed
				}),
			amount("ztun_stack_dns_in_flight", "DNS queries that are being answered.", func(s *stack) int {
				return s.DNSInFlight
			}),
			count("ztun_stack_udp_stray_total",
				"UDP packets for somebody who had gone, and fragments of what nobody waited for.", func(s *stack) uint64 {
					return s.UDPStray
				}),
			count("ztun_datagram_out_packets_total",
				"UDP and ICMP packets of the pod that were carried; super-packets count as one.", func(s *stack) uint64 {
					return s.DatagramsOut
				}),
			count("ztun_datagram_out_bytes_total", "Bytes of them, with headers.", func(s *stack) uint64 {
				return s.DatagramBytesOut
			}),
			count("ztun_datagram_in_packets_total",
				"UDP and ICMP packets for the pod that were carried; super-packets count as one.", func(s *stack) uint64 {
					return s.DatagramsIn
				}),
			count("ztun_datagram_in_bytes_total", "Bytes of them, with headers.", func(s *stack) uint64 {
				return s.DatagramBytesIn
			}),
			amount("ztun_datagram_flows", "UDP and ICMP flows.", func(s *stack) int { return s.DatagramFlows }),
			count("ztun_datagram_flows_opened_total", "UDP and ICMP flows begun.", func(s *stack) uint64 {
				return s.DatagramFlowsOpened
			}),
			count("ztun_datagram_flows_evicted_total", "UDP and ICMP flows that lost their place to others.",
				func(s *stack) uint64 {
					return s.DatagramFlowsEvicted
				}),
			count("ztun_datagram_flows_over_total", "UDP and ICMP flows that found no place.", func(s *stack) uint64 {
				return s.DatagramFlowsOver
			}),
			count("ztun_datagram_denied_total", "UDP packets dropped: policy refuses plaintext.", func(s *stack) uint64 {
				return s.DatagramsDenied
			}),
			count("ztun_datagram_stray_total",
				"UDP and ICMP packets dropped: they belong to no flow, or go where nobody carries them.", func(s *stack) uint64 {
					return s.DatagramsStray
				}),
			count("ztun_datagram_full_total",
				"UDP and ICMP packets dropped: a device's queue had no room for more of this pod's.", func(s *stack) uint64 {
					return s.DatagramsFull
				}),
			count("ztun_stack_retransmits_total", "TCP segments sent again.", func(s *stack) uint64 { return s.Retransmits }),
			count("ztun_stack_timeouts_total", "TCP retransmission timeouts.", func(s *stack) uint64 { return s.Timeouts }),
			count("ztun_stack_resets_sent_total", "TCP resets sent.", func(s *stack) uint64 { return s.ResetsSent }),
			count("ztun_stack_resets_received_total", "TCP resets received.", func(s *stack) uint64 { return s.ResetsReceived }),
			count("ztun_stack_segment_queue_dropped_total", "TCP segments dropped: an endpoint's queue was full.",
				func(s *stack) uint64 {
					return s.SegmentQueueDropped
				}),
		),
		proxy: table(pod,
			count("ztun_proxy_overloaded_total",
				"Connections and requests that lost their place, or got none, at a bound of the proxy.",
				func(s *proxy.Stats) uint64 {
					return s.Overloaded
				}),
			count("ztun_proxy_retried_total", "Connections that were tried at another endpoint of their service.",
				func(s *proxy.Stats) uint64 {
					return s.Retried
				}),
			count("ztun_proxy_source_rewritten_total",
				"Requests over tunnels whose source address is not their peer's: policies about source addresses are undecided "+
					"for them.", func(s *proxy.Stats) uint64 {
					return s.SourceRewritten
				}),
		),
		pool: table(pod,
			amount("ztun_pool_keys", "Pairs of peers that have tunnels.", func(s *hbone.PoolStats) int { return s.Keys }),
			amount("ztun_pool_conns", "Tunnels to peers.", func(s *hbone.PoolStats) int { return s.Conns }),
			amount("ztun_pool_streams", "Connections within them.", func(s *hbone.PoolStats) int { return s.Streams }),
			count("ztun_pool_dials_total", "Tunnels dialled.", func(s *hbone.PoolStats) uint64 { return s.Dials }),
			count("ztun_pool_dial_failures_total", "Tunnels that could not be made.", func(s *hbone.PoolStats) uint64 {
				return s.DialFailures
			}),
			count("ztun_pool_evicted_total", "Tunnels given up because there were too many.", func(s *hbone.PoolStats) uint64 {
				return s.Evicted
			}),
			count("ztun_pool_retried_total", "Requests sent once more, on another tunnel.", func(s *hbone.PoolStats) uint64 {
				return s.Retried
			}),
			count("ztun_pool_stale_total", "Tunnels that failed, or said nothing, when they were used again.",
				func(s *hbone.PoolStats) uint64 {
					return s.Stale
				}),
		),
		tunnel: table(pod,
			count("ztun_tunnel_streams_refused_total",
				"Requests refused: beyond the streams that a tunnel may have (REFUSED_STREAM).", func(s *hbone.Counts) uint64 {
					return s.StreamsRefused
				}),
			count("ztun_tunnel_streams_rejected_total",
				"Streams reset for a fault of the peer's: malformed requests, overdrawn windows.", func(s *hbone.Counts) uint64 {
					return s.StreamsRejected
				}),
			count("ztun_tunnel_violations_total", "Tunnels ended for a fault of the peer's.", func(s *hbone.Counts) uint64 {
				return s.Violations
			}),
			count("ztun_tunnel_calmed_total", "Tunnels ended with ENHANCE_YOUR_CALM: floods, and answers that nobody read.",
				func(s *hbone.Counts) uint64 {
					return s.Calmed
				}),
			count("ztun_tunnel_ping_timeouts_total", "Tunnels given up because the peer fell silent.",
				func(s *hbone.Counts) uint64 {
					return s.PingTimeouts
				}),
			count("ztun_tunnel_compacted_total", "Received pieces that were copied because too many large blocks were pinned.",
				func(s *hbone.Counts) uint64 {
					return s.Compacted
				}),
			count("ztun_tunnel_lingered_total",
				"Closed streams whose last bytes were dropped because the peer gave no window for them.",
				func(s *hbone.Counts) uint64 {
					return s.Lingered
				}),
		),
		certificates: table(nil,
			amount("ztun_certificates_identities", "Identities whose certificates are kept.", func(s *ca.Stats) int {
				return s.Identities
			}),
			amount("ztun_certificates_waiting", "Identities without a certificate and without an error yet.",
				func(s *ca.Stats) int {
					return s.Waiting
				}),
			amount("ztun_certificates_running", "Requests for certificates under way.", func(s *ca.Stats) int {
				return s.Running
			}),
			amount("ztun_certificates_queued", "Requests for certificates that are due and wait for their turn.",
				func(s *ca.Stats) int {
					return s.Queued
				}),
			count("ztun_certificates_signed_total", "Certificates received.", func(s *ca.Stats) uint64 { return s.Signed }),
			count("ztun_certificates_failed_total", "Requests for certificates that failed.", func(s *ca.Stats) uint64 {
				return s.Failed
			}),
			count("ztun_certificates_discarded_total", "Certificates received for identities that were forgotten meanwhile.",
				func(s *ca.Stats) uint64 {
					return s.Discarded
				}),
			count("ztun_certificates_busy_total", "Connections turned away because too many wait for certificates.",
				func(s *ca.Stats) uint64 {
					return s.Busy
				}),
			count("ztun_certificates_prefetch_dropped_total",
				"Certificates not fetched ahead of time because too many are waited for.", func(s *ca.Stats) uint64 {
					return s.PrefetchDropped
				}),
		),
		policies: table(nil,
			amount("ztun_policies_unknown", "Policies that pods of this node list and that are not loaded.",
				func(s *proxy.UnknownPolicyStats) int {
					return s.Unknown
				}),
			count("ztun_policies_held_total", "Connections that waited for a policy.", func(s *proxy.UnknownPolicyStats) uint64 {
				return s.Held
			}),
			count("ztun_policies_without_total", "Connections that were decided without a policy that is missing.",
				func(s *proxy.UnknownPolicyStats) uint64 {
					return s.Without
				}),
		),
		hostnames: table(nil,
			amount("ztun_hostnames_names", "Hostnames of workloads that are kept, some of them past their time.",
				func(s *resolve.Stats) int {
					return s.Names
				}),
			count("ztun_hostnames_lookups_total", "Hostnames of workloads looked up.", func(s *resolve.Stats) uint64 {
				return s.Lookups
			}),
			count("ztun_hostnames_hits_total", "Hostnames of workloads found among those kept.", func(s *resolve.Stats) uint64 {
				return s.Hits
			}),
			count("ztun_hostnames_evicted_total", "Hostnames of workloads given up for others.", func(s *resolve.Stats) uint64 {
				return s.Evicted
			}),
		),
		authority: table(nil,
			count("ztun_ca_requests_total", "Requests to the certificate authority.", func(s *ca.RemoteStats) uint64 {
				return s.Requests
			}),
			count("ztun_ca_channels_total", "Channels made to the certificate authority.", func(s *ca.RemoteStats) uint64 {
				return s.Channels
			}),
			count("ztun_ca_kept_total", "Times that an old channel was used because a new one could not be made.",
				func(s *ca.RemoteStats) uint64 {
					return s.Kept
				}),
		),
		crl: table(nil,
			count("ztun_crl_loads_total", "Revocation lists put in force.", func(s *ca.CRLStats) uint64 { return s.Loads }),
			count("ztun_crl_failures_total", "Revocation lists that could not be read, or changed nothing.",
				func(s *ca.CRLStats) uint64 {
					return s.Failures
				}),
			count("ztun_crl_cut_total", "Tunnels ended by a revocation list.", func(s *ca.CRLStats) uint64 { return s.Cut }),
		),
		revocation: table(nil,
			amount("ztun_crl_tracked", "Tunnels that a revocation list can end.", func(s *identity.RevocationStats) int {
				return s.Tracked
			}),
		),
		agent: table(nil,
			count("ztun_agent_connections_total", "Connections made to the node agent (ZDS).", func(s *zds.Stats) uint64 {
				return s.Connections
			}),
			count("ztun_agent_messages_total", "Requests of the node agent.", func(s *zds.Stats) uint64 { return s.Messages }),
			count("ztun_agent_refused_total", "Requests of the node agent that were answered with an error.",
				func(s *zds.Stats) uint64 {
					return s.Refused
				}),
			family[zds.Stats]{name: "ztun_agent_connected",
				help: "1: the node agent is connected and has said which pods there are.",
				get: func(s *zds.Stats) float64 {
					return truth(s.Connected)
				}},
		),
	}
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
