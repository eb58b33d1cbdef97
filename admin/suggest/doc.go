// Package suggest finds what somebody may have meant who wrote a word that nobody knows: a command, a flag, the key of
// a file, a parameter of a request. It is pure, imports nothing of ours, and never decides: what is unknown stays an
// error, which says one word more.
package suggest
