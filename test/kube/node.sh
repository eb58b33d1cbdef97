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
	# shellcheck disable=SC2317 # soon calls it
	child() { pid=$(tr -d ' ' <"/proc/$leader/task/$leader/children") && [ -n "$pid" ]; }
	need 20 child
	born "$pid" >"$d/init.born"
	echo "$pid" >"$d/init.pid" # before it is ready: down ends a node that never became so
	need 120 test -e "$d/ready"
}
# born PID: when it began, which tells it from a later one of its number.
born() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }

down() {
	local d pid
	d=$RUN/$node
	[ -e "$d/init.pid" ] || return 0
	pid=$(cat "$d/init.pid")
	if [ "$(born "$pid")" = "$(cat "$d/init.born")" ]; then
		kill -9 "$pid"
		gone "$pid" || return # its files stay, with what is needed to try again
	fi
	rm -rf "$d"/{init.pid,init.born,ready,start,kubelet,cni,log}
	while read -r g; do
		for _ in $(seq 50); do
			[ -d "$g" ] || break
			find "$g" -depth -type d -exec rmdir {} \; 2>/dev/null
			sleep 0.05
		done
	done <"$d/cgroups"
}

"$1"
