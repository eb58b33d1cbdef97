package hbone

import (
	"errors"
	"sync/atomic"
	"testing"
)

// guard makes sure at run time that one goroutine at a time works with a key and its count of records, and nobody
// after the end: two would seal two records with one nonce, which gives the plaintext and GCM's authentication key
// away. The rules that keep it so are conn's (one flusher) and tlsConn's (its locks); this finds whoever breaks them.
// In tests it panics; in life the second comer gets an error, seals nothing, and his connection ends.
type guard struct {
	taken atomic.Bool
	over  bool // nothing may follow; the holder's
}

var (
	errTwoAtKey = errors.New("hbone: two goroutines at one traffic key (a fault of ours)")
	errKeyOver  = errors.New("hbone: a record after close_notify (a fault of ours)")
)

func (g *guard) begin() error {
	blind()
	free := g.taken.CompareAndSwap(false, true)
	see()
	switch {
	case !free:
		return fault(errTwoAtKey)
	case g.over:
		g.end()
		return fault(errKeyOver)
	}
	return nil
}

func (g *guard) end() {
	blind()
	g.taken.Store(false)
	see()
}

// fault is err, and the end of a test.
func fault(err error) error {
	if testing.Testing() {
		panic(err)
	}
	return err
}
