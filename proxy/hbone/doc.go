// Package hbone is HTTP/2 as the mesh uses it: CONNECT, and nothing else.
package hbone
