#!/usr/bin/env python3
"""image.py OUT.tar NAME:TAG ROOT [--env K=V] [--workdir DIR] [--user UID:GID] [--entrypoint ARG] [--cmd ARG]

Writes a directory as an image of one layer, in the form of `docker save`, which `ctr images import` takes."""
import argparse
import hashlib
import io
import json
import os
import tarfile
import tempfile


def anonymous(info):
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return info


def add(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def main():
    p = argparse.ArgumentParser()
    for name in "out", "name", "root":
        p.add_argument(name)
    p.add_argument("--env", default="PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    p.add_argument("--workdir", default="/")
    p.add_argument("--user", default="")
    p.add_argument("--entrypoint")
    p.add_argument("--cmd")
    a = p.parse_args()
    with tempfile.TemporaryFile(dir=os.path.dirname(os.path.abspath(a.out))) as layer:
        with tarfile.open(fileobj=layer, mode="w") as t:
            for name in sorted(os.listdir(a.root)):
                t.add(os.path.join(a.root, name), name, filter=anonymous)
        size = layer.tell()
        layer.seek(0)
        digest = hashlib.file_digest(layer, "sha256").hexdigest()
        config = {"Env": [a.env], "WorkingDir": a.workdir, "User": a.user}
        if a.entrypoint:
            config["Entrypoint"] = [a.entrypoint]
        if a.cmd:
            config["Cmd"] = [a.cmd]
        image = json.dumps({"architecture": "amd64", "os": "linux", "config": config,
                            "rootfs": {"type": "layers", "diff_ids": ["sha256:" + digest]}}).encode()
        name = hashlib.sha256(image).hexdigest() + ".json"
        with tarfile.open(a.out, "w") as t:
            add(t, name, image)
            add(t, "manifest.json",
                json.dumps([{"Config": name, "RepoTags": [a.name], "Layers": ["layer.tar"]}]).encode())
            info = tarfile.TarInfo("layer.tar")
            info.size = size
            layer.seek(0)
            t.addfile(info, layer)


main()
