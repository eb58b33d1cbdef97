package socks

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"unicode/utf8"
)

// Reply is the code of a reply (RFC 1928 section 6).
type Reply byte

// The replies.
const (
	Succeeded          Reply = 0
	GeneralFailure     Reply = 1
	NotAllowed         Reply = 2
	NetworkUnreachable Reply = 3
	HostUnreachable    Reply = 4
	ConnectionRefused  Reply = 5
	TTLExpired         Reply = 6 // also: timed out
	NotSupported       Reply = 7 // command not supported; ztunnel's answer to every violation
)

// Request is what a client asks to be connected to: Addr if it is valid, else Host.
type Request struct {
	Addr netip.Addr // canonical: IPv4 in IPv6 clothes is IPv4
	Host string
	Port uint16
}

// Error is a handshake that failed. Reply is what the client is to be told.
type Error struct {
	Reply Reply
	Err   error
}

func (e *Error) Error() string { return "socks5: " + e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

func violation(format string, args ...any) error {
	return &Error{NotSupported, fmt.Errorf(format, args...)}
}

const (
	version = 5
	noAuth  = 0
	connect = 1

	atypIPv4   = 1
	atypDomain = 3
	atypIPv6   = 4
)

// Negotiate reads greeting and request from rw, at most 521 bytes and none beyond them, and answers the
// greeting. The request is the caller's to answer, an *Error (every error is one) as well.
func Negotiate(rw io.ReadWriter) (Request, error) {
	var req Request
	var b [256]byte
	read := func(n int) ([]byte, error) {
		if _, err := io.ReadFull(rw, b[:n]); err != nil {
			return nil, &Error{GeneralFailure, err}
		}
		return b[:n], nil
	}

	greeting, err := read(2)
	if err != nil {
		return req, err
	}
	n := int(greeting[1])
	switch {
	case greeting[0] != version:
		return req, violation("greeting of version %d: this port speaks SOCKS5 only", greeting[0])
	case n == 0:
		return req, violation("greeting without authentication methods")
	}
	methods, err := read(n)
	if err != nil {
		return req, err
	}
	if !contains(methods, noAuth) {
		return req, violation("client insists on authentication (methods %x); only no authentication (00) is supported",
			methods)
	}
	if _, err := rw.Write([]byte{version, noAuth}); err != nil {
		return req, &Error{GeneralFailure, err}
	}

	head, err := read(4) // version, command, reserved, address type
	if err != nil {
		return req, err
	}
	switch {
	case head[0] != version:
		return req, violation("request of version %d", head[0])
	case head[1] != connect:
		return req, violation("command %d is not supported, only CONNECT (1) is", head[1])
	}
	if err := req.readAddress(head[3], read); err != nil {
		return req, err
	}
	port, err := read(2)
	if err != nil {
		return req, err
	}
	req.Port = uint16(port[0])<<8 | uint16(port[1])
	return req, nil
}

func (r *Request) readAddress(atyp byte, read func(int) ([]byte, error)) error {
	switch atyp {
	case atypIPv4, atypIPv6:
		size := 4
		if atyp == atypIPv6 {
			size = 16
		}
		b, err := read(size)
		if err != nil {
			return err
		}
		a, _ := netip.AddrFromSlice(b)
		r.Addr = a.Unmap()
		return nil
	case atypDomain:
		b, err := read(1)
		if err != nil {
			return err
		}
		if b[0] == 0 {
			return violation("request for an empty domain")
		}
		if b, err = read(int(b[0])); err != nil {
			return err
		}
		if !utf8.Valid(b) {
			return violation("request for a domain that is not UTF-8: %q", b)
		}
		if a, err := netip.ParseAddr(string(b)); err == nil && a.Zone() == "" {
			r.Addr = a.Unmap()
		} else {
			r.Host = string(b)
		}
		return nil
	}
	return violation("address type %d is not known", atyp)
}

func contains(b []byte, want byte) bool {
	for _, x := range b {
		if x == want {
			return true
		}
	}
	return false
}

// WriteReply answers a request, with the address 0.0.0.0:0 as ztunnel does.
func WriteReply(w io.Writer, r Reply) error {
	_, err := w.Write([]byte{version, byte(r), 0, atypIPv4, 0, 0, 0, 0, 0, 0})
	return err
}

// ReplyOf is what an error of Negotiate is to be answered with; ok is false where there is nobody to answer:
// the client left before it said anything.
func ReplyOf(err error) (r Reply, ok bool) {
	var e *Error
	if !errors.As(err, &e) || errors.Is(e.Err, io.EOF) {
		return GeneralFailure, false
	}
	return e.Reply, true
}
