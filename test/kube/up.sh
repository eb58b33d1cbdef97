#!/usr/bin/env bash
# up.sh [agent [rules]] [ptp]: networks, certificates, control plane, two nodes, Istio's ambient profile with ztun in
# ztunnel's place, and the pods of manifests/amb.yaml. With agent: ztun's own node agent and CNI plugin in place of
# istio-cni, as scripts/kubernetes/agent has them; with rules the CNI's eth0 stays in the pods. With ptp: each pod has a
# link of its own to its node, and no bridge.
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"
set -e

# host NAME IPV4 IPV6: a network namespace with an eth0 on the switch.
host() {
	ip netns add "$PREFIX-$1"
	# shellcheck disable=SC2016 # that shell expands it
	inside "$1" sh -c 'for c in default all; do echo 0 >/proc/sys/net/ipv6/conf/$c/accept_dad; done'
	ip -n "$PREFIX-$1" link set lo up
	ip -n "$PREFIX-sw" link add "p-$1" type veth peer name eth0 netns "$PREFIX-$1"
	ip -n "$PREFIX-sw" link set "p-$1" master br0 up
	ip -n "$PREFIX-$1" addr add "$2/24" dev eth0
	ip -n "$PREFIX-$1" addr add "$3/64" dev eth0 nodad
	ip -n "$PREFIX-$1" link set eth0 up
}

networks() {
	local n h
	ip netns add $PREFIX-sw
	ip -n $PREFIX-sw link add br0 type bridge
	ip -n $PREFIX-sw link set br0 up
	host cp $CP4 $CP6
	ip -n $PREFIX-cp addr add $API/32 dev lo
	for n in $NODES; do
		host "$n" "$(node4 "$n")" "$(node6 "$n")"
		inside "$n" sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
		ip -n "$PREFIX-$n" route add default via $CP4
		ip -n "$PREFIX-$n" -6 route add default via $CP6
	done
	for h in cp $NODES; do
		for n in $NODES; do
			[ "$h" != "$n" ] || continue
			ip -n "$PREFIX-$h" route add "$(pods4 "$n")" via "$(node4 "$n")"
			ip -n "$PREFIX-$h" -6 route add "$(pods6 "$n")" via "$(node6 "$n")"
		done
	done
}

# certificate NAME SUBJECT USE [SAN]: of the cluster's CA.
certificate() {
	[ ! -e "$1.crt" ] || return 0
	openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "$2" -keyout "$1.key" -out "$1.csr" 2>/dev/null
	openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 -out "$1.crt" -extfile \
		<(printf 'keyUsage=digitalSignature\nextendedKeyUsage=%s\n%s\n' "$3" "${4:+subjectAltName=$4}") 2>/dev/null
}

# kubeconfig FILE CERTIFICATE SERVER
kubeconfig() {
	cat >"$1" <<-END
		apiVersion: v1
		kind: Config
		clusters: [{name: c, cluster: {server: "https://$3:443", certificate-authority-data: $(base64 -w0 ca.crt)}}]
		users: [{name: u, user: {client-certificate-data: $(base64 -w0 "$2.crt"), client-key-data: $(base64 -w0 "$2.key")}}]
		contexts: [{name: x, context: {cluster: c, user: u}}]
		current-context: x
	END
}

certificates() {
	local n names=DNS:kubernetes.default.svc.cluster.local,DNS:kubernetes.default.svc,DNS:kubernetes.default,DNS:localhost
	mkdir -p "$RUN/pki"
	cd "$RUN/pki"
	[ -e ca.crt ] || openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 -subj /CN=kube-ca \
		-keyout ca.key -out ca.crt 2>/dev/null
	if [ ! -e sa.key ]; then
		openssl genrsa -out sa.key 2048 2>/dev/null
		openssl rsa -in sa.key -pubout -out sa.pub 2>/dev/null
	fi
	certificate apiserver /CN=kube-apiserver serverAuth "$names,IP:$API,IP:$CP4,IP:$CP6,IP:127.0.0.1"
	certificate admin /O=system:masters/CN=admin clientAuth
	certificate apiserver-kubelet /O=system:masters/CN=apiserver-kubelet clientAuth
	certificate front /CN=front-proxy clientAuth
	certificate kube-proxy /CN=system:kube-proxy clientAuth
	kubeconfig "$KUBECONFIG" admin $CP4
	for n in $NODES; do
		certificate "kubelet-$n" "/O=system:nodes/CN=system:node:$n" clientAuth
		certificate "serving-$n" "/O=system:nodes/CN=system:node:$n" serverAuth "DNS:$n,IP:$(node4 "$n"),IP:$(node6 "$n")"
		mkdir -p "$RUN/$n"
		kubeconfig "$RUN/$n/kube-proxy.kubeconfig" kube-proxy $API
		kubeconfig "$RUN/$n/kubelet.kubeconfig" "kubelet-$n" $API
		node_config "$n"
	done
	cd - >/dev/null
}

node_config() {
	cat >"$RUN/$1/kube-proxy.yaml" <<-END
		apiVersion: kubeproxy.config.k8s.io/v1alpha1
		kind: KubeProxyConfiguration
		mode: iptables
		clientConnection: {kubeconfig: $RUN/$1/kube-proxy.kubeconfig}
		clusterCIDR: 10.97.0.0/16,fd97::/16
		bindAddress: 0.0.0.0
		conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
	END
	cat >"$RUN/$1/kubelet.yaml" <<-END
		apiVersion: kubelet.config.k8s.io/v1beta1
		kind: KubeletConfiguration
		failCgroupV1: false
		failSwapOn: false
		cgroupDriver: cgroupfs
		cgroupRoot: /
		containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
		authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $RUN/pki/ca.crt}}
		authorization: {mode: Webhook}
		tlsCertFile: $RUN/pki/serving-$1.crt
		tlsPrivateKeyFile: $RUN/pki/serving-$1.key
		clusterDNS: [10.96.0.10]
		clusterDomain: cluster.local
		resolvConf: /etc/resolv.conf
		enforceNodeAllocatable: [pods]
		evictionHard: {memory.available: 200Mi, nodefs.available: 1%, imagefs.available: 1%, nodefs.inodesFree: 1%}
		imageGCHighThresholdPercent: 100
		maxPods: 60
		syncFrequency: 10s
	END
}

control_plane() {
	local d=$RUN/pki own="--kubeconfig=$KUBECONFIG --authentication-kubeconfig=$KUBECONFIG"
	own="$own --authorization-kubeconfig=$KUBECONFIG --leader-elect=false --bind-address=127.0.0.1"
	spawn cp etcd "$BIN/etcd" --name t --data-dir "$RUN/etcd" --log-level error --unsafe-no-fsync \
		--listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
		--listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380 \
		--initial-cluster t=http://127.0.0.1:2380
	spawn cp apiserver "$BIN/kube-apiserver" --etcd-servers http://127.0.0.1:2379 --bind-address :: --secure-port 443 \
		--advertise-address $CP4 --tls-cert-file "$d/apiserver.crt" --tls-private-key-file "$d/apiserver.key" \
		--client-ca-file "$d/ca.crt" --kubelet-certificate-authority "$d/ca.crt" \
		--kubelet-client-certificate "$d/apiserver-kubelet.crt" --kubelet-client-key "$d/apiserver-kubelet.key" \
		--kubelet-preferred-address-types InternalIP --authorization-mode Node,RBAC \
		--enable-admission-plugins NodeRestriction --anonymous-auth=true --allow-privileged=true --profiling=false \
		--service-account-issuer https://kubernetes.default.svc.cluster.local \
		--service-account-signing-key-file "$d/sa.key" --service-account-key-file "$d/sa.pub" \
		--requestheader-client-ca-file "$d/ca.crt" --requestheader-allowed-names front-proxy \
		--requestheader-extra-headers-prefix X-Remote-Extra- --requestheader-group-headers X-Remote-Group \
		--requestheader-username-headers X-Remote-User --proxy-client-cert-file "$d/front.crt" \
		--proxy-client-key-file "$d/front.key" --service-cluster-ip-range 10.96.0.0/16,fd96::/112
	need 90 k get --raw /readyz
	# shellcheck disable=SC2086
	spawn cp controllers "$BIN/kube-controller-manager" $own --use-service-account-credentials=true \
		--service-account-private-key-file "$d/sa.key" --root-ca-file "$d/ca.crt" --cluster-signing-cert-file "$d/ca.crt" \
		--cluster-signing-key-file "$d/ca.key" --allocate-node-cidrs=false --node-monitor-grace-period=40s
	# shellcheck disable=SC2086
	spawn cp scheduler "$BIN/kube-scheduler" $own
}

rolled_out() { need 120 k rollout status -n "$1" "$2" --timeout=5s; }

[ ! -e /run/netns/$PREFIX-cp ] || { echo "it is up already (scripts/kube-lab down)" >&2; exit 1; }
for program in kube istioctl coredns ztun; do
	[ -x "$BIN/$program" ] || { echo "$BIN/$program is not there: scripts/kube-lab build" >&2; exit 1; }
done
mode=istio-cni cni=bridge steering=steered
for word; do
	case $word in
	agent) mode=agent ;;
	rules) steering=rules ;;
	ptp) cni=ptp ;;
	*) echo "up: agent, rules, ptp or nothing, not $word" >&2; exit 2 ;;
	esac
done
mkdir -p "$RUN"
echo $cni >"$RUN/cni"
rm -rf "$RUN/etcd" "$RUN"/*.log
networks
certificates
say "networks and certificates"
control_plane
say "control plane"
starting=()
for n in $NODES; do
	"$here/node.sh" up "$n" &
	starting+=($!)
done
wait "${starting[@]}" # not the control plane
for n in $NODES; do
	[ -e "$RUN/$n/ready" ] || { echo "$n has not started; its log is $RUN/$n/init.log" >&2; exit 1; }
	touch "$RUN/$n/start"
done
k apply -f "$here/manifests/base.yaml" >/dev/null
for n in $NODES; do
	need 90 k wait --for=condition=Ready "node/$n" --timeout=5s
	k patch node "$n" -p "$(printf 'spec:\n  podCIDR: %s\n  podCIDRs: [%s, "%s"]' "$(pods4 "$n")" "$(pods4 "$n")" \
		"$(pods6 "$n")")" >/dev/null
done
say "nodes"
k apply -f "$here/manifests/coredns.yaml" >/dev/null
rolled_out kube-system deploy/coredns
say "CoreDNS"
k apply --server-side -f "$MANIFESTS/crds.yaml" >/dev/null
case $mode in
agent)
	agent=$here/../../scripts/kubernetes/agent
	"$here/agent.py" "$MANIFESTS/istio.yaml" <(k kustomize "$agent") $steering >"$RUN/agent.yaml"
	need 30 k apply --server-side -f "$RUN/agent.yaml"
	rolled_out istio-system deploy/istiod
	rolled_out istio-system ds/ztun-agent
	;;
*)
	need 30 k apply --server-side -f "$MANIFESTS/istio.yaml" # once its own kinds are known
	rolled_out istio-system deploy/istiod
	rolled_out istio-system ds/istio-cni-node
	;;
esac
rolled_out istio-system ds/ztunnel
say "istiod, $mode, ztun"
k apply -f "$here/manifests/amb.yaml" >/dev/null
rolled_out amb deploy/web
need 90 k wait --for=condition=Ready -n amb pod/client --timeout=5s
say "pods of the mesh"
