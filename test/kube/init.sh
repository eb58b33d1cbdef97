#!/usr/bin/env bash
# init.sh NODE: process 1 of a node: its file systems, containerd, the images; then kubelet and kube-proxy, once the file
# "start" is there, and again when they end.
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"
node=$1 d=$RUN/$1

mount --make-rprivate /
hostname "$node"
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs -o mode=755 cgroup /sys/fs/cgroup
for c in cpu cpuacct cpuset memory devices freezer blkio pids; do
	mkdir /sys/fs/cgroup/$c
	mount -t cgroup -o $c cgroup /sys/fs/cgroup/$c
done
mkdir /sys/fs/cgroup/systemd /sys/fs/cgroup/unified
mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified
# Namespaces of the machine's that are mounted here would outlive their owners.
awk '$5 ~ "^/run/netns" { print $5 }' /proc/self/mountinfo | tac | while read -r m; do umount -l "$m"; done
mount -t tmpfs -o mode=755 run /run
mkdir -p /run/{netns,containerd,ztunnel,istio-cni} /var/lib/{kubelet,containerd,cni} /var/log/{pods,containers} \
	/etc/cni /opt/cni /etc/kubernetes
bind() { mount --bind "$d/$1" "$2"; }
for name in kubelet containerd cni; do bind $name /var/lib/$name; done
for name in pods containers; do bind log/$name /var/log/$name; done
bind etc-cni /etc/cni
bind opt-cni /opt/cni
bind etc-kubernetes /etc/kubernetes
# own NAME FILE: a file of the machine's has other contents here.
own() {
	cat >"$d/fake/$1"
	[ -e "$2" ] || touch "$2"
	bind "fake/$1" "$2"
}
printf '%032x\n' $((0xabc000 + ${node#n})) | own machine-id /etc/machine-id
printf '127.0.0.1 localhost\n::1 localhost\n%s %s\n' "$(node4 "$node")" "$node" | own hosts /etc/hosts
own resolv.conf /etc/resolv.conf </dev/null
# kubelet insists on these settings, which are the whole machine's: it sees what it wants, and nothing changes.
echo 1 | own overcommit /proc/sys/vm/overcommit_memory
echo 10 | own panic /proc/sys/kernel/panic
echo 1 | own oops /proc/sys/kernel/panic_on_oops
mount --make-rshared /

cp -n /usr/lib/cni/* /opt/cni/bin/
rm -rf /etc/cni/net.d/*
link='"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true'
[ "$(cat "$RUN/cni")" = bridge ] || link='"type": "ptp"'
cat >/etc/cni/net.d/10-pods.conflist <<END
{"cniVersion": "0.4.0", "name": "pods", "plugins": [
 {$link, "ipMasq": false, "ipam": {
  "type": "host-local", "ranges": [[{"subnet": "$(pods4 "$node")"}], [{"subnet": "$(pods6 "$node")"}]],
  "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}},
 {"type": "portmap", "capabilities": {"portMappings": true}}]}
END
# restrict_oom_score_adj: root may lack CAP_SYS_RESOURCE, without which no sandbox starts.
cat >/run/containerd/config.toml <<END
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
END
nice -n 5 containerd -c /run/containerd/config.toml >>"$d/containerd.log" 2>&1 &
need 60 ctr version
mkdir -p "$d/imported"
for image in "$IMAGES"/*.tar; do
	stamp=$d/imported/$(basename "$image").$(stat -c %Y.%s "$image")
	[ -e "$stamp" ] || { ctr -n k8s.io images import "$image" && touch "$stamp"; }
done
touch "$d/ready"

kubelet() {
	nice -n 5 "$BIN/kubelet" --config "$d/kubelet.yaml" --kubeconfig "$d/kubelet.kubeconfig" --hostname-override "$node" \
		--node-ip "$(node4 "$node"),$(node6 "$node")" --root-dir /var/lib/kubelet -v 2 >>"$d/kubelet.log" 2>&1
}
proxy() {
	nice -n 5 "$BIN/kube-proxy" --config "$d/kube-proxy.yaml" --hostname-override "$node" -v 1 >>"$d/kube-proxy.log" 2>&1
}
until [ -e "$d/start" ]; do sleep 0.3; done
while :; do kubelet; sleep 2; done &
while :; do proxy; sleep 2; done &
wait
