package hbone

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// The record reader against crypto/tls as the oracle: both are given the same bytes under the same keys, and have to
// deliver the same data, and to end with the same alert.

// tape is a connection that gives what is on it, and then the end, and keeps what is written. During a handshake it is
// the connection beneath.
type tape struct {
	net.Conn
	playing atomic.Bool
	in      bytes.Reader
	mu      sync.Mutex
	out     bytes.Buffer
}

func (p *tape) Read(b []byte) (int, error) {
	if !p.playing.Load() {
		return p.Conn.Read(b)
	}
	return p.in.Read(b)
}

func (p *tape) Write(b []byte) (int, error) {
	if !p.playing.Load() {
		return p.Conn.Write(b)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.Write(b)
}

func (p *tape) Close() error                     { return nil }
func (p *tape) SetDeadline(time.Time) error      { return nil }
func (p *tape) play(b []byte)                    { p.in.Reset(b); p.playing.Store(true) }
func (p *tape) SetReadDeadline(time.Time) error  { return nil }
func (p *tape) SetWriteDeadline(time.Time) error { return nil }

// oracle is one side of a finished handshake between crypto/tls and itself, with the secrets of both.
type oracle struct {
	conn          *tls.Conn
	tape          *tape
	suite         uint16
	reads, writes []byte // the secrets
}

func newOracle(t testing.TB, ccfg, scfg *tls.Config, client bool) *oracle {
	t.Helper()
	a, b := net.Pipe()
	keys := new(keyLog)
	ccfg, scfg = ccfg.Clone(), scfg.Clone()
	ccfg.KeyLogWriter, scfg.SessionTicketsDisabled = keys, true
	ta, tb := &tape{Conn: a}, &tape{Conn: b}
	c, s := tls.Client(ta, ccfg), tls.Server(tb, scfg)
	done := make(chan error, 1)
	go func() { done <- s.Handshake() }()
	if err := errors.Join(c.Handshake(), <-done); err != nil {
		t.Fatal(err)
	}
	a.Close()
	b.Close()
	o := &oracle{conn: c, tape: ta, suite: c.ConnectionState().CipherSuite, reads: keys.server, writes: keys.client}
	if !client {
		o.conn, o.tape, o.reads, o.writes = s, tb, keys.client, keys.server
	}
	return o
}

// outcome is what a reader made of it all.
type outcome struct {
	data   []byte
	clean  bool  // close_notify, or for crypto/tls also an end between two records
	alert  uint8 // the one that it sent, if it found a fault
	remote bool  // the other side's alert ended it
	idle   bool  // ours: too many records in a row without data
	err    error
}

func (o *oracle) read(wire []byte) (out outcome) {
	o.tape.play(wire)
	out.data, out.err = io.ReadAll(o.conn)
	out.clean = out.err == nil
	var oe *net.OpError
	out.remote = errors.As(out.err, &oe) && oe.Op == "remote error"
	// What it sent is under its own key: KeyUpdates, and at last an alert.
	h, _ := newDirection(o.suite, o.writes)
	spy := newRecords(newWire(&tape{Conn: nil}, new(Buffers)), h, nil, true)
	spy.feed(o.tape.out.Bytes())
	_, err := spy.fill(make([]byte, blockLarge))
	var alert tls.AlertError
	if errors.As(err, &alert) {
		out.alert = uint8(alert)
	}
	return out
}

func readOurs(t testing.TB, o *oracle, wire []byte, client bool) (out outcome) {
	in, err1 := newDirection(o.suite, o.reads)
	mine, err2 := newDirection(o.suite, o.writes)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	p := new(tape)
	p.play(wire)
	r := newRecords(newWire(p, new(Buffers)), in, mine, client)
	buf := make([]byte, blockLarge)
	for out.err == nil {
		if out.err = r.wait(); out.err == nil {
			var n int
			n, out.err = r.fill(buf)
			out.data = append(out.data, buf[:n]...)
		}
	}
	out.clean = out.err == io.EOF
	var oe *net.OpError
	out.remote = errors.As(out.err, &oe) && oe.Op == "remote error"
	out.alert, out.idle = uint8(r.fatal.Load()), r.useless > maxUseless
	return out
}

// records that a script asks for; each takes an instruction and an argument.
const (
	opData = iota
	opKeyUpdate
	opAlert
	opHandshake
	opType
	opTicket
	opFlip
	opPlain
	opHeader
	opEmpty
	opLarge
	opCut
	opFinished
	opEnd
	ops
)

// perform makes bytes for the wire of a script, with the writer's key.
func perform(seal *records, script []byte) (wire []byte) {
	last := 0 // where the last record begins
	add := func(typ byte, plain []byte) {
		last = len(wire)
		wire = seal.sealRecord(wire, append(bytes.Clone(plain), 0)[:len(plain)], typ)
	}
	for steps := 0; len(script) >= 2 && steps < 60; steps++ {
		op, arg := script[0]%ops, script[1]
		script = script[2:]
		rest := script[:min(len(script), int(arg%8))]
		switch op {
		case opData:
			add(typeApplicationData, bytes.Repeat([]byte{arg}, int(arg)))
		case opKeyUpdate:
			add(typeHandshake, []byte{messageKeyUpdate, 0, 0, 1, arg % 3})
			seal.out.update()
		case opAlert:
			add(typeAlert, append([]byte{1 + arg%2, arg}, rest[:len(rest)/4]...))
		case opHandshake:
			add(typeHandshake, rest)
			script = script[len(rest):]
		case opType:
			add(arg, append(bytes.Clone(rest), make([]byte, arg%5)...))
			script = script[len(rest):]
		case opTicket: // in one record, or in two
			ticket := []byte{messageNewSessionTicket, 0, 0, 17, 0, 0, 1, 0, 1, 2, 3, 4, 1, 9, 0, 4, 't', 'i', 'c', 'k', 0}
			ticket = append(ticket[:len(ticket)-1], 0, 0)
			ticket[3] = byte(len(ticket) - 4)
			k := int(arg) % len(ticket)
			if k > 0 {
				add(typeHandshake, ticket[:k])
			}
			add(typeHandshake, ticket[k:])
		case opFlip:
			if len(wire) > last+recordHead {
				wire[last+recordHead+int(arg)%(len(wire)-last-recordHead)] ^= 1 << (arg % 8)
			}
		case opPlain:
			last = len(wire)
			wire = append(wire, arg, 3, 3, 0, byte(len(rest)))
			wire = append(wire, rest...)
			script = script[len(rest):]
		case opHeader: // the version is not looked at in TLS 1.3, but part of what is authenticated
			if len(wire) > last {
				wire[last+1+int(arg)%2] ^= arg
			}
		case opEmpty:
			for range arg % 20 {
				add(typeApplicationData, nil)
			}
		case opLarge:
			add(typeApplicationData, make([]byte, recordLen-2+int(arg%4)))
		case opCut:
			return wire[:max(last, len(wire)-int(arg))]
		case opFinished:
			add(typeHandshake, append([]byte{arg, 0, 0, byte(len(rest))}, rest...))
			script = script[len(rest):]
		case opEnd:
			add(typeAlert, []byte{1, alertCloseNotify})
		}
		if len(wire) > 80<<10 {
			break
		}
	}
	return wire
}

// agreed are the pairs of alerts (ours, the oracle's) for the same fault in which we go by the letter of RFC 8446.
var agreed = map[[2]uint8]string{
	{alertUnexpectedMessage, alertBadRecordMAC}: "5: a record without protection is unexpected; crypto/tls tries to " +
		"open it",
	{alertUnexpectedMessage, alertDecodeError}: "5: the same, with a ChangeCipherSpec of another content than 1",
	{alertIllegalParameter, alertDecodeError}:  "4.6.3: a KeyUpdate with another value than 0 and 1",
	{alertBadRecordMAC,
		70}: "5.1: the version is ignored; that it is authenticated makes it a bad MAC",
}

func FuzzRecordsOracle(f *testing.F) {
	ccfg, scfg := testTLS(f)
	for _, seed := range [][]byte{
		{opData, 5, opData, 200, opEnd, 0},
		{opData, 5, opKeyUpdate, 0, opData, 6, opKeyUpdate, 1, opData, 7, opEnd, 0},
		{opTicket, 0, opData, 1, opTicket, 9, opData, 2},
		{opEmpty, 15, opData, 1, opEmpty, 17, opData, 1},
		{opData, 9, opFlip, 77},
		{opLarge, 2, opLarge, 3},
		{opPlain, 21, 2, 40, opData, 3},
		{opPlain, 20, 1, opData, 3},
		{opAlert, 90, opData, 4, opAlert, 40},
		{opData, 4, opCut, 3},
		{opHandshake, 2, 4, 0, opData, 1},
		{opFinished, 20, opData, 1},
		{opType, 99, 1, 2, 3},
		{opKeyUpdate, 2},
		{opData, 7, opHeader, 3},
	} {
		f.Add(seed, true)
		f.Add(seed, false)
	}
	f.Fuzz(func(t *testing.T, script []byte, client bool) {
		o := newOracle(t, ccfg, scfg, client)
		key, err := newDirection(o.suite, o.reads)
		if err != nil {
			t.Fatal(err)
		}
		wire := perform(&records{out: key}, script)
		theirs := o.read(wire)
		ours := readOurs(t, o, wire, client)
		switch {
		case ours.idle && ours.alert == alertUnexpectedMessage && bytes.HasPrefix(theirs.data, ours.data):
			return // crypto/tls begins to count anew with each handshake message; we do with data
		case !bytes.Equal(ours.data, theirs.data):
			t.Errorf("%d bytes, the oracle has %d", len(ours.data), len(theirs.data))
		case ours.clean && !theirs.clean, ours.alert != theirs.alert && agreed[[2]uint8{ours.alert, theirs.alert}] == "",
			ours.remote != theirs.remote:
		case theirs.clean && !ours.clean && ours.err != io.ErrUnexpectedEOF: // the oracle forgives a missing close_notify
		default:
			return
		}
		t.Errorf("% x:\nours   %v, alert %d\noracle %v, alert %d", wire[:min(len(wire), 200)], ours.err, ours.alert,
			theirs.err, theirs.alert)
	})
}
