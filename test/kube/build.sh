#!/usr/bin/env bash
# build.sh [kube|istio|coredns|helm|ztun]...: the programs, from the Go module proxy and this repository, into $LAB/bin. All but
# ztun are built once. On two processors with nothing else to do it takes about 35 minutes.
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"
set -e
version=v1.36.1
mkdir -p "$BIN"

# from MODULE WHAT COMMAND...: in a module of src, unless WHAT is there.
from() {
	local module=$1 what=$2
	shift 2
	[ ! -e "$BIN/$what" ] || return 0
	say "building $what"
	(cd "$here/src/$module" && nice "$@")
}

build_kube() {
	local set=k8s.io/component-base/version program
	from kube kube go build -mod=mod -p 2 -o "$BIN/kube" -ldflags \
		"-s -w -X $set.gitVersion=$version -X $set.gitMajor=1 -X $set.gitMinor=36" .
	for program in etcd kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubelet kubectl; do
		ln -sf kube "$BIN/$program"
	done
}

build_istio() {
	local p
	for p in cni/cmd/install-cni cni/cmd/istio-cni pilot/cmd/pilot-discovery istioctl/cmd/istioctl; do
		CGO_ENABLED=0 from istio "${p##*/}" go build -mod=mod -p 2 -ldflags '-s -w' -o "$BIN/" "istio.io/istio/$p"
	done
	mkdir -p "$MANIFESTS"
	"$BIN/istioctl" manifest generate --set profile=ambient --set hub=localhost --set tag=1 >"$LAB/istio.yaml"
	"$here/split.py" "$LAB/istio.yaml" "$MANIFESTS"
}

build_coredns() { CGO_ENABLED=0 from coredns coredns go build -mod=mod -p 2 -ldflags '-s -w' -o "$BIN/coredns" .; }

# The version that the chart's own tests have.
build_helm() {
	[ ! -e "$BIN/helm" ] || return 0
	say "building helm"
	(cd "$here/../istio" && GOBIN=$BIN nice go install "helm.sh/helm/v4/cmd/helm@$(go list -m -f '{{.Version}}' helm.sh/helm/v4)")
}

build_ztun() {
	(cd "$here/../.." && CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o "$BIN/" ./cmd/ztun ./cmd/ztun-agent)
	(cd "$here/../../scripts/image" && go build -o "$BIN/image" .)
}

[ $# -gt 0 ] || set -- ztun coredns istio kube helm
for what; do "build_$what"; done
