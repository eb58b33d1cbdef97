package capture

import (
	"encoding/binary"
	"io"
	"time"
)

// Writer writes pcapng (draft-ietf-opsawg-pcapng): one section with one interface of raw IP packets. Every call is one
// Write of whole blocks, so that what was written is a file at any time. Use NewWriter.
type Writer struct {
	w   io.Writer
	buf []byte
}

// Block types and options.
const (
	blockSection   = 0x0a0d0d0a
	blockInterface = 1
	blockStats     = 5
	blockPacket    = 6

	linkRaw = 101 // LINKTYPE_RAW: an IP packet, of the version that its first byte says

	optEnd         = 0
	optComment     = 1
	optFlags       = 2 // of packets: 1 inbound, 2 outbound
	optName        = 2 // of the interface
	optResolution  = 9 // a power of ten
	optApplication = 4 // of the section
	optDropped     = 5 // of statistics
)

// NewWriter begins a file: about the interface name, with packets of up to snap bytes. comment is that of the file.
func NewWriter(w io.Writer, name, comment string, snap int) (*Writer, error) {
	p := &Writer{w: w}
	at := p.begin(blockSection)
	p.u32(0x1a2b3c4d)
	p.u32(1)                                                    // version 1.0
	p.buf = binary.LittleEndian.AppendUint64(p.buf, ^uint64(0)) // of unknown length
	p.option(optApplication, "ztun")
	p.option(optComment, comment)
	p.end(at)
	at = p.begin(blockInterface)
	p.u32(linkRaw)
	p.u32(uint32(snap))
	p.option(optName, name)
	p.option(optResolution, "\x09")
	p.end(at)
	return p, p.flush()
}

// Packet writes one: length bytes on the wire, of which data are the first. sent: by the interface's own side.
func (p *Writer) Packet(at time.Time, sent bool, data []byte, length int, comment string) error {
	b := p.begin(blockPacket)
	p.u32(0) // the interface
	ns := uint64(at.UnixNano())
	p.u32(uint32(ns >> 32))
	p.u32(uint32(ns))
	p.u32(uint32(len(data)))
	p.u32(uint32(length))
	p.buf = append(p.buf, data...)
	p.pad()
	direction := "\x01\x00\x00\x00" // inbound
	if sent {
		direction = "\x02\x00\x00\x00"
	}
	p.option(optFlags, direction)
	p.option(optComment, comment)
	p.end(b)
	return p.flush()
}

// Dropped ends the file with how many packets are not in it.
func (p *Writer) Dropped(at time.Time, n uint64) error {
	b := p.begin(blockStats)
	p.u32(0)
	ns := uint64(at.UnixNano())
	p.u32(uint32(ns >> 32))
	p.u32(uint32(ns))
	p.option(optDropped, string(binary.LittleEndian.AppendUint64(nil, n)))
	p.end(b)
	return p.flush()
}

func (p *Writer) u32(v uint32) { p.buf = binary.LittleEndian.AppendUint32(p.buf, v) }

func (p *Writer) pad() {
	for len(p.buf)%4 != 0 {
		p.buf = append(p.buf, 0)
	}
}

// begin starts a block, whose length end fills in.
func (p *Writer) begin(kind uint32) (at int) {
	at = len(p.buf)
	p.u32(kind)
	p.u32(0)
	return at
}

func (p *Writer) end(at int) {
	p.u32(optEnd)
	n := uint32(len(p.buf) - at + 4)
	p.u32(n)
	binary.LittleEndian.PutUint32(p.buf[at+4:], n)
}

// option appends one; an empty one is left out.
func (p *Writer) option(code uint16, value string) {
	if value == "" || len(value) > 0xffff {
		return
	}
	p.buf = binary.LittleEndian.AppendUint16(p.buf, code)
	p.buf = binary.LittleEndian.AppendUint16(p.buf, uint16(len(value)))
	p.buf = append(p.buf, value...)
	p.pad()
}

func (p *Writer) flush() error {
	_, err := p.w.Write(p.buf)
	p.buf = p.buf[:0]
	return err
}
