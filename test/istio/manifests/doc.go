// Package manifests holds the tests of scripts/kubernetes: that an API server would take what it has, that ztun's
// DaemonSet is ztunnel's, and that kustomize and the Helm chart say the same.
package manifests
