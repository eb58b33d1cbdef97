// Package nslab makes real network namespaces for tests that need them, and removes them when the test ends, however
// it ends.
//
// Who calls it: tests below tun. What it never does: skip a test silently. Without root a test fails and says so,
// unless ZTUN_TEST_NOROOT=1 asks to skip.
package nslab
