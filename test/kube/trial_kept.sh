#!/usr/bin/env bash
# Connections that stay open while pods and proxies come and go; trial.sh sources it.
# shellcheck shell=bash disable=SC2016,SC2317 # what the pods' shells expand; functions that judge and soon call

ECHO='[nc, -ll, -p, "7000", -e, cat]'
# keep POD NAME ADDRESS: a connection of the pod's to an echo server, on which a number goes each 0.2 s until kept NAME.
keep() {
	k exec -n amb "$1" -- sh -c 'cd /tmp; rm -f "$0".*
		(i=0; until [ -e "$0.stop" ]; do i=$((i+1)); echo $i; echo $i >"$0.sent"; sleep 0.2; done) |
			nc "$1" 7000 >"$0.got"
		touch "$0.end"' "$2" "$3" &
	soon 10 k exec -n amb "$1" -- grep -q 3 "/tmp/$2.got" || echo "      connection $2 never began"
}
# kept POD NAME: ends it, and prints how many of the numbers came back.
kept() {
	local cut=""
	k exec -n amb "$1" -- test ! -e "/tmp/$2.end" || cut=", cut off"
	k exec -n amb "$1" -- touch "/tmp/$2.stop"
	soon 15 k exec -n amb "$1" -- test -e "/tmp/$2.end"
	k exec -n amb "$1" -- sh -c 'cd /tmp; echo "$(wc -l <"$0.got") of $(cat "$0.sent") came back$1"' "$2" "$cut"
}
# all_back "N of N came back"
all_back() {
	local n m rest
	read -r n _ m rest <<<"$1"
	[ "$n" = "$m" ] && [ "$n" -gt 5 ] && [ "$rest" = "came back" ]
}
cut_off() { [[ $1 == *", cut off" ]]; }

# wire: captures what goes between pods past the proxies: ports 8080 and 7000 on any link of the nodes, but kubelet's
# probes (for which istio-cni has an address of its own).
wire() {
	local node
	for node in n1 n2; do
		inside $node timeout 900 tcpdump -lnni any \
			"tcp and (port 8080 or port 7000) and not host 10.97.${node#n}.1 and not host 169.254.7.127" \
			>"$RUN/wire-${t:?}-$node" 2>/dev/null &
		echo $! >"$RUN/wire-$node.pid"
	done
	sleep 1
}
# wire_end: how many packets it were; they are in $RUN/wire-TEST-NODE.
wire_end() {
	local node pid
	sleep 1
	for node in n1 n2; do
		pid=$(cat "$RUN/wire-$node.pid")
		kill "$pid" 2>/dev/null
		wait "$pid" 2>/dev/null
	done
	cat "$RUN/wire-$t"-n? | wc -l
}

# A running pod is captured, let go and captured again. What was open before goes on through all of it with ztun's own
# agent. istio-cni's rules end it themselves: to a conntrack that begins with them, a packet in the middle of a connection
# is a new one's, and is redirected. What went through the proxy ends with the proxy's part, at once.
try_kept() {
	local n goes_on
	permissive
	sleeper amb echo n2 "$ECHO"
	sleeper amb caller n1 '[sleep, "1000000"]'
	listed() { k -n istio-system exec "$(proxy_on "$1")" -- ztun pod list | grep -q " $2 "; }
	unlisted() { ! listed "$@"; }
	k label pod -n amb echo caller istio.io/dataplane-mode=none >/dev/null
	soon 20 unlisted n2 echo
	soon 20 unlisted n1 caller
	sleep 1 # the device is on its way back into the pod
	keep client a "$(pod_ip amb echo)"
	keep caller b "$(pod_ip amb echo)"
	k label pod -n amb echo istio.io/dataplane-mode- >/dev/null
	judge "a server that is taken with open connections" "is listed" soon 20 listed n2 echo
	k label pod -n amb caller istio.io/dataplane-mode- >/dev/null
	judge "a client that is taken with an open connection" "is listed" soon 20 listed n1 caller
	sleep 3
	keep client c "$(pod_ip amb echo)"
	k label pod -n amb echo caller istio.io/dataplane-mode=none >/dev/null
	judge "both let go" "are not listed" soon 20 eval 'unlisted n2 echo && unlisted n1 caller'
	sleep 3
	n=$(kept client c)
	judge "a connection by HBONE, its server let go" "$n" cut_off "$n"
	goes_on=all_back
	[ -n "$OWN_AGENT" ] || goes_on=cut_off
	n=$(kept client a)
	judge "a mesh client's connection, its server taken and let go" "$n" $goes_on "$n"
	n=$(kept caller b)
	judge "a connection of a client and a server, both taken and let go" "$n" $goes_on "$n"
	k delete pod -n amb echo caller --wait=false >/dev/null
	soon 30 eval '! k get pod -n amb echo || ! k get pod -n amb caller'
}

# One node's proxy after the other is replaced. A connection that is open when its proxy is told to go goes on for as
# long as proxies finish what they have (25 s with these manifests; here 15).
try_rollout() {
	local file one said n old i
	file=$(mktemp) one=$(mktemp)
	permissive
	k delete pod -n amb echo >/dev/null 2>&1
	sleeper amb echo n2 "$ECHO"
	wire
	traffic "$file"
	traffic "$one" "http://$(pod_ip amb "$(web_on n2)"):8080/" # which has no other endpoint
	old=$(proxy_on n1)" "$(proxy_on n2)
	# stays N: at most N of the old proxies have not been told to go.
	stays() {
		local n=0 pod
		for pod in $old; do
			k get pod -n istio-system "$pod" -o jsonpath='{.metadata.deletionTimestamp}{"-"}' --ignore-not-found |
				grep -qv '^2' && n=$((n + 1))
		done
		[ $n -le "$1" ]
	}
	keep client r1 "$(pod_ip amb echo)"
	k -n istio-system rollout restart ds/ztunnel >/dev/null
	for i in 1 2; do
		soon 90 stays $((2 - i)) || echo "      no $i. proxy went"
		sleep 15
		n=$(kept client r$i)
		judge "rolling restart, a connection from 15 s before, proxy $i of 2 told to go" "$n" all_back "$n"
		! stays 0 || break
		keep client r2 "$(pod_ip amb echo)"
	done
	k -n istio-system rollout status ds/ztunnel --timeout=180s >/dev/null || echo "      the rollout did not end"
	sleep 3
	said=$(traffic_end "$file")
	n=$(wire_end)
	judge "rolling restart of the DaemonSet under requests" "$said; $n packets in the clear" \
		eval 'none_failed "$said" && [ "${said%% *}" -ge 240 ] && [ "$n" = 0 ]'
	grep ^bad "$file" | sort | uniq -c
	said=$(traffic_end "$one")
	judge "the same, to the address of n2's pod" "$said" none_failed "$said"
	grep ^bad "$one" | sort | uniq -c
	k delete pod -n amb echo --wait=false >/dev/null
	rm -f "$file" "$one"
}

# listening: writes down when a proxy listens in the client's namespace, and when none does (redirected way).
listening() {
	local id pid
	id=$(k get pod -n amb client -o jsonpath='{.status.containerStatuses[0].containerID}')
	pid=$(on n1 ctr -n k8s.io task ls | awk -v id="${id#*//}" '$1 == id { print $2 }')
	on n1 nsenter -t "$pid" -n timeout 60 bash -c '
		while :; do
			is=no
			[ -z "$(ss -Hltn "sport = 15001")" ] || is=yes
			[ "$is" = "$was" ] || echo "$(date +%T.%3N) $is"
			was=$is
			sleep 0.02
		done'
}

# kill -9: what is under way is lost (one client asks, one thing at a time), nobody is refused, nothing goes in the clear,
# then all is as before. The container goes on: its process 1 is the proxy's supervisor.
at_most_one_lost() { [[ $1 == *", "[01]" failed" && $1 != "0 answered"* ]] && ! grep -q '^bad.*refused' "$2"; }
try_kill() {
	local file said plain pid seen restarts
	file=$(mktemp) seen=$(mktemp)
	permissive
	wire
	listening >"$seen" &
	local watching=$!
	traffic "$file"
	pid=$(proxy_pid n1)
	restarts=$(proxy_restarts)
	echo "      killed at $(date +%T.%3N)"
	on n1 kill -9 "$pid"
	sleep 8
	said=$(traffic_end "$file")
	kill "$watching" 2>/dev/null
	plain=$(wire_end)
	judge "kill -9 of n1's proxy under requests" "$said; $plain packets in the clear" [ "$plain" = 0 ]
	judge "of which none was refused" "$said" at_most_one_lost "$said" "$file"
	judge "the container went on" "$(proxy_restarts) restarts" [ "$(proxy_restarts)" = "$restarts" ]
	judge "another proxy serves" "$(proxy_pid n1) after $pid" [ "$(proxy_pid n1)" != "$pid" ]
	grep ^bad "$file" | sort | uniq -c
	sed 's/^/      listening: /' "$seen"
	said=$(asks 20 http://web.amb/)
	judge "after kill -9" "$said of 20 answered" [ "$said" = 20 ]
	rm -f "$file" "$seen"
}
