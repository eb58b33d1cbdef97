#!/usr/bin/env bash
# What can be tried with ztun's own agent alone (kube-lab up agent); trial.sh sources it.
# shellcheck shell=bash disable=SC2317 # functions that judge and soon call

# nap NAMESPACE: a pod that sleeps, on n1.
nap() {
	apply <<-END
		apiVersion: v1
		kind: Pod
		metadata: {name: nap, namespace: $1}
		spec:
		  nodeName: n1
		  terminationGracePeriodSeconds: 1
		  containers: [{name: c, image: "localhost/busybox:1", command: [sleep, "1000000"]}]
	END
}
napping() { k wait -n "$1" --for=condition=Ready pod/nap --timeout="$2" >/dev/null 2>&1; }

# No agent: a pod of the mesh waits and has an event, others start; it starts when the agent is back.
try_away() {
	local said
	k create namespace free >/dev/null 2>&1
	k -n istio-system patch ds ztun-agent -p '{"spec":{"template":{"spec":{"nodeSelector":{"none":"x"}}}}}' >/dev/null
	no_agent() { [ -z "$(k -n istio-system get pod -l app=ztun-agent -o name)" ]; }
	judge "the agent is away" "no pod of it" soon 60 no_agent
	said=$(asks 20 http://web.amb/)
	judge "the pods of the mesh" "$said of 20 answered" [ "$said" = 20 ]
	nap free
	nap amb
	judge "a pod outside the mesh" "starts" napping free 60s
	waits() { k get events -n amb --field-selector involvedObject.name=nap | grep -q 'does not start uncaptured'; }
	judge "a pod of the mesh" "has an event that says why it waits" soon 60 waits
	not_yet() { ! napping amb 1s; }
	judge "a pod of the mesh" "does not start" not_yet
	k -n istio-system patch ds ztun-agent --type=json \
		-p '[{"op":"remove","path":"/spec/template/spec/nodeSelector/none"}]' >/dev/null
	judge "the agent is back" "the pod starts" napping amb 120s
	listed() { k -n istio-system exec "$(proxy_on n1)" -- ztun pod list | grep -q '^amb *nap '; }
	judge "the agent is back" "the pod is captured" soon 20 listed
	k delete pod -n amb nap --wait=false >/dev/null
	k delete namespace free --wait=false >/dev/null
}
