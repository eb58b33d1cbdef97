#!/usr/bin/env bash
# Services of all kinds, StatefulSets, and a drop that somebody else has put on a pod's link; trial.sh sources it.
# shellcheck shell=bash disable=SC2016,SC2317 # what the pods' shells expand; functions that judge and soon call

permissive() { k delete peerauthentication -n amb --all >/dev/null 2>&1; }
# from_outside N URL: how many of N requests of a host without a node proxy were answered.
from_outside() {
	local n=0 _
	for _ in $(seq "$1"); do ! inside cp curl -s -m 5 -o /dev/null -f "$2" || n=$((n + 1)); done
	echo $n
}

# By kube-proxy to the mesh and from it, headless, and neighbours with hostNetwork, PERMISSIVE and STRICT.
try_services() {
	local n ip node
	permissive
	apply <<-END
		apiVersion: v1
		kind: Service
		metadata: {name: headless, namespace: amb}
		spec: {clusterIP: None, selector: {app: web}, ports: [{port: 8080}]}
		---
		apiVersion: v1
		kind: Service
		metadata: {name: outside, namespace: amb}
		spec: {type: NodePort, selector: {app: web}, ports: [{port: 80, targetPort: 8080, nodePort: 30080}]}
		---
		apiVersion: v1
		kind: Service
		metadata: {name: plain, namespace: test}
		spec: {type: NodePort, selector: {app: plain}, ports: [{port: 80, targetPort: 8080, nodePort: 30081}]}
		---
		apiVersion: v1
		kind: Pod
		metadata: {name: neighbour, namespace: test}
		spec:
		  nodeName: n1
		  hostNetwork: true
		  terminationGracePeriodSeconds: 1
		  containers: [{name: c, image: "localhost/busybox:1", command: [sleep, "1000000"]}]
	END
	sleeper test plain n2 '[httpd, -f, -p, "8080", -h, /etc]'
	k wait -n test --for=condition=Ready pod/neighbour --timeout=60s >/dev/null
	neighbour() { k exec -n test neighbour -- curl -s -m 5 -o /dev/null -f "$1"; }
	answers() { client curl -s -m 5 -o /dev/null -f "$1"; }
	judge "a headless service" "answers" soon 20 answers http://headless.amb:8080/
	n=$(asks 10 http://headless.amb:8080/)
	judge "a headless service" "$n of 10 answered" [ "$n" = 10 ]
	for node in n1 n2; do
		n=$(asks 10 "http://$(node4 $node):30080/")
		judge "a pod of the mesh, to the mesh by the NodePort of $node" "$n of 10 answered" [ "$n" = 10 ]
		n=$(asks 10 "http://$(node4 $node):30081/passwd")
		judge "a pod of the mesh, to a pod outside by the NodePort of $node" "$n of 10 answered" [ "$n" = 10 ]
		n=$(from_outside 10 "http://$(node4 $node):30080/")
		judge "a host outside, to the mesh by the NodePort of $node" "$n of 10 answered" [ "$n" = 10 ]
	done
	n=$(asks 10 "http://$(k get svc -n test plain -o jsonpath='{.spec.clusterIP}')/passwd")
	judge "a pod of the mesh, to the ClusterIP of pods outside" "$n of 10 answered" [ "$n" = 10 ]
	ip=$(k get svc -n amb web -o jsonpath='{.spec.clusterIP}')
	judge "a pod outside, to the mesh's ClusterIP" "is answered" \
		k exec -n test plain -- curl -s -m 5 -o /dev/null -f "http://$ip/"
	judge "a neighbour with hostNetwork, to the ClusterIP" "is answered" neighbour "http://$ip/"
	for node in n1 n2; do
		judge "a neighbour with hostNetwork, to the pod of $node" "is answered" \
			neighbour "http://$(pod_ip amb "$(web_on $node)"):8080/"
	done
	k exec -n test neighbour -- sh -c 'mkdir -p /tmp/w; echo hi >/tmp/w/index.html; httpd -p 8077 -h /tmp/w'
	n=$(asks 10 "http://$(node4 n1):8077/")
	judge "to a neighbour with hostNetwork" "$n of 10 answered" [ "$n" = 10 ]

	strict
	refused() { ! inside cp curl -s -m 5 -o /dev/null -f "http://$(node4 n1):30080/"; }
	judge "STRICT, a host outside by a NodePort" "is refused" soon 30 refused
	sleep 1
	n=$(from_outside 10 "http://$(node4 n1):30080/")
	judge "STRICT, a host outside by a NodePort" "$n of 10 answered" [ "$n" = 0 ]
	no_remote() { ! neighbour "http://$(pod_ip amb "$(web_on n2)"):8080/"; }
	judge "STRICT, a neighbour with hostNetwork to another node's pod" "is refused" no_remote
	for node in n1 n2; do
		n=$(asks 10 "http://$(node4 $node):30081/passwd")
		judge "STRICT, a pod of the mesh to a pod outside by the NodePort of $node" "$n of 10 answered" [ "$n" = 10 ]
	done
	n=$(asks 10 http://headless.amb:8080/)
	judge "STRICT, a pod of the mesh to a headless service" "$n of 10 answered" [ "$n" = 10 ]
	n=$(ready)
	judge "STRICT, kubelet's probes" "ready and restarts: $n" [ "$n" = "true0 true0 " ]
	k delete -n amb svc/headless svc/outside >/dev/null
	k delete -n test svc/plain pod/neighbour pod/plain --wait=false >/dev/null
	permissive
}

# Pods of a StatefulSet have their service account's identity, also those that come back under their old names.
try_stateful() {
	local n i
	permissive
	apply <<-END
		apiVersion: v1
		kind: ServiceAccount
		metadata: {name: db, namespace: amb}
		---
		apiVersion: v1
		kind: Service
		metadata: {name: db, namespace: amb}
		spec: {clusterIP: None, selector: {app: db}, ports: [{port: 8080}]}
		---
		apiVersion: apps/v1
		kind: StatefulSet
		metadata: {name: db, namespace: amb}
		spec:
		  serviceName: db
		  replicas: 2
		  podManagementPolicy: Parallel
		  selector: {matchLabels: {app: db}}
		  template:
		    metadata: {labels: {app: db}}
		    spec:
		      serviceAccountName: db
		      terminationGracePeriodSeconds: 1
		      containers: [{name: c, image: "localhost/busybox:1", command: [httpd, -f, -p, "8080", -h, /etc]}]
		---
		apiVersion: security.istio.io/v1
		kind: AuthorizationPolicy
		metadata: {name: db, namespace: amb}
		spec:
		  selector: {matchLabels: {app: web}}
		  action: ALLOW
		  rules: [{from: [{source: {principals: ["cluster.local/ns/amb/sa/db"]}}]}]
	END
	k rollout status -n amb sts/db --timeout=90s >/dev/null
	denied() { [ "$(asks 3 http://web.amb/)" = 0 ]; }
	of_db() { k exec -n amb "db-$1" -- curl -s -m 5 -o /dev/null -f http://web.amb/; }
	by_name() { [ "$(asks 5 "http://db-$1.db.amb:8080/passwd")" = 5 ]; }
	# as_db I: the servers' proxies have logged a connection of that pod with the service account's identity.
	as_db() {
		local node
		for node in n1 n2; do k -n istio-system logs "$(proxy_on "$node")" --since=60s; done |
			grep "src.workload=\"db-$1\"" | grep 'direction="inbound"' |
			grep -q 'src.identity="spiffe://cluster.local/ns/amb/sa/db"'
	}
	judge "a policy for a StatefulSet's identity, another's pod" "is refused" soon 20 denied
	for i in 0 1; do
		judge "the same, pod db-$i" "is answered" soon 20 of_db $i
		judge "the same, pod db-$i" "its SPIFFE identity is in the log" soon 5 as_db $i
		judge "to db-$i by its name" "5 of 5 answered" soon 20 by_name $i
	done
	k delete pod -n amb db-0 >/dev/null
	k rollout status -n amb sts/db --timeout=90s >/dev/null
	judge "the same, db-0 that has come back" "is answered" soon 20 of_db 0
	judge "to db-0 that has come back, by its name" "5 of 5 answered" soon 60 by_name 0 # CoreDNS remembers for 30 s
	k delete -n amb authorizationpolicy/db svc/db sts/db sa/db >/dev/null
}

# What a network policy's agent would put on the node is still in force: by the host's end of the pod's link (tc) and by
# the node's FORWARD chain. A mesh pod's address on the wire is its own, so that rules by address hold.
try_drop() {
	local ip from dev mac
	permissive
	ip=$(pod_ip amb "$(web_on n2)") from=$(pod_ip amb client)
	sleeper amb other n1 '[sleep, "1000000"]'
	other() { k exec -n amb other -- curl -s -m 3 -o /dev/null -f "http://$ip:8080/"; }
	itself() { client curl -s -m 3 -o /dev/null -f "http://$ip:8080/"; }
	not_itself() { ! itself; }
	judge "before the drop, both clients" "are answered" soon 20 eval 'itself && other'
	on n2 ping -c 1 -W 2 "$ip" >/dev/null
	dev=$(on n2 ip -o route get "$ip" | grep -o 'dev [^ ]*' | cut -d' ' -f2)
	if [ "$dev" = cni0 ]; then
		mac=$(on n2 ip neigh show "$ip" dev cni0 | grep -oE '([0-9a-f]{2}:){5}..')
		dev=$(on n2 bridge fdb show br cni0 | awk -v m="$mac" '$1 == m { print $3; exit }')
	fi
	on n2 ip link add sink up type veth peer name sink-end
	on n2 tc qdisc add dev "$dev" clsact
	# Redirected to nowhere: a kernel may lack act_gact.
	on n2 tc filter add dev "$dev" egress protocol ip u32 match ip src "$from/32" \
		action mirred egress redirect dev sink
	judge "a drop on $dev, the host's end of the server's link" "the client is not answered" not_itself
	judge "the same, another client" "is answered" soon 20 other
	on n2 tc qdisc del dev "$dev" clsact
	on n2 ip link del sink
	judge "without it" "the client is answered" soon 20 itself
	on n2 iptables -I FORWARD -s "$from" -d "$ip" -j DROP
	judge "a drop in the node's FORWARD chain" "the client is not answered" not_itself
	judge "the same, another client" "is answered" soon 20 other
	on n2 iptables -D FORWARD -s "$from" -d "$ip" -j DROP
	judge "without it" "the client is answered" soon 20 itself
	k delete pod -n amb other --wait=false >/dev/null
}
