#!/usr/bin/env python3
"""agent.py ISTIO OURS STEERING: Istio's objects without istio-cni and ztunnel, and ours as the lab has images and probes."""
import sys

import yaml

GONE = ("istio-cni", "ztunnel")


def main():
    istio, ours, steering = sys.argv[1:]
    objects = []
    with open(istio) as f:
        objects += [o for o in yaml.safe_load_all(f) if not o["metadata"]["name"].startswith(GONE)]
    with open(ours) as f:
        for o in yaml.safe_load_all(f):
            if o["kind"] == "DaemonSet":
                for c in o["spec"]["template"]["spec"]["containers"]:
                    c["image"] = "localhost/ztunnel:1"
                    c["resources"]["requests"] = {"cpu": "10m", "memory": "64Mi"}
                    c["readinessProbe"]["periodSeconds"] = 1
                    for e in c.get("env", []):
                        if e["name"] == "ZTUN_STEERING":
                            e["value"] = steering
            objects.append(o)
    yaml.safe_dump_all(objects, sys.stdout)


main()
