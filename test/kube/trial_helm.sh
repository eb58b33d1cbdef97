#!/usr/bin/env bash
# The chart, with Helm itself (kube-lab up agent): in place of the objects that `up` has applied, which come back at the
# end. trial.sh sources it.
# shellcheck shell=bash disable=SC2154,SC2317 # lib.sh's variables; functions that judge and soon call

chart=$here/../../scripts/kubernetes/chart
helm() { inside cp "$BIN/helm" -n istio-system "$@"; }
# release install|upgrade FLAG...: as one of the lab's size.
release() {
	local verb=$1
	shift
	helm "$verb" ztun "$chart" --wait --timeout 3m --set mode=agent,image.repository=localhost/ztunnel \
		--set-string image.tag=1 \
		--set proxy.resources.requests.cpu=10m,proxy.resources.requests.memory=64Mi,agent.resources.requests.cpu=10m \
		"$@" >"$RUN/helm.log" 2>&1 && return
	tail -n 3 "$RUN/helm.log" | sed 's/^/      /'
	return 1
}
quietly() { helm "$@" --wait --timeout 3m >/dev/null; }
# no_plugin: neither node's runtime asks ztun about new pods.
no_plugin() {
	local n
	for n in $NODES; do
		! on "$n" grep -qr ztun-cni /etc/cni/net.d || return 1
	done
}
plugin() { ! no_plugin; }
captured() { [ "$(k -n istio-system exec "$(proxy_on n1)" -- ztun pod list | grep -c '^amb ')" -ge 2 ]; }
answered() { [ "$(asks 10 http://web.amb/)" = 10 ]; }
deployed() { helm status ztun -o json | grep -q "\"status\":\"deployed\""; }

try_helm() {
	local said seen=$RUN/helm.seen
	[ -x "$BIN/helm" ] || { judge "helm" "is not there: scripts/kube-lab build helm" false; return; }
	python3 - "$RUN/agent.yaml" >"$RUN/ours.yaml" <<-'END'
		import sys
		import yaml
		with open(sys.argv[1]) as f:
		    ours = [o for o in yaml.safe_load_all(f) if o["kind"] != "Namespace" and o["metadata"]["name"].startswith("zt")]
		yaml.safe_dump_all(ours, sys.stdout)
	END
	k delete -f "$RUN/ours.yaml" --timeout=90s >/dev/null
	judge "without ztun" "the CNI plugin is gone" soon 60 no_plugin
	judge "without ztun, pods that were captured" "answer in plaintext" soon 30 answered
	judge "helm install" "succeeds" release install
	judge "helm status" "deployed" deployed
	judge "after helm install" "the plugin is there" soon 30 plugin
	judge "after helm install" "the pods of the mesh are captured" soon 60 captured
	judge "after helm install" "they answer" soon 20 answered
	traffic "$seen"
	judge "helm upgrade under traffic" "succeeds" release upgrade --set logLevel=info\\,proxy=debug
	sleep 3
	said=$(traffic_end "$seen")
	judge "helm upgrade under traffic" "$said" none_failed "$said"
	grep bad "$seen" | head -n 5 | sed 's/^/      /'
	judge "a value that is none" "is refused" no_release
	judge "helm rollback" "succeeds" quietly rollback ztun 1
	judge "after helm rollback" "the pods of the mesh are captured" soon 60 captured
	judge "helm uninstall" "succeeds" quietly uninstall ztun
	judge "after helm uninstall" "the plugin is gone" soon 60 no_plugin
	judge "after helm uninstall, pods that were captured" "answer in plaintext" soon 30 answered
	sleeper amb late n2 '[sleep, "1000000"]'
	judge "after helm uninstall, a new pod" "starts" k get -n amb pod late -o name
	k delete pod -n amb late --wait=false >/dev/null
	k apply --server-side -f "$RUN/ours.yaml" >/dev/null
	k -n istio-system rollout status ds/ztun-agent --timeout=90s >/dev/null
	k -n istio-system rollout status ds/ztunnel --timeout=90s >/dev/null
	judge "the lab's own objects again" "the pods of the mesh are captured" soon 60 captured
}
no_release() { ! release upgrade --set steering=nonsense; }
