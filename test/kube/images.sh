#!/usr/bin/env bash
# images.sh [NAME...]: images/*.tar out of the programs, without a registry and without Docker.
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"
set -e
mkdir -p "$IMAGES"
root=$LAB/rootfs

# fresh NAME: an empty root file system, in $r.
fresh() {
	r=$root/$1
	rm -rf "$r"
	mkdir -p "$r"/{bin,sbin,etc,tmp,run,usr/bin,usr/sbin,usr/local/bin}
	chmod 1777 "$r/tmp"
	echo 'root:x:0:0:root:/root:/bin/sh' >"$r/etc/passwd"
	echo 'root:x:0:' >"$r/etc/group"
}
# libraries PROGRAM...: those that the programs load, and their loader.
libraries() {
	local p l
	for p; do ldd "$p" 2>/dev/null | grep -oE '/[^ ]+' || true; done | sort -u | while read -r l; do
		mkdir -p "$r$(dirname "$l")"
		cp -Ln "$l" "$r$l"
	done
}
# tools BUSYBOX: it, and all its names.
tools() {
	local name
	cp "$1" "$r/bin/busybox"
	for name in $("$1" --list); do
		[ "$name" = busybox ] || ln -s busybox "$r/bin/$name"
	done
}
pack() {
	local name=$1
	shift
	"$here/image.py" "$IMAGES/$name.tar" "localhost/$name:1" "$r" "$@"
}

image_pause() {
	fresh pause
	gcc -O2 -static -s -o "$r/pause" "$here/pause.c"
	pack pause --entrypoint /pause
}

# A small server and client: httpd, nc and curl. Debian's busybox with libraries, since the static one crashes when it
# looks names up.
image_busybox() {
	local deb=$LAB/deb
	fresh busybox
	if [ ! -e "$deb/x/bin/busybox" ]; then
		mkdir -p "$deb"
		(cd "$deb" && apt-get download busybox && dpkg -x busybox_*.deb x)
	fi
	tools "$deb/x/bin/busybox"
	cp /usr/bin/curl "$r/usr/bin/"
	libraries "$deb/x/bin/busybox" /usr/bin/curl
	cp -L /lib/x86_64-linux-gnu/libnss_{dns,files}.so.2 "$r/lib/x86_64-linux-gnu/"
	printf 'hosts: files dns\npasswd: files\n' >"$r/etc/nsswitch.conf"
	pack busybox --cmd /bin/sh
}

# istio-cni: its two programs, and Debian's iptables.
image_cni() {
	local kind command
	fresh install-cni
	tools /bin/busybox
	mkdir -p "$r/opt/cni/bin" "$r/usr/lib/x86_64-linux-gnu"
	cp "$BIN/istio-cni" "$r/opt/cni/bin/"
	cp "$BIN/install-cni" "$r/usr/local/bin/"
	cp /usr/sbin/xtables-{nft,legacy}-multi "$r/usr/sbin/"
	cp -r /usr/lib/x86_64-linux-gnu/xtables "$r/usr/lib/x86_64-linux-gnu/"
	for command in iptables ip6tables; do
		for kind in "" -save -restore; do
			ln -s xtables-nft-multi "$r/usr/sbin/$command$kind"
			ln -s xtables-nft-multi "$r/usr/sbin/$command-nft$kind"
			ln -s xtables-legacy-multi "$r/usr/sbin/$command-legacy$kind"
		done
	done
	libraries /usr/sbin/xtables-nft-multi /usr/sbin/xtables-legacy-multi
	pack install-cni --workdir /opt/cni/bin --cmd /usr/local/bin/install-cni \
		--env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/opt/cni/bin
}

image_pilot() {
	fresh pilot
	mkdir -p "$r/var/lib/istio/envoy" "$r/home"
	cp "$BIN/pilot-discovery" "$r/usr/local/bin/"
	pack pilot --user 1337:1337 --entrypoint /usr/local/bin/pilot-discovery
}

image_coredns() {
	fresh coredns
	cp "$BIN/coredns" "$r/"
	pack coredns --entrypoint /coredns
}

# ztun as it is released, under the name that ztunnel's DaemonSet asks for.
image_ztun() { "$BIN/image" "$IMAGES/ztunnel.tar" localhost/ztunnel 1 lab "amd64=$BIN/ztun,$BIN/ztun-agent" >/dev/null; }

[ $# -gt 0 ] || set -- pause busybox cni pilot coredns ztun
for name; do "image_$name"; done
