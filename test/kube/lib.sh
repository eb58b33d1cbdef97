#!/usr/bin/env bash
# What all scripts of the lab share; they source it.
# shellcheck shell=bash disable=SC2034 # used by those
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# Programs, images and what runs: on a real file system, since overlayfs keeps its upper directories here.
LAB=${ZTUN_KUBE_LAB:-/var/tmp/ztun-kube-lab}
BIN=$LAB/bin RUN=$LAB/run IMAGES=$LAB/images MANIFESTS=$LAB/manifests
PREFIX=kube # of the network namespaces and cgroups
NODES="n1 n2"
CP4=10.97.0.10 CP6=fd97::10 # the control plane, in namespace kube-cp
API=10.96.0.1               # the ClusterIP of the API server: an address of kube-cp, so that it needs no kube-proxy
export KUBECONFIG=$RUN/admin.kubeconfig

node4() { echo "10.97.0.${1#n}"; }
node6() { echo "fd97::${1#n}"; }
pods4() { echo "10.97.${1#n}.0/24"; }
pods6() { echo "fd97:${1#n}::/64"; }

# inside NAME COMMAND...: in a network namespace of the lab.
inside() {
	local name=$1
	shift
	nsenter --net="/run/netns/$PREFIX-$name" "$@"
}
k() { inside cp "$BIN/kubectl" "$@"; }
# on NODE COMMAND...: in all namespaces of a node.
on() {
	local node=$1
	shift
	nsenter -t "$(cat "$RUN/$node/init.pid")" -m -u -i -n -p -C -w/ "$@"
}
# spawn NAMESPACE NAME COMMAND...: in the background, until reap NAME.
spawn() {
	local ns=$1 name=$2
	shift 2
	setsid nsenter --net="/run/netns/$PREFIX-$ns" "$@" </dev/null >>"$RUN/$name.log" 2>&1 &
	echo $! >"$RUN/$name.pid"
}
reap() {
	local pid
	pid=$(cat "$RUN/$1.pid" 2>/dev/null) || return 0
	kill -9 "$pid" 2>/dev/null
	gone "$pid" && rm -f "$RUN/$1.pid"
}
gone() {
	for _ in $(seq 100); do
		kill -0 "$1" 2>/dev/null || return 0
		sleep 0.1
	done
	echo "process $1 does not end" >&2
	return 1
}
# soon SECONDS COMMAND...: until the command succeeds.
soon() {
	local end=$((SECONDS + $1))
	shift
	until "$@" >/dev/null 2>&1; do
		[ $SECONDS -lt $end ] || return 1
		sleep 0.3
	done
}
# need SECONDS COMMAND...: soon, or the end.
need() {
	soon "$@" && return
	shift
	echo "this did not come true: $*; logs are in $RUN" >&2
	exit 1
}
say() { printf '%4d s  %s\n' $SECONDS "$*"; }
