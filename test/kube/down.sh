#!/usr/bin/env bash
# down.sh [--purge]: ends what up.sh has started, and removes its namespaces and cgroups. Programs and images stay; with
# --purge the nodes' copies of the images go.
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"
for n in $NODES; do "$here/node.sh" down "$n" || failed=1; done
for name in scheduler controllers apiserver etcd; do reap $name || failed=1; done
[ -z "${failed:-}" ] || { echo "not all has ended; namespaces and files stay, try again" >&2; exit 1; }
for name in sw cp $NODES; do ip netns del "$PREFIX-$name" 2>/dev/null; done
[ "${1:-}" != --purge ] || rm -rf "$RUN"
! ip netns list | grep "^$PREFIX-"
