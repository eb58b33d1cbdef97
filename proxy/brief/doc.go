// Package brief has contexts for what is begun some thousand times a second, and mostly ends within a millisecond: the
// making of a connection.
//
// What flows through: nothing but ends, by cancellation, by the end of the parent, or at a deadline. Who calls it: the
// proxy, which begins one for each connection until it is carried, and hbone for the handler of a request.
//
// What it never does: keep a timer or a place in its parent's map for each context, as package context's do. A
// connection had four of those (2.7 % of the processor time and 18 of the 298 objects of one, test/bench/connpath). All
// contexts of a Set are on one list, and their deadlines are looked at twice a second: a deadline is late by half a
// second at most, and never early. It is a deadline of the whole context: there are no children with shorter ones but
// package context's own.
package brief
