package attach

import (
	"errors"
	"log/slog"
	"net"
	"time"
)

// acceptWait is the longest pause of an accept loop after failures: long enough not to burn a processor, short enough
// that nobody who waits in the listener's queue repeats his SYN meanwhile.
const acceptWait = 500 * time.Millisecond

// Acceptor is a *net.TCPListener, or a *Listener.
type Acceptor interface {
	AcceptTCP() (*net.TCPConn, error)
	Addr() net.Addr
}

// Accept gives serve every connection of ln, until that is closed. serve must not wait.
func Accept(ln Acceptor, log *slog.Logger, serve func(*net.TCPConn)) {
	delay, said := time.Duration(0), time.Time{}
	for {
		conn, err := ln.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			// Out of file descriptors, mostly (the machine's: ours are shared out): accepting again at once would
			// only burn the processor.
			delay = min(max(2*delay, 5*time.Millisecond), acceptWait)
			if now := time.Now(); now.Sub(said) > 10*time.Second {
				said = now
				log.Warn("accept failed, will be tried again", "address", ln.Addr(), "error", err)
			}
			time.Sleep(delay)
			continue
		}
		delay = 0
		serve(conn)
	}
}

// Reset closes a connection at once, whatever it still had to send: its far end sees a reset.
func Reset(conn *net.TCPConn) {
	conn.SetLinger(0)
	conn.Close()
}

// Admit gives an accepted mesh connection to the Door that it is for, within that one's share of descriptors: what is
// returned serves it until it has ended, in a goroutine that the caller starts. Nil: there was no place, and it was
// reset.
func (o *Options) Admit(to Door, conn *net.TCPConn) (serve func()) {
	place := o.Descriptors.Inbound(to.Label, conn)
	if place == nil {
		Reset(conn)
		return nil
	}
	return func() {
		defer place.Release()
		to.Serve(conn, to.At)
	}
}
