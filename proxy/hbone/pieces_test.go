package hbone

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"testing"
)

// gatherer is a BufferWriter as netstack's connections are.
type gatherer struct {
	bytes.Buffer
	most, calls, largest int   // pieces at once, calls, bytes at once
	fail                 error // of the next call, which takes a part of its first piece
}

func (g *gatherer) Write([]byte) (int, error) { return 0, errors.New("one by one") }

func (g *gatherer) WriteBuffers(pieces [][]byte) (int64, error) {
	if g.fail != nil {
		n, _ := g.Buffer.Write(pieces[0][:len(pieces[0])/2])
		return int64(n), g.fail
	}
	size := 0
	for _, p := range pieces {
		g.Buffer.Write(p)
		size += len(p)
	}
	g.most, g.largest = max(g.most, len(pieces)), max(g.largest, size)
	g.calls++
	return int64(size), nil
}

// TestWriteToPieces: what lies in many pieces goes to a BufferWriter some at once, in order and bounded.
func TestWriteToPieces(t *testing.T) {
	a, b := tlsPair(t, false)
	cc, sc, reqs, stop := link(t, a, b, Config{})
	defer stop()
	c, s := pair(t, cc, reqs)
	const total = 1 << 20
	data := make([]byte, total)
	for i := range data {
		data[i] = byte(i >> 8 * 7)
	}
	// In frames that are no divisors of what is handed out at once.
	for part := range slices.Chunk(data, 50_000) {
		if _, err := c.Write(part); err != nil {
			t.Fatal(err)
		}
	}
	c.CloseWrite()
	eventually(t, func() bool { return sc.c.unread.Load() == total })
	var g gatherer
	if n, err := s.WriteTo(&g); err != nil || n != total || !bytes.Equal(g.Bytes(), data) {
		t.Fatalf("%d bytes, %v; the same: %v", n, err, bytes.Equal(g.Bytes(), data))
	}
	if g.most < 2 || g.largest > pieceBatch || g.calls > (total+pieceBatch-1)/pieceBatch {
		t.Errorf("%d pieces and %d bytes at most in one of %d calls", g.most, g.largest, g.calls)
	}
	if sc.c.unread.Load() != 0 {
		t.Errorf("%d bytes are still held", sc.c.unread.Load())
	}
}

// TestWriteToPiecesFails: the sink's error says that it is the sink's, and how much it took.
func TestWriteToPiecesFails(t *testing.T) {
	a, b := tlsPair(t, false)
	cc, sc, reqs, stop := link(t, a, b, Config{})
	defer stop()
	c, s := pair(t, cc, reqs)
	if _, err := c.Write(make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { return sc.c.unread.Load() == 1000 })
	g := gatherer{fail: io.ErrNoProgress}
	n, err := s.WriteTo(&g)
	if sink := (*SinkError)(nil); !errors.As(err, &sink) || sink.Err != g.fail || n != 500 {
		t.Errorf("%d bytes, %v", n, err)
	}
}
