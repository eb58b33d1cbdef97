package lab

import "strings"

// IstioRules are the commands that put into a namespace what istio-cni puts into that of every ambient pod (spec
// controlplane 8.6), and no more: REDIRECT to 15001, 15006 and 15053, marks, the route for answers to connections
// that wear a client's address. They need the iptables of the nf_tables backend. dns is AMBIENT_DNS_CAPTURE.
func IstioRules(dns bool) [][]string {
	const ours, notOurs, back = "-m mark --mark 0x539/0xfff", "-m mark ! --mark 0x539/0xfff", "0x111/0xfff"
	var all [][]string
	add := func(command, args string) {
		all = append(all, append(strings.Fields(command), strings.Fields(args)...))
	}
	for _, f := range []struct{ ip, tables, loopback, probe string }{
		{"ip", "iptables", "127.0.0.1/32", "169.254.7.127"},
		{"ip -6", "ip6tables", "::1/128", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"},
	} {
		add(f.ip, "rule add fwmark "+back+" pref 32764 lookup 100")
		add(f.ip, "route add local default dev lo table 100")
		rule := func(table, chain, rest string) {
			add(f.tables, "-w 10 -t "+table+" -A "+chain+" "+rest)
		}
		for _, table := range []string{"mangle", "nat", "raw"} {
			for from, chain := range map[string]string{"PREROUTING": "ISTIO_PRERT", "OUTPUT": "ISTIO_OUTPUT"} {
				add(f.tables, "-w 10 -t "+table+" -N "+chain)
				rule(table, from, "-j "+chain)
			}
		}
		rule("mangle", "ISTIO_PRERT", ours+" -j CONNMARK --set-xmark "+back)
		rule("mangle", "ISTIO_OUTPUT", "-m connmark --mark "+back+" -j CONNMARK --restore-mark --nfmask 0xffffffff "+
			"--ctmask 0xffffffff")
		rule("nat", "ISTIO_PRERT", "-s "+f.probe+" -p tcp -j ACCEPT")
		rule("nat", "ISTIO_PRERT", "! -d "+f.loopback+" -p tcp ! --dport 15008 "+notOurs+" -j REDIRECT --to-ports 15006")
		rule("nat", "ISTIO_OUTPUT", "-d "+f.probe+" -p tcp -j ACCEPT")
		if dns {
			rule("nat", "ISTIO_OUTPUT", "! -o lo -p udp --dport 53 "+notOurs+" -j REDIRECT --to-ports 15053")
			rule("nat", "ISTIO_OUTPUT", "! -d "+f.loopback+" -p tcp --dport 53 "+notOurs+" -j REDIRECT --to-ports 15053")
			rule("raw", "ISTIO_OUTPUT", "-p udp --dport 53 "+ours+" -j CT --zone 1")
			rule("raw", "ISTIO_PRERT", "-p udp --sport 53 "+notOurs+" -j CT --zone 1")
		}
		rule("nat", "ISTIO_OUTPUT", "-p tcp -m mark --mark "+back+" -j ACCEPT")
		rule("nat", "ISTIO_OUTPUT", "! -d "+f.loopback+" -o lo -j ACCEPT")
		rule("nat", "ISTIO_OUTPUT", "! -d "+f.loopback+" -p tcp "+notOurs+" -j REDIRECT --to-ports 15001")
	}
	return all
}
