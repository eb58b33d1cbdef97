#!/usr/bin/env bash
# node.sh up|down NODE: a node is a set of namespaces (network, mounts, processes, host name, IPC, cgroups) with containerd
# and kubelet in them; init.sh is their process 1.
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"
node=$2

# cgroups: the directories of the node's cgroups, below those that this process is in.
cgroups() {
	local controller path
	while IFS=: read -r _ controller path; do
		controller=${controller#name=}
		local at=/sys/fs/cgroup/${controller:-unified}
		[ ! -d "$at" ] || echo "$at${path%/}/$PREFIX-$node"
	done </proc/self/cgroup
}

up() {
	local d leader
	d=$RUN/$node
	mkdir -p "$d"/{kubelet,containerd,cni,log/pods,log/containers,etc-cni/net.d,opt-cni/bin,etc-kubernetes,fake}
	cgroups >"$d/cgroups"
	while read -r g; do
		mkdir -p "$g"
		if [[ $g == */cpuset/* ]]; then
			cat "${g%/*}/cpuset.cpus" >"$g/cpuset.cpus"
			cat "${g%/*}/cpuset.mems" >"$g/cpuset.mems"
			echo 1 >"$g/cgroup.clone_children"
		fi
	done <"$d/cgroups"
	# shellcheck disable=SC2016 # that shell expands it
	setsid bash -c 'while read -r g; do echo $$ >"$g/cgroup.procs"; done <"$1/cgroups"
		exec nsenter --net="$2" unshare -m -u -i -C -p -f --kill-child --propagation private bash "$3" "$4"' \
		_ "$d" "/run/netns/$PREFIX-$node" "$here/init.sh" "$node" </dev/null >>"$d/init.log" 2>&1 &
	leader=$!
	need 120 test -e "$d/ready"
	tr -d ' ' <"/proc/$leader/task/$leader/children" >"$d/init.pid"
}

down() {
	local d pid
	d=$RUN/$node
	[ -e "$d/init.pid" ] || return 0
	pid=$(cat "$d/init.pid")
	if [ "$(readlink "/proc/$pid/ns/net" 2>/dev/null)" = "$(stat -Lc 'net:[%i]' "/run/netns/$PREFIX-$node")" ]; then
		kill -9 "$pid"
		gone "$pid"
	fi
	rm -rf "$d"/{init.pid,ready,start,kubelet,cni,log}
	while read -r g; do
		for _ in $(seq 50); do
			[ -d "$g" ] || break
			find "$g" -depth -type d -exec rmdir {} \; 2>/dev/null
			sleep 0.05
		done
	done <"$d/cgroups"
}

"$1"
