package rig

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
)

// MiB is 2^20 bytes.
const MiB = 1 << 20

// Bulk is a deterministic stream of n bytes that no compression or repetition makes easier.
func Bulk(n int64, seed uint64) io.Reader {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	return io.LimitReader(rand.NewChaCha8(key), n)
}

// BulkHash is the SHA-256 of Bulk in hexadecimal.
func BulkHash(n int64, seed uint64) string {
	h := sha256.New()
	io.Copy(h, Bulk(n, seed))
	return hex.EncodeToString(h.Sum(nil))
}

// Echo is an application that sends back what it gets, and ends its direction after the peer ended the other.
func Echo(c *net.TCPConn) {
	if _, err := io.CopyBuffer(onlyWriter{c}, onlyReader{c}, make([]byte, 64<<10)); err == nil {
		c.CloseWrite()
		io.Copy(io.Discard, c) // until the proxy has ended it as well
	}
}

// Sink is an application that reads everything to its end and then answers with "LENGTH SHA256\n".
func Sink(c *net.TCPConn) {
	h := sha256.New()
	n, err := io.CopyBuffer(h, onlyReader{c}, make([]byte, 64<<10))
	if err != nil {
		return
	}
	fmt.Fprintf(c, "%d %s\n", n, hex.EncodeToString(h.Sum(nil)))
}

// Source is an application that sends n bytes of Bulk at once, ends its direction, and then reads the other to its end.
func Source(n int64, seed uint64) func(c *net.TCPConn) {
	return func(c *net.TCPConn) {
		if _, err := io.CopyBuffer(onlyWriter{c}, onlyReader{Bulk(n, seed)}, make([]byte, 64<<10)); err != nil {
			return
		}
		c.CloseWrite()
		io.Copy(io.Discard, c)
	}
}

// onlyReader and onlyWriter keep io.Copy from splice(2), whose pipes a race detector's machine has few of.
type onlyReader struct{ io.Reader }
type onlyWriter struct{ io.Writer }

// Duplex is a connection with directions that end one by one.
type Duplex interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// Exchange sends n bytes of Bulk on c while it reads, ends the direction, and checks that exactly these bytes come
// back before the end.
func Exchange(c Duplex, n int64, seed uint64) error {
	sent := make(chan error, 1)
	go func() {
		_, err := io.CopyBuffer(onlyWriter{c}, onlyReader{Bulk(n, seed)}, make([]byte, 64<<10))
		sent <- errors.Join(err, c.CloseWrite())
	}()
	err := Verify(c, n, seed)
	if err != nil {
		c.Close() // or the sender waits for window for ever
	}
	return errors.Join(err, <-sent)
}

// Verify reads to the end and checks that it was n bytes of Bulk.
func Verify(c io.Reader, n int64, seed uint64) error {
	h := sha256.New()
	got, err := io.CopyBuffer(h, onlyReader{c}, make([]byte, 64<<10))
	if err != nil {
		return fmt.Errorf("after %d of %d bytes: %w", got, n, err)
	}
	if sum := hex.EncodeToString(h.Sum(nil)); got != n || sum != BulkHash(n, seed) {
		return fmt.Errorf("%d bytes arrived, SHA-256 %s; want %d, %s", got, sum, n, BulkHash(n, seed))
	}
	return nil
}
