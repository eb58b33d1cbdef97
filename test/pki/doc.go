// Package pki makes the certificates of control planes that tests stand up: a root, and what it issues to servers and
// clients. Those of workloads, with SPIFFE names, are package ca's own business.
package pki
