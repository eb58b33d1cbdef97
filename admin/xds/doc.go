// Package xds is where the admin loop learns what the mesh looks like.
//
// So far from a local file: ParseLocal reads ztunnel's LOCAL_XDS schema
// (YAML or JSON) into state and rbac values; File loads, watches and reloads
// it; the Write functions render state as /config_dump does. The admin loop
// calls all of them; nothing here touches what the data plane reads.
//
// Reading order: local.go (the schema, from above), policy.go (its policies),
// node.go (strict reading of YAML nodes: lines, keys, duplicates), file.go (the
// watching), dump.go (config_dump).
//
// # Decisions
//
// 2026-11-23: the file is read strictly and all at once: an unknown or repeated
// key, a wrong type, a repeated uid, service or policy is an error that names the
// line and the key, and nothing of the file is used. ztunnel lets entries with
// the same uid overwrite each other.
//
// 2026-11-23: an unknown key within a policy's match or serviceAccounts is an
// error too (ztunnel ignores it there): a misspelt constraint must not vanish
// from a policy. Unknown keys are ignored only within locality and cidrVips.
//
// 2026-11-23: an empty file is an error: that is what a reader sees between an
// editor's truncate and write, and it must not empty the mesh. "{}" is the way
// to say nothing.
//
// 2026-11-23: string matches are read both as tags (!Exact x), the only form
// that ztunnel reads, and as maps ({Exact: x}), the form that it dumps; port
// numbers as keys may be quoted. So a dump's staticConfig can be read back.
package xds
