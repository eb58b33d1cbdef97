#!/usr/bin/env python3
"""split.py ISTIO.yaml DIR

Writes what `istioctl manifest generate --set profile=ambient` has made as crds.yaml and istio.yaml, changed for the lab:
small requests, probes each second, more of istio-cni's log, nft as its iptables (it would choose by a probe that itself
makes the legacy tables). Left out are autoscalers, and webhooks: the API server has no way to ClusterIPs here."""
import os
import sys

import yaml

LEFT_OUT = "HorizontalPodAutoscaler", "MutatingWebhookConfiguration", "ValidatingWebhookConfiguration"


def fit(container):
    container["imagePullPolicy"] = "IfNotPresent"
    container["image"] = container["image"].replace("-distroless", "")
    container.setdefault("resources", {}).setdefault("requests", {}).update({"cpu": "10m", "memory": "64Mi"})
    container["readinessProbe"]["periodSeconds"] = 1
    if container["name"] == "install-cni":
        container["args"] = ["--log_output_level=all:debug"]
        container["env"].append({"name": "FORCE_IPTABLES_BINARY", "value": "nft"})


def main():
    source, target = sys.argv[1:]
    crds = []
    rest = [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "istio-system"}}]
    with open(source) as f:
        for o in yaml.safe_load_all(f):
            if not o or o["kind"] in LEFT_OUT:
                continue
            if o["kind"] in ("Deployment", "DaemonSet"):
                for c in o["spec"]["template"]["spec"]["containers"]:
                    fit(c)
            (crds if o["kind"] == "CustomResourceDefinition" else rest).append(o)
    for name, objects in ("crds", crds), ("istio", rest):
        with open(os.path.join(target, name + ".yaml"), "w") as f:
            yaml.safe_dump_all(objects, f)


main()
