#!/usr/bin/env bash
# trial.sh [NAME...]: tries ztun as the node proxy of the cluster that is up: a line for each thing tried, with what was
# seen; exit code 1 if one went wrong. NAME is one of those in the last lines, or away or helm where ztun's own agent is.
# shellcheck disable=SC2016,SC2317 # what the pods' shells expand; functions that judge and soon call
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"
# shellcheck source=trial_agent.sh
. "$here/trial_agent.sh"
# shellcheck source=trial_helm.sh
. "$here/trial_helm.sh"
# shellcheck source=trial_services.sh
. "$here/trial_services.sh"
# shellcheck source=trial_kept.sh
. "$here/trial_kept.sh"
# shellcheck source=trial_many.sh
. "$here/trial_many.sh"

OWN_AGENT=$(k get ds -n istio-system ztun-agent -o name --ignore-not-found)
fails=0
# judge NAME SEEN CONDITION...: says whether the condition holds.
judge() {
	local name=$1 seen=$2
	shift 2
	if "$@"; then echo "ok    $name: $seen"; else echo "FAIL  $name: $seen"; fails=$((fails + 1)); fi
}
client() { k exec -n amb client -- "$@"; }
# asks N URL: how many of N requests, each on a connection of its own, were answered.
asks() {
	client sh -c 'i=0; n=0
		while [ $i -lt $1 ]; do i=$((i+1)); curl -gs -m 10 -o /dev/null -f "$2" && n=$((n+1)); done
		echo $n' _ "$1" "$2"
}
pod_ip() { k get pod -n "$1" "$2" -o jsonpath="{.status.podIPs[${3:-0}].ip}"; }
# pod_on NODE NAMESPACE APP
pod_on() { k get pod -n "$2" -l "app=$3" --field-selector "spec.nodeName=$1" -o jsonpath='{.items[0].metadata.name}'; }
web_on() { pod_on "$1" amb web; }
proxy_on() { pod_on "$1" istio-system ztunnel; }
# ready: "true0 true0 " if both servers are ready and were never started anew.
ready() {
	k get pod -n amb -l app=web -o jsonpath='{range .items[*].status.containerStatuses[0]}{.ready}{.restartCount} {end}'
}
apply() { k apply -f - >/dev/null; }

# traffic FILE [URL]: starts a client that asks without a pause until traffic_end, and counts.
traffic() {
	client sh -c 'said=/tmp/said-$1; exec >$said 2>&1; rm -f $said.stop; ok=0; bad=0
		until [ -e $said.stop ]; do
			if e=$(curl -gs -m 10 -o /dev/null -f -w "%{errormsg}" "$2"); then ok=$((ok+1)); continue; fi
			echo "bad $(date +%T) $e"
			bad=$((bad+1))
		done; echo "$ok answered, $bad failed"' _ "${1##*/}" "${2:-http://web.amb/}" &
	sleep 2
}
# traffic_end FILE: what the client says, and its last line.
traffic_end() {
	local said=/tmp/said-${1##*/}
	client touch "$said.stop"
	soon 20 client grep -q answered "$said"
	client cat "$said" >"$1"
	tail -n 1 "$1"
}
none_failed() { [[ $1 == *" 0 failed" && $1 != "0 answered"* ]]; }

try_names() {
	local n
	n=$(asks 20 http://web.amb/)
	judge "service by name" "$n of 20 answered" [ "$n" = 20 ]
	for node in n1 n2; do
		for family in 0 1; do
			ip=$(pod_ip amb "$(web_on $node)" $family)
			[[ $ip == *:* ]] && ip="[$ip]"
			n=$(asks 10 "http://$ip:8080/")
			judge "pod to pod, n1 to $node, $ip" "$n of 10 answered" [ "$n" = 10 ]
		done
	done
	n=$(client curl -s -m 5 "http://$(pod_ip amb "$(web_on n2)"):8080/cgi-bin/who")
	judge "the server sees the client's address" "$n" grep -q "$(pod_ip amb client)" <<<"$n"
}

# What is on the link between the nodes while a client asks the other node's pod.
try_wire() {
	local file ip n inner hbone
	file=$(mktemp) ip=$(pod_ip amb "$(web_on n2)")
	inside n1 timeout 20 tcpdump -lnAi eth0 "host $ip" >"$file" 2>/dev/null &
	local dump=$!
	sleep 2
	n=$(asks 10 "http://$ip:8080/secret-path" || true)
	n=$(asks 10 "http://$ip:8080/")
	sleep 1
	kill "$dump" 2>/dev/null
	wait "$dump" 2>/dev/null
	hbone=$(grep -c '\.15008[ :]' "$file")
	inner=$(grep -c -e '\.8080[ :]' -e 'HTTP/1' -e secret-path "$file")
	judge "mTLS between nodes" \
		"$n of 10 answered; $hbone packets of port 15008, $inner of port 8080 or with HTTP in the clear" \
		[ "$n" = 10 -a "$hbone" -gt 20 -a "$inner" = 0 ]
	rm -f "$file"
}

strict() {
	apply <<-END
		apiVersion: security.istio.io/v1
		kind: PeerAuthentication
		metadata: {name: default, namespace: amb}
		spec: {mtls: {mode: STRICT}}
	END
}
# sleeper NAMESPACE NAME NODE COMMAND: a pod.
sleeper() {
	apply <<-END
		apiVersion: v1
		kind: Pod
		metadata: {name: $2, namespace: $1, labels: {app: $2}}
		spec:
		  nodeName: $3
		  terminationGracePeriodSeconds: 1
		  containers: [{name: c, image: "localhost/busybox:1", command: $4}]
	END
	k wait -n "$1" --for=condition=Ready "pod/$2" --timeout=60s >/dev/null
}
outsider() { k exec -n test outsider -- curl -s -m 5 -o /dev/null -f "http://$1:8080/"; }

# Kubelet's probes must go on, whatever mTLS mode and policies say; who has no identity is refused.
try_strict() {
	local ip n
	sleeper test outsider n1 '[sleep, "1000000"]'
	ip=$(pod_ip amb "$(web_on n2)")
	judge "PERMISSIVE, a pod outside the mesh" "is answered" outsider "$ip"
	strict
	refused() { ! outsider "$ip"; }
	judge "STRICT, a pod outside the mesh" "is refused" soon 20 refused
	sleep 15
	n=$(ready)
	judge "STRICT, kubelet's probes after 15 s (period 1 s)" "ready and restarts: $n" [ "$n" = "true0 true0 " ]
	n=$(asks 20 http://web.amb/)
	judge "STRICT, a client of the mesh" "$n of 20 answered" [ "$n" = 20 ]
}

try_policy() {
	local n
	rule() {
		apply <<-END
			apiVersion: security.istio.io/v1
			kind: AuthorizationPolicy
			metadata: {name: t, namespace: amb}
			spec:
			  selector: {matchLabels: {app: web}}
			  action: ALLOW
			  rules: [{from: [{source: {principals: ["$1"]}}]}]
		END
	}
	denied() { [ "$(asks 4 http://web.amb/)" = 0 ]; }
	rule cluster.local/ns/amb/sa/nobody
	judge "ALLOW of another principal" "every request is refused" soon 20 denied
	sleep 10
	n=$(ready)
	judge "ALLOW of another principal, kubelet's probes" "ready and restarts: $n" [ "$n" = "true0 true0 " ]
	rule cluster.local/ns/amb/sa/client
	allowed() { [ "$(asks 4 http://web.amb/)" = 4 ]; }
	judge "ALLOW of the client's principal" "every request is answered" soon 20 allowed
	k delete authorizationpolicy -n amb t >/dev/null
}

# A running pod leaves the mesh and comes back, and its application is not restarted.
try_label() {
	local pod ip restarts
	k delete peerauthentication -n amb --all >/dev/null 2>&1
	sleeper amb moves n2 '[httpd, -f, -p, "8080", -h, /etc]'
	pod=$(proxy_on n2) ip=$(pod_ip amb moves)
	listed() { k -n istio-system exec "$pod" -- ztun pod list | grep -q " moves "; }
	gone() { ! listed; }
	answers() { [ "$(asks 2 "http://$ip:8080/passwd")" = 2 ]; }
	judge "a labelled pod" "is listed and answers" soon 20 listed
	judge "its answers" "in the mesh" soon 20 answers
	k label pod -n amb moves istio.io/dataplane-mode=none >/dev/null
	judge "unlabelled while running" "is not listed" soon 20 gone
	judge "its answers" "out of the mesh" soon 20 answers
	k label pod -n amb moves istio.io/dataplane-mode- >/dev/null
	judge "labelled again" "is listed" soon 20 listed
	restarts=$(k get pod -n amb moves -o jsonpath='{.status.containerStatuses[0].restartCount}')
	judge "its answers" "in the mesh again, $restarts restarts" soon 20 answers
	k delete pod -n amb moves --wait=false >/dev/null
}

try_istioctl() {
	local pod file
	for pod in $(proxy_on n1) $(proxy_on n2); do
		file=$(mktemp)
		inside cp "$BIN/istioctl" ztunnel-config all "$pod.istio-system" >"$file" 2>&1
		judge "istioctl ztunnel-config all $pod (by port-forward)" \
			"$(wc -l <"$file") lines, $(grep -c HBONE "$file") of HBONE, $(grep -c spiffe "$file") certificates" \
			grep -q HBONE "$file"
		rm -f "$file"
	done
	file=$(inside cp "$BIN/istioctl" proxy-status 2>&1)
	judge "istioctl proxy-status" "$(grep -c ztun <<<"$file") proxies of ztun" [ "$(grep -c ztun <<<"$file")" -ge 2 ]
	[ -n "$file" ] && head -n 6 <<<"$file" | cut -c1-200 | sed 's/^/      /'
}

[ $# -gt 0 ] || set -- names wire strict policy services stateful drop label kept job rollout kill \
	istioctl churn adds leaks
for t; do
	at=$SECONDS
	"try_$t"
	echo "      ($t: $((SECONDS - at)) s)"
done
echo "$fails failed"
[ "$fails" = 0 ]
