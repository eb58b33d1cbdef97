package load

import (
	"encoding/binary"
	"fmt"
)

// Marker begins every 64 byte block of a pattern.
const Marker = "ztload-plaintext"

const block = 64

// Pattern is an endless stream of bytes that depends on seed and position only.
type Pattern struct {
	Seed uint64
	Off  int64
}

func mix(x uint64) uint64 { // splitmix64
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

func (p *Pattern) block(b *[block]byte, i int64) {
	copy(b[:], Marker)
	x := p.Seed ^ uint64(i)*0xd1342543de82ef95
	for k := len(Marker); k < block; k += 8 {
		x = mix(x)
		binary.LittleEndian.PutUint64(b[k:], x)
	}
}

// Read fills b with the next bytes; it never fails.
func (p *Pattern) Read(b []byte) (int, error) {
	var blk [block]byte
	for n := 0; n < len(b); {
		i, at := p.Off/block, int(p.Off%block)
		var c int
		if at == 0 && len(b)-n >= block {
			p.block((*[block]byte)(b[n:]), i)
			c = block
		} else {
			p.block(&blk, i)
			c = copy(b[n:], blk[at:])
		}
		n += c
		p.Off += int64(c)
	}
	return len(b), nil
}

// Check advances over b and tells the first byte that differs.
func (p *Pattern) Check(b []byte) error {
	var blk [block]byte
	for n := 0; n < len(b); {
		i, at := p.Off/block, int(p.Off%block)
		p.block(&blk, i)
		c := min(block-at, len(b)-n)
		if string(b[n:n+c]) != string(blk[at:at+c]) {
			for k := range c {
				if b[n+k] != blk[at+k] {
					return fmt.Errorf("byte %d is %#x, not %#x", p.Off+int64(k), b[n+k], blk[at+k])
				}
			}
		}
		n += c
		p.Off += int64(c)
	}
	return nil
}
