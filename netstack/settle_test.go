package netstack

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"
)

// TestSettle closes a connection in good order while its reader is far behind: Settle waits for the
// reader, and a Close after it costs him nothing.
func TestSettle(t *testing.T) {
	eachWay(t, func(t *testing.T, j *joined, fam family) {
		a, b := j.pipe(t, fam)
		sent := bytes.Repeat([]byte("0123456789abcdef"), 20_000)
		done := make(chan error, 1)
		go func() {
			_, err := a.Write(sent)
			a.CloseWrite()
			a.Close()
			done <- err
		}()
		// The window fills up before all is sent: nothing settles while nobody reads. What fits is taken first.
		got := make([]byte, 0, len(sent))
		buf := make([]byte, 4<<10)
		for len(got) < 32<<10 {
			n, err := b.Read(buf)
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, buf[:n]...)
		}
		rest := make(chan []byte, 1)
		go func() {
			time.Sleep(50 * time.Millisecond)
			rest <- readAll(t, b)
		}()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := j.client.Settle(ctx); err != nil {
			t.Fatal(err)
		}
		j.client.Close()
		if got = append(got, <-rest...); !bytes.Equal(got, sent) {
			t.Errorf("the reader got %d bytes of %d", len(got), len(sent))
		}
	})
}

// TestSettleEnds does not wait for a reader who never comes.
func TestSettleEnds(t *testing.T) {
	j := join(t, true, nil)
	a, _ := j.pipe(t, families[0])
	a.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
	a.Write(make([]byte, 8<<20)) // as much as fits
	a.CloseWrite()
	a.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := j.client.Settle(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Settle: %v", err)
	}
}
