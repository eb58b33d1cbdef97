// Package checklist says for every assertion of the two specifications' checklists which test proves it, or why none
// does: checklist.md.
//
// Nothing flows through it; its test reads the tables and the repository's sources, so that a test that is renamed or
// deleted is missed here. It never runs the tests that it names, and cannot tell whether they assert what they
// should: that was read by people, and is to be read again when a row changes.
//
// Decisions:
//   - 2026-11-23: tests are named by directory, not by import path, so that those of the nested module test/istio are
//     no special case.
package checklist
