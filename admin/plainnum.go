package admin

import (
	"bytes"
	"io"
	"math"
	"strconv"
)

// plainNumbers passes the text of an exposition on with whole numbers written plainly. expfmt writes 1 as
// 1.0 and 104857600 as 1.048576e+08; ztunnel, and whoever greps in its metrics, writes 1 and 104857600.
type plainNumbers struct {
	w    io.Writer
	line []byte // what has come of the current line
	out  []byte
}

func (p *plainNumbers) Write(b []byte) (int, error) {
	n := len(b)
	p.out = p.out[:0]
	for {
		i := bytes.IndexByte(b, '\n')
		if i < 0 {
			p.line = append(p.line, b...)
			break
		}
		p.line = append(p.line, b[:i]...)
		p.out = appendPlain(p.out, p.line)
		p.out = append(p.out, '\n')
		p.line = p.line[:0]
		b = b[i+1:]
	}
	if len(p.out) == 0 {
		return n, nil
	}
	if _, err := p.w.Write(p.out); err != nil {
		return 0, err
	}
	return n, nil
}

// appendPlain appends a line, the number at the end of a sample rewritten where a float64 holds it exactly.
func appendPlain(out, line []byte) []byte {
	i := bytes.LastIndexByte(line, ' ')
	if i < 0 || line[0] == '#' {
		return append(out, line...)
	}
	v, err := strconv.ParseFloat(string(line[i+1:]), 64)
	if err != nil || v != math.Trunc(v) || math.Abs(v) > 1<<53 || v == 0 && math.Signbit(v) {
		return append(out, line...)
	}
	out = append(out, line[:i+1]...)
	return strconv.AppendInt(out, int64(v), 10)
}
