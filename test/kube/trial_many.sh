#!/usr/bin/env bash
# Many pods, and what is left of them; trial.sh sources it.
# shellcheck shell=bash disable=SC2016,SC2317 # what the pods' shells expand; functions that judge and soon call

# nappers NAME...: pods of the mesh on either node that sleep.
nappers() {
	local name
	for name; do
		cat <<-END
			---
			apiVersion: v1
			kind: Pod
			metadata: {name: $name, namespace: amb, labels: {app: nap}}
			spec:
			  terminationGracePeriodSeconds: 0
			  containers: [{name: c, image: "localhost/busybox:1", command: [sleep, "1000000"]}]
		END
	done | apply
}
no_nappers() { [ -z "$(k get pod -n amb -l app=nap -o name)" ]; }

# 200 pods are created and deleted in random order, some of them before they run, under requests of the others.
try_churn() {
	local file said n=200 at=0 made live=() new i most=0 ran="" running
	file=$(mktemp)
	permissive
	wire
	traffic "$file"
	mapfile -t made < <(seq -f 'nap-%.0f' $n | shuf)
	while [ $at -lt $n ]; do
		new=("${made[@]:at:20}")
		at=$((at + 20))
		nappers "${new[@]}"
		mapfile -t live < <(printf '%s\n' "${live[@]}" "${new[@]}" | grep . | shuf)
		sleep 8
		running=$(k get pod -n amb -l app=nap --field-selector status.phase=Running -o name)
		i=$(grep -c . <<<"$running")
		[ "$i" -le "$most" ] || most=$i
		ran+=$running$'\n'
		[ ${#live[@]} -ge 60 ] || continue
		k delete pod -n amb --wait=false "${live[@]:0:20}" >/dev/null
		live=("${live[@]:20}")
	done
	k delete pod -n amb --wait=false "${live[@]}" >/dev/null
	soon 120 no_nappers || echo "      not all pods went"
	said=$(traffic_end "$file")
	i=$(wire_end)
	judge "$n pods created and deleted in random order ($(sort -u <<<"$ran" | grep -c .) ran, at most $most at once)" \
		"$said; $i packets in the clear" eval 'none_failed "$said" && [ "$i" = 0 ]'
	grep ^bad "$file" | sort | uniq -c
	rm -f "$file"
}

# Jobs whose pods connect at once: the first request of each one's life is answered, and its peer sees an identity.
try_job() {
	local n want=24 clear
	strict
	wire
	k delete job -n amb at-once >/dev/null 2>&1
	apply <<-END
		apiVersion: batch/v1
		kind: Job
		metadata: {name: at-once, namespace: amb}
		spec:
		  completions: $want
		  parallelism: 8
		  backoffLimit: 0
		  template:
		    spec:
		      restartPolicy: Never
		      containers:
		      - {name: c, image: "localhost/busybox:1", command: [curl, -sS, -f, -m, "10", "http://web.amb/"]}
	END
	k wait -n amb --for=condition=Complete job/at-once --timeout=150s >/dev/null
	n=$(k get job -n amb at-once -o jsonpath='{.status.succeeded}')
	clear=$(wire_end)
	judge "$want pods that ask at once, STRICT" "${n:-0} succeeded, $clear packets in the clear" \
		[ "$n" = $want -a "$clear" = 0 ]
	[ "$n" = $want ] || k logs -n amb -l job-name=at-once --prefix --tail=3
	k delete job -n amb at-once >/dev/null
	permissive
}

# The newest one: the other is its supervisor.
proxy_pid() { on "$1" pgrep -nf '^/usr/local/bin/ztun(nel)? proxy ztunnel'; }
# proxy_restarts: how often the kubelet has started the container on n1 again.
proxy_restarts() {
	k -n istio-system get pod -l app=ztunnel --field-selector spec.nodeName=n1 \
		-o jsonpath='{.items[*].status.containerStatuses[0].restartCount}'
}
# state NODE: what a node and its proxy have, a line each.
state() {
	local node=$1 pid family
	pid=$(proxy_pid "$node")
	echo "namespaces $(on "$node" ls /run/netns | wc -l)"
	echo "devices $(inside "$node" ip -o link | wc -l)"
	echo "rules $({ inside "$node" ip rule; inside "$node" ip -6 rule; } | wc -l)"
	for family in -4 -6; do
		echo "routes $family $(inside "$node" ip $family route show table all | grep -vc '^multicast')"
		echo "neighbours $family $({
			inside "$node" ip $family neigh show proxy
			inside "$node" ip $family neigh show nud permanent
		} | wc -l)"
	done
	echo "descriptors $(on "$node" ls "/proc/$pid/fd" | wc -l)"
	echo "goroutines $(on "$node" nsenter -t "$pid" -n curl -s '127.0.0.1:15000/debug/pprof/goroutine?debug=1' |
		sed -n '1s/.* //p')"
	echo "threads $(on "$node" ls "/proc/$pid/task" | wc -l)"
}
resident() { on "$1" awk '/^RssAnon/ { print $2 }' "/proc/$(proxy_pid "$1")/status"; }

# Pods are taken and let go 500 times: nothing is left. And what a pod costs.
try_adds() {
	local node i n=20 rounds=25 before=() after=() had has differ=0 names
	permissive
	mapfile -t names < <(seq -f 'many-%.0f' $n)
	wanted() { # wanted N: the proxies list N of them.
		local node sum=0
		for node in n1 n2; do
			sum=$((sum + $(k -n istio-system exec "$(proxy_on "$node")" -- ztun pod list | grep -c ' many-')))
		done
		[ "$sum" = "$1" ]
	}
	soon 60 no_nappers
	nappers warm
	k wait -n amb --for=condition=Ready pod/warm --timeout=60s >/dev/null
	k delete pod -n amb warm >/dev/null
	sleep 5
	for node in n1 n2; do before+=("$(state $node)"); done
	had=$(($(resident n1) + $(resident n2)))
	nappers "${names[@]}"
	k wait -n amb --for=condition=Ready pod -l app=nap --timeout=120s >/dev/null
	soon 30 wanted $n
	sleep 3
	has=$(($(resident n1) + $(resident n2)))
	echo "      memory of the proxies' own with $n idle pods: $(((has - had) / n)) KiB a pod"
	for i in $(seq $rounds); do
		k label pod -n amb -l app=nap istio.io/dataplane-mode=none --overwrite >/dev/null
		soon 60 wanted 0 || echo "      round $i: pods were not let go"
		k label pod -n amb -l app=nap istio.io/dataplane-mode- >/dev/null
		soon 60 wanted $n || echo "      round $i: pods were not taken"
	done
	k delete pod -n amb -l app=nap --wait=false >/dev/null
	soon 60 no_nappers
	sleep 20
	for node in n1 n2; do after+=("$(state $node)"); done
	for i in 0 1; do
		diff <(echo "${before[i]}") <(echo "${after[i]}") | sed "s/^/      n$((i + 1)) /" | grep '[<>]' && differ=1
	done
	judge "$((n * rounds)) times taken and let go" "what the nodes have before (<) and after (>), where it differs" \
		[ $differ = 0 ]
	has=$(($(resident n1) + $(resident n2)))
	echo "      memory of the proxies' own: $had KiB before, $has KiB after"
}

# After all of this the proxies hold no more than the pods there are.
try_leaks() {
	local node pod want have
	for node in n1 n2; do
		pod=$(proxy_on $node)
		want=$(k get pod -n amb --field-selector "spec.nodeName=$node" -o name | wc -l)
		have=$(k -n istio-system exec "$pod" -- ztun pod list | grep -c '^amb ')
		judge "pods of $node" "$have attached, $want there" [ "$have" = "$want" ]
	done
}
