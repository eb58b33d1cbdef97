// Package refusal is how a SYN that is held may be turned down: the words in which the proxy, which decides, and the
// stack, which answers, speak of it. It knows neither of them, so that neither has to know the other.
//
// Decisions:
//   - 2026-11-28: one type in a package of its own. There were two, with different numbers, and a switch between them.
//   - 2026-11-29: below proxy, as package ports is, and for its reason.
package refusal
